"""A trained model as three files that any program can read, and nothing else can.

model.safetensors  the parameters, each under its path: embedding/table, ...
config.json        the resolved config of the run, without places on its machine, and
                   under 'exported' the step and whether the weights are an average
vocabulary.json    what the ids mean

`write` makes them of a run; `read` gives back the same bits.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from xlformer import __version__, models, runs
from xlformer import config as config_lib
from xlformer.convert import files
from xlformer.data import vocabularies
from xlformer.data.vocabulary import Vocabulary
from xlformer.errors import UserError, about, some
from xlformer.fields import UNSAID
from xlformer.models.parameters import abstract_params
from xlformer.runs import leaves

WEIGHTS = "model.safetensors"
EXPORTED = "exported"
# Where things lie on the machine of the run, which is nobody else's business.
PLACES = ("path", "directory", "manual_dir")
# What of the section 'train' says how the weights are read; all else is how they came.
READING = ("segment_length", "objective", "mask_rate")


class Model(NamedTuple):
    """What lies in such a directory; params are a tree of numpy arrays."""

    config: ConfigDict
    model_config: Any
    params: Any
    vocabulary: Vocabulary
    step: int


def write(run: runs.Run, folder: pathlib.Path) -> None:
    """Writes the three files into a directory that is there.

    Raises UserError for a model of one's own, whose config.json would not say what it
    is.
    """
    if run.config.own_model not in ("", UNSAID):
        raise UserError(
            f"a run of a model of one's own, {run.config.own_model}: config.json could "
            "not say what it is"
        )
    files.write_safetensors(folder / WEIGHTS, leaves.flatten(run.params))
    text = json.dumps(_described(run), indent=2, sort_keys=True) + "\n"
    (folder / runs.CONFIG).write_text(text, encoding="utf-8")
    write_vocabulary(run, folder)


def write_vocabulary(run: runs.Run, folder: pathlib.Path) -> None:
    """Writes vocabulary.json alone."""
    text = run.vocabulary.to_json()
    (folder / runs.VOCABULARY).write_text(text, encoding="utf-8")


def _described(run: runs.Run) -> dict:
    config = ConfigDict(run.config.to_dict())
    config.init_from = ""
    config.data.update(dict.fromkeys(PLACES, ""))
    with config.model.ignore_type():
        config.model.vocab_size = run.model.vocab_size
    params = "ema" if run.averaged else "raw"
    said = {"step": run.step, "params": params, "mean_of": list(run.mean_of)}
    said |= {"xlformer": __version__}
    return {EXPORTED: said, **config_lib.to_dict(config)}


def read(source) -> Model:
    """Reads what `write` wrote, which may be a stranger's.

    Raises UserError where a file is missing, damaged, or belongs to another model.
    """
    folder = pathlib.Path(source)
    where = folder / runs.CONFIG
    found = files.read_json(where)
    step = _step(found.pop(EXPORTED, None), where)
    config = config_lib.from_dict(found, where=str(where))
    if config.own_model not in ("", UNSAID):
        line = f"{where}: config.own_model={config.own_model!r:.50}"
        raise UserError(f"{line}: read it in Python, where that model is")
    vocabulary = vocabularies.load(folder / runs.VOCABULARY)
    size = config_lib.vocab_size(config, vocabulary.size)
    with about(str(folder)):
        model = models.build(config.model, vocab_size=size)
    arrays, _ = files.read_state(folder / WEIGHTS)
    params = _placed(arrays, abstract_params(model), folder / WEIGHTS)
    return Model(_for_reading(config), model.config, params, vocabulary, step)


def _step(said, where) -> int:
    step = said.get("step") if isinstance(said, dict) else None
    # Orbax names a directory by it.
    if type(step) is not int or not 0 <= step < 1 << 31:
        raise UserError(
            f"{where}: {EXPORTED}={said!r:.50} has no step: is it of xlformer.export?"
        )
    return step


def _placed(arrays: dict, abstract, where):
    """The arrays in the places that the model has for them."""
    expected = leaves.flatten(abstract)
    if missing := sorted(set(expected) - set(arrays)):
        raise UserError(f"{where} lacks {some(missing)}")
    if strange := sorted(set(arrays) - set(expected)):
        raise UserError(f"{where}: the model has no {some(strange)}")
    for name, leaf in expected.items():
        x = arrays[name]
        if x.shape != leaf.shape or not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(
                f"{where}: {name} is {leaves.layout(x)}, the model has "
                f"{leaves.layout(leaf)}"
            )
    structure = jax.tree.structure(abstract)
    return jax.tree.unflatten(structure, [arrays[name] for name in expected])


def _for_reading(config: ConfigDict) -> ConfigDict:
    """The config of weights without a training: no average is kept of them."""
    tree = config_lib.default_config(config.model.name).to_dict()
    found = config.to_dict()
    tree |= {section: found[section] for section in ("model", "data", "eval")}
    tree["train"] |= {name: found["train"][name] for name in READING}
    return ConfigDict(tree | {"name": config.name, "seed": config.seed})
