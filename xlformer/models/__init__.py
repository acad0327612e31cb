"""The models: `build` makes one from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from xlformer.errors import UserError, did_you_mean
from xlformer.fields import REFUSED, Rule
from xlformer.models import transformer_xl_config
from xlformer.models.base import Aux, Model
from xlformer.models.transformer_xl import TransformerXL, TransformerXLConfig

__all__ = ["Aux", "Model", "TransformerXL", "TransformerXLConfig", "build"]

MODELS = {"transformer_xl": (TransformerXL, TransformerXLConfig)}
RULES = {"transformer_xl": transformer_xl_config.RULES}


def _lookup(name: str):
    if name not in MODELS:
        raise UserError(f"config.model.name={name!r}{did_you_mean(name, MODELS)}")
    return MODELS[name]


def rules(name: str) -> dict[str, Rule]:
    """What each field of a model's configuration may be, and who may change it."""
    _lookup(name)
    return {"name": Rule(REFUSED), **RULES[name]}


def default_config(name: str, **fields) -> dict:
    """The fields of a model's configuration with their defaults, and its name."""
    _, config_class = _lookup(name)
    known = {f.name: f.default for f in dataclasses.fields(config_class)}
    for field in fields:
        if field not in known:
            near = did_you_mean(field, known)
            raise UserError(f"config.model has no field {field!r}{near}")
    return {"name": name, **known, **fields}


def check(config: Mapping) -> None:
    """Raises UserError for fields of `config.model` that no model can have."""
    fields = default_config(**config)
    _lookup(fields.pop("name"))[1](**fields)


def build(
    config: Mapping | TransformerXLConfig, vocab_size: int | None = None
) -> Model:
    """Builds the model that `config` describes.

    Args:
      config: a model's configuration dataclass, or a mapping with its `name` and any
        of its fields (`config.model` of a run).
      vocab_size: number of token ids; required exactly when the config carries none.

    Raises:
      UserError: an unknown name or field, an impossible combination, or a vocab_size
        that is missing or differs from the config's.
    """
    if not dataclasses.is_dataclass(config):  # ConfigDict is no Mapping.
        fields = default_config(**config) if "name" in config else None
        if fields is None:
            raise UserError(f"config.model.name is missing; known: {', '.join(MODELS)}")
        config = _lookup(fields.pop("name"))[1](**fields)
    if vocab_size is None and config.vocab_size is None:
        raise UserError("config.model.vocab_size is not set: pass vocab_size to build")
    if None not in (vocab_size, config.vocab_size) and vocab_size != config.vocab_size:
        raise UserError(
            f"config.model.vocab_size={config.vocab_size} but the data has {vocab_size}"
        )
    if vocab_size is None:
        vocab_size = config.vocab_size
    config = dataclasses.replace(config, vocab_size=vocab_size)
    model_class = next(m for m, c in MODELS.values() if isinstance(config, c))
    return model_class(config)
