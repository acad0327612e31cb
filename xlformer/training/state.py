"""Everything that the next step reads, in one pytree: no part of it lives in Python."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from xlformer import config as config_lib
from xlformer.training import averaging, optimizers, spikes

# Entries that a checkpoint of an earlier release lacks. A run that goes on from such a
# one begins them as a new run does; for lack of any other entry it is refused.
LATER: tuple[str, ...] = ("averaging",)


class Place(NamedTuple):
    """The place of the last batch in the stream, which a resumed run compares.

    Attributes:
      epoch, offset, length: of that batch in each row, in tokens; zeros before step 1.
    """

    epoch: Any
    offset: Any
    length: Any


class TrainState(NamedTuple):
    """One training run between two steps; this is what a checkpoint holds.

    Attributes:
      step: steps taken, dropped ones included: the batch is a function of it.
      params: the bare tree.
      opt_state: of optax.
      ema: average of the parameters, None if the config wants none.
      averaging: what NT-ASGD knows of it, None for other optimizers.
      carried: the model's state of every row.
      data: place of the last batch.
      plateau: best validation loss and the scale of the learning rate.
      evaluated: step of the last validation.
      spikes: what the guard against loss spikes knows.
      skipped, skipped_in_a_row: steps dropped because the loss was not finite.
      tail: what is known of the average over the run's tail; None without one.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any
    averaging: Any
    carried: Any
    data: Place
    plateau: optimizers.Plateau
    evaluated: Any
    spikes: spikes.Spikes
    skipped: Any
    skipped_in_a_row: Any
    tail: Any = None


def create(config, model, optimizer, key: jax.Array) -> TrainState:
    """A fresh state. Pure: call it under jit, or eval_shape for its shapes."""
    params = model.init(key)
    # Counters are arrays and not Python's numbers: they are traced, donated and saved
    # with the rest.
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=optimizer.init(params),
        ema=params if config_lib.keeps_average(config) else None,
        averaging=(
            averaging.init(config.optimizer.nonmonotone)
            if config.optimizer.name == "nt_asgd"
            else None
        ),
        carried=model.init_state(config.train.batch_size),
        data=Place(zero, zero, zero),
        plateau=optimizers.plateau_init(),
        evaluated=zero,
        spikes=spikes.init(),
        skipped=zero,
        skipped_in_a_row=zero,
        tail=averaging.tail_init(config.train) if config.train.tail_average else None,
    )


def as_stored(wanted: TrainState, names: Set[str]) -> TrainState:
    """`wanted` without entries for which a checkpoint with these names is too old."""
    missing: dict[str, Any] = {name: None for name in LATER if name not in names}
    return wanted._replace(**missing)


def completed(found: TrainState, create: Callable, placed: TrainState, key):
    """`found` with a fresh value, of create(key), for what its checkpoint lacked."""
    lacking = [
        name
        for name in LATER
        if getattr(found, name) is None and getattr(placed, name) is not None
    ]
    if not lacking:
        return found

    def fresh(key):  # Compiled, it makes these alone.
        made = create(key)
        return {name: getattr(made, name) for name in lacking}

    where = {name: getattr(placed, name) for name in lacking}
    return found._replace(**jax.jit(fresh, out_shardings=where)(key))


def resumed(found: TrainState, old: ConfigDict, new: ConfigDict) -> TrainState:
    """`found` as a restored run goes on with it.

    Where its losses of validations were measured with other settings they are
    forgotten, and not what they have brought about: the scale that the learning rate
    has come to, an average that has begun.
    """
    if old.eval.to_dict() == new.eval.to_dict():
        return found
    was = found.plateau, found.averaging
    plateau = optimizers.plateau_init()._replace(scale=found.plateau.scale)
    anew = plateau, found.averaging and averaging.forgotten(found.averaging)
    plateau, average = jax.tree.map(
        lambda x, was: jax.device_put(x, was.sharding), anew, was
    )
    return found._replace(plateau=plateau, averaging=average)
