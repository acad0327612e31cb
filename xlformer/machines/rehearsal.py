"""A config's training step without its data, to compile or to time."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from xlformer import config as config_lib
from xlformer import models, storage
from xlformer.data.stream import Stream
from xlformer.errors import Argument, UserError
from xlformer.training.compiling import TrainingStep


class Step(NamedTuple):
    """What `xlformer.train` makes of a config; see training.compiling.

    Attributes:
      create: key -> a fresh TrainState, of jax.jit.
      compile: () -> the compiled step, (train_state, batch) -> (train_state, metrics);
        the TrainState is donated.
      batch: one batch, as the first of a text of zeros.
    """

    create: Any
    compile: Any
    batch: dict


def vocab_size(spec: str, config) -> int:
    """What the config says, or its file in VOCAB_SIZE, or the data.

    Data is looked at only in a config.data.directory that exists, as training would.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    found = getattr(config_lib.module(spec.partition(":")[0]), "VOCAB_SIZE", None)
    if found and not config.data.tokenizer and config.data.unit == "bytes":
        return config_lib.vocab_size(config, found)
    directory = config.data.directory
    if directory and storage.path(directory).exists():
        from xlformer.data import preparing  # TFDS, which only this case needs

        symbols = preparing.prepare(config.data).vocabulary.size
        return config_lib.vocab_size(config, symbols)
    raise UserError(
        Argument("config", spec),
        ": the size of the vocabulary comes from the data: pass ",
        Argument("config.model.vocab_size"),
        ", or ",
        Argument("config.data.directory"),
        " with it prepared",
    )


def shapes(config, model: models.Model, mesh):
    """(shapes, shardings) of the TrainState; of the mesh only its sizes matter."""
    made = TrainingStep(config, model, mesh)
    return made.abstract, made.placed


def step(config, model: models.Model, mesh: Mesh) -> Step:
    """The training step on a mesh, which may be of devices that are not here."""
    made, batch = TrainingStep(config, model, mesh), _batch(config, model)
    create = jax.jit(made.create, out_shardings=made.placed)
    return Step(create, functools.partial(made.compile, batch), batch)


def _batch(config, model) -> dict:
    train = config.train
    longest = train.segment_length + model.extended_length
    return Stream(
        np.zeros(train.batch_size * (2 * longest + 2), np.int32),
        batch_size=train.batch_size,
        segment_length=train.segment_length,
        extended_length=model.extended_length,
        documents=np.zeros(1, np.int64) if config.data.documents else None,
        variable_length=train.variable_length,
        seed=config.seed,
    ).at(0)
