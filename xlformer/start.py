"""Weights that a new run starts from: train --init_from=DIR[:best|latest|STEP].

Of DIR, a work directory of train or of convert, come the parameters, config.model and
the vocabulary. The optimizer, the step and the place in the text are new.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from xlformer import config as config_lib
from xlformer import models, resume, runs, storage
from xlformer.errors import UserError
from xlformer.training import leaves
from xlformer.training.checkpoints import Checkpoints


@dataclasses.dataclass(frozen=True)
class Source:
    """Where weights lie, and which of them.

    Attributes:
      name: as the person wrote it.
      workdir: a work directory.
      checkpoint: best, latest or a step.
    """

    name: str
    workdir: str
    checkpoint: str

    @classmethod
    def parse(cls, name: str, own_workdir) -> Source:
        """'DIR' is DIR:best; a suffix is one only if it is best, latest or a number."""
        workdir, colon, which = name.rpartition(":")
        number = which.isascii() and which.isdigit()
        if not colon or not (number or which in ("best", "latest")):
            workdir, which = name, "best"
        if not workdir:
            raise UserError(f"--init_from={name} names no directory")
        here, own = storage.path(workdir), storage.path(own_workdir)
        same = os.fspath(here) == os.fspath(own)
        if not same and not storage.is_remote(here) and not storage.is_remote(own):
            same = os.path.realpath(here) == os.path.realpath(own)
        if same:
            raise UserError(
                f"--init_from={name} is --workdir itself: without --init_from it goes "
                "on; to start anew from its weights name another --workdir"
            )
        return cls(name, workdir, which)

    def check(self) -> None:
        """Raises UserError where there is no run, in the words of --init_from."""
        if (storage.path(self.workdir) / runs.CONFIG).exists():
            return
        workdir, _, which = self.name.rpartition(":")
        advice = ""
        if workdir and (storage.path(workdir) / runs.CONFIG).exists():
            advice = f"; after {workdir}: stands best, latest or a step, not {which!r}"
        raise UserError(
            f"--init_from={self.name} holds no run: there is no {runs.CONFIG} in it"
            f"{advice}"
        )


def with_model(
    config: ConfigDict, name: str, workdir, overrides: Sequence[str] = ()
) -> ConfigDict:
    """`config` with the model of the weights that --init_from=name means.

    In a work directory that has a checkpoint already it is the model of that, since
    the run goes on from there. overrides 'model.x=v' are applied to it; `weights`
    refuses those that ask for other shapes.
    """
    checkpoints = Checkpoints(storage.path(workdir) / runs.CHECKPOINTS, read_only=True)
    found = resume.sealed(workdir, checkpoints)
    if found is None:
        source = Source.parse(name, workdir)
        source.check()
        found = runs.read_sealed(source.workdir, source.checkpoint)
    if found.model.name != config.model.name:
        raise UserError(
            f"--init_from={name} holds a {found.model.name}, --config asks for a "
            f"{config.model.name}"
        )
    config = ConfigDict(config.to_dict())
    config.model, config.init_from = found.model, name
    config.lock()
    for override in overrides:
        field, _, text = override.partition("=")
        if field.startswith("model."):
            config_lib.set_field(config, field, text)
    config_lib.check(config)
    return config


def from_weights(
    create: Callable, config: ConfigDict, model: models.Model, run: runs.Run
) -> Callable:
    """Of `create(key)`, a fresh TrainState, one of (key, the parameters of `run`).

    Raises UserError naming the field of config.model that asks for other shapes.
    """
    wanted = jax.eval_shape(model.init, jax.random.key(0))
    if leaves.layouts(wanted) != leaves.layouts(run.params):
        raise UserError(
            f"--init_from={config.init_from}: its weights have other shapes than "
            f"{', '.join(_changed(config, run)) or 'config.model'} would give"
        )

    def created(key, params):
        fresh = create(key)
        # Copies, because the state is donated, and an average is not its parameters.
        params, ema = (jax.tree.map(_copy, params) for _ in range(2))
        return fresh._replace(params=params, ema=None if fresh.ema is None else ema)

    return created


def lines(config: ConfigDict, run: runs.Run) -> list[str]:
    """What a run says that starts from the weights of `run`."""
    averaged = " (their average)" if run.averaged else ""
    first = (
        f"no checkpoint: starting from the parameters of step {run.step} of "
        f"{config.init_from}{averaged}; all else is fresh"
    )
    return [first, *(f"{x}: not what they saw" for x in _changed(config, run))]


def _changed(config: ConfigDict, run: runs.Run) -> list[str]:
    """'config.model.x=1 (2 there)' for what differs from how they were trained."""
    found = resume.differences(run.config, config)
    return [line for line in found if line.startswith("config.model.")]


def _copy(x: jax.Array) -> jax.Array:
    return jnp.array(x, copy=True)
