"""The models: `build` makes one from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from xlformer.errors import UserError, did_you_mean
from xlformer.fields import REFUSED, Rule
from xlformer.models.base import Aux, Model
from xlformer.models.lstm import LSTM, LSTMConfig
from xlformer.models.performer import Performer, PerformerConfig
from xlformer.models.sha_rnn import SHARNN, SHARNNConfig
from xlformer.models.transformer_xl import TransformerXL, TransformerXLConfig
from xlformer.models.universal import UniversalConfig, UniversalTransformer
from xlformer.models.vanilla import VanillaConfig, VanillaTransformer

__all__ = [
    "LSTM",
    "SHARNN",
    "Aux",
    "LSTMConfig",
    "Model",
    "Performer",
    "PerformerConfig",
    "SHARNNConfig",
    "TransformerXL",
    "TransformerXLConfig",
    "UniversalConfig",
    "UniversalTransformer",
    "VanillaConfig",
    "VanillaTransformer",
    "build",
]

# A model's class has its `Config`: a frozen dataclass with a vocab_size, whose `RULES`
# say what each field may be (fields.Rule), and whose tiny() is what ':debug' trains.
MODELS: dict[str, type[Model]] = {
    "transformer_xl": TransformerXL,
    "lstm": LSTM,
    "sha_rnn": SHARNN,
    "universal": UniversalTransformer,
    "vanilla": VanillaTransformer,
    "performer": Performer,
}


def _class(name: str) -> type[Model]:
    if name not in MODELS:
        raise UserError(f"config.model.name={name!r}{did_you_mean(name, MODELS)}")
    return MODELS[name]


def rules(name: str) -> dict[str, Rule]:
    """What each field of a model's configuration may be, and who may change it."""
    # Under another name the checkpoint's parameters would belong to no model.
    return {"name": Rule(REFUSED), **_class(name).Config.RULES}


def default_config(name: str, **fields) -> dict:
    """The fields of a model's configuration with their defaults, and its name."""
    known = {f.name: f.default for f in dataclasses.fields(_class(name).Config)}
    for field in fields:
        if field not in known:
            near = did_you_mean(field, known)
            raise UserError(f"config.model has no field {field!r}{near}")
    return {"name": name, **known, **fields}


def check(config: Mapping) -> None:
    """Raises UserError for fields of `config.model` that no model can have."""
    _from_fields(config)


def tiny(config: Mapping) -> dict:
    """`config.model` of a model of the same kind, small enough for a test."""
    return {"name": config["name"], **dataclasses.asdict(_from_fields(config).tiny())}


def _from_fields(config: Mapping):
    """The dataclass that the fields of `config.model` describe."""
    if "name" not in config:
        raise UserError(f"config.model.name is missing; known: {', '.join(MODELS)}")
    # Defaults fill what an earlier release did not know yet.
    fields = default_config(**config)
    return _class(fields.pop("name")).Config(**fields)


def build(config: Mapping | Any, vocab_size: int | None = None) -> Model:
    """Builds the model that `config` describes.

    Args:
      config: a model's configuration dataclass, or a mapping with its `name` and any
        of its fields (`config.model` of a run).
      vocab_size: number of token ids; required exactly when the config carries none.

    Raises:
      UserError: an unknown name or field, an impossible combination, or a vocab_size
        that is missing or differs from the config's.
    """
    # ConfigDict is no Mapping, so whatever is not a dataclass is treated as one.
    made: Any = config
    if not dataclasses.is_dataclass(config):
        made = _from_fields(config)
    model_class = MODELS[name_of(made)]
    # Neither size may win over the other: a model of one would train on data of the
    # other without a word, or look up ids that it does not have.
    if vocab_size is None and made.vocab_size is None:
        raise UserError("config.model.vocab_size is not set: pass vocab_size to build")
    if None not in (vocab_size, made.vocab_size) and vocab_size != made.vocab_size:
        raise UserError(
            f"config.model.vocab_size={made.vocab_size} but the data has {vocab_size}"
        )
    if vocab_size is None:
        vocab_size = made.vocab_size
    return model_class(dataclasses.replace(made, vocab_size=vocab_size))


def name_of(config) -> str:
    """The name in MODELS of the model whose configuration dataclass this is."""
    for name, model_class in MODELS.items():
        if isinstance(config, model_class.Config):
            return name
    name, known = type(config).__name__, [m.Config.__name__ for m in MODELS.values()]
    raise UserError(
        f"config is a {name}, which belongs to no model of xlformer"
        f"{did_you_mean(name, known)}; a model of your own is made by its class"
    )
