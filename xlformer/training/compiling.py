"""The training step of a config on a mesh, whose devices may be elsewhere.

Training, `plan` and `bench` compile the same program because they all make it here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from xlformer import sharding
from xlformer.models import Model
from xlformer.runs.checkpoints import Checkpoints
from xlformer.training import optimizers, state, steps


class TrainingStep:
    """(train_state, batch) -> (train_state, metrics), with everything in its place.

    Attributes:
      create: key -> a fresh TrainState.
      abstract: its shapes.
      placed: its shardings.
    """

    def __init__(self, config, model: Model, mesh: Mesh):
        # Nothing is allocated here: `plan` makes this for slices that are not there.
        optimizer = optimizers.build(config.optimizer, model.matrices)
        schedule = optimizers.learning_rate(config.optimizer, config.train.steps)
        self._mesh, self._batch_size = mesh, config.train.batch_size
        self._function = steps.make_step(config, model, optimizer, schedule)
        self.create = functools.partial(state.create, config, model, optimizer)
        # The mesh says for what kind of device, and attention asks as it is traced. One
        # of sizes alone (plan by arithmetic) does not. The key is made before, here.
        key, concrete = jax.random.key(0), isinstance(mesh, Mesh)
        with jax.set_mesh(mesh) if concrete else contextlib.nullcontext():
            self.abstract = jax.eval_shape(self.create, key)
        self.placed = sharding.train_state(mesh, self.abstract, model)

    def restored(self, checkpoints: Checkpoints, key: jax.Array):
        """(step, TrainState, config) of the newest intact checkpoint; see state.LATER.

        key: of the run, for what the checkpoint is too old to have.
        """
        wanted = sharding.with_shardings(self.abstract, self.placed)
        step, found, config = checkpoints.restore(
            functools.partial(state.as_stored, wanted)
        )
        found = state.completed(found, self.create, self.placed, key)
        return step, found, config

    def compile(self, batch: Mapping, *, segments: int = 1):
        """The compiled call for batches like this one; the TrainState is donated.

        segments: how many one call takes. Where it is more than 1 they are the first
          axis of each leaf of the batch, and of the metrics.
        """
        function = self._function if segments == 1 else steps.make_steps(self._function)
        rows = sharding.Rows(self._mesh, self._batch_size)
        # The state is donated, or parameters and moments would be there twice. Its
        # shardings are the same on both sides, so that the next call takes what this
        # one gives; metrics are whole everywhere, since any host may read them.
        jitted = jax.jit(
            function,
            donate_argnums=0,
            in_shardings=(self.placed, rows.shardings(batch, axis=int(segments > 1))),
            out_shardings=(self.placed, sharding.replicated(self._mesh)),
        )
        # The mesh says for what kind of device: kernels and shard_map ask for it. Ahead
        # of time, so that compiling is accounted by itself and not as a slow step.
        with jax.set_mesh(self._mesh):
            return jitted.lower(self.abstract, batch).compile()
