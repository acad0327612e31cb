"""A config's training step without its data, to compile or to time."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from xlformer import config as config_lib
from xlformer import models, sharding, storage
from xlformer.data.stream import Stream
from xlformer.errors import Argument, UserError
from xlformer.training import optimizers, state, steps


class Step(NamedTuple):
    """What `xlformer.train` makes of a config.

    Attributes:
      function: of jax.jit: (state, batch) -> (state, metrics); the state is donated.
      create: key -> the first state, of jax.jit too.
      abstract: the state's shapes.
      placed: the state's shardings.
      batch: one batch, as the first of a text of zeros.
    """

    mesh: Mesh
    function: Any
    create: Any
    abstract: Any
    placed: Any
    batch: dict

    def compile(self):
        """The compiled step; its mesh says for what kind of device."""
        with jax.set_mesh(self.mesh):
            return self.function.lower(self.abstract, self.batch).compile()


def vocab_size(spec: str, config) -> int:
    """What the config says, or its file in VOCAB_SIZE, or the data.

    Data is looked at only in a config.data.directory that exists, as training would.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    found = getattr(config_lib.module(spec.partition(":")[0]), "VOCAB_SIZE", None)
    if found and not config.data.tokenizer and config.data.unit == "bytes":
        return found
    directory = config.data.directory
    if directory and storage.path(directory).exists():
        from xlformer.data import preparing  # TFDS, which only this case needs

        return preparing.prepare(config.data).vocabulary.size
    raise UserError(
        Argument("config", spec),
        ": the size of the vocabulary comes from the data: pass ",
        Argument("config.model.vocab_size"),
        ", or ",
        Argument("config.data.directory"),
        " with it prepared",
    )


def shapes(config, model: models.Model, mesh):
    """(shapes, shardings) of the training state; of the mesh only its sizes matter."""
    create = functools.partial(
        state.create, config, model, optimizers.build(config.optimizer)
    )
    abstract = jax.eval_shape(create, jax.random.key(0))
    return abstract, sharding.train_state(mesh, abstract, model)


def step(config, model: models.Model, mesh: Mesh) -> Step:
    """The training step on a mesh, which may be of devices that are not here."""
    train = config.train
    optimizer = optimizers.build(config.optimizer)
    schedule = optimizers.learning_rate(config.optimizer, train.steps)
    create = functools.partial(state.create, config, model, optimizer)
    abstract, placed = shapes(config, model, mesh)
    batch = _batch(config, model)
    rows = sharding.Rows(mesh, train.batch_size).shardings(batch)
    function = jax.jit(
        steps.make_step(config, model, optimizer, schedule),
        donate_argnums=0,
        in_shardings=(placed, rows),
        out_shardings=(placed, sharding.replicated(mesh)),
    )
    create = jax.jit(create, out_shardings=placed)
    return Step(mesh, function, create, abstract, placed, batch)


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
