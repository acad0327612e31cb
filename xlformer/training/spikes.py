"""Loss spikes: back to the last good checkpoint, and around the segment that did it.

The guard is a part of the TrainState, so what was left out is saved with what was
learnt. A batch is a function of one integer, and the steps read those integers that are
not left out, in order. A roll-back, once step `s` is seen to spike:

    index = data_index(s, skipped(train_state.spikes))     # what the step has read
    _, found, _ = checkpoints.restore(...)
    spikes = add(found.spikes, *skipped(train_state.spikes), index)

With what the live one leaves out, not only the restored one: else two spikes after
one checkpoint would bring each other back for ever. A run that is killed before the
next save meets the same spikes again, and leaves out the same segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlformer.errors import UserError

# Segments that a run may leave out. The list is a part of the state, so its size is
# fixed: another one would be another layout, and old checkpoints would be refused.
MOST = 16
WARMUP = 100  # losses before the first that can be a spike
WEIGHT = 0.01  # of a new loss in the average: the last hundred, more or less
# Greater than any index, so that a sorted list ends with the places that are unused.
_UNUSED = np.iinfo(np.int32).max


class Spikes(NamedTuple):
    """What the guard knows.

    Attributes:
      average: running mean of the losses that were no spikes.
      count: how many have entered it.
      skips: int32[MOST], indices of the stream that are left out, ascending; unused
        places hold the largest int32.
    """

    average: Any
    count: Any
    skips: Any


class Spike(Exception):
    """A loss that the guard does not accept.

    Attributes:
      step: that made it, counted from 1.
      ratio: to the average.
    """

    def __init__(self, step: int, ratio: float):
        super().__init__(f"the loss of step {step} is {ratio:.2f} times its average")
        self.step, self.ratio = step, ratio


def check(first_step: int, ratios: np.ndarray, factor: float) -> None:
    """Raises Spike for the first of the losses of consecutive steps that is one."""
    # Not `ratios > factor`, which is false of NaN.
    too_large = np.flatnonzero(~(ratios <= factor))
    if too_large.size:
        bad = int(too_large[0])
        raise Spike(first_step + bad, float(ratios[bad]))


def init() -> Spikes:
    return Spikes(
        average=jnp.zeros((), jnp.float32),
        count=jnp.zeros((), jnp.int32),
        skips=jnp.full((MOST,), _UNUSED, jnp.int32),
    )


def ratio(spikes: Spikes, loss, *, warmup: int = WARMUP, dropped=False) -> jax.Array:
    """loss / average; 1 in the first `warmup` steps, then inf if it is not finite.

    1 too of a step that is dropped for what is not finite in it: config.train.
    skip_nonfinite goes on from there, not back.
    """
    loss = jnp.asarray(loss, jnp.float32)
    # The average is 0 before the first loss: what is divided by it is not used then.
    tiny = jnp.finfo(jnp.float32).tiny
    found = loss / jnp.maximum(spikes.average, tiny)
    found = jnp.where(jnp.isfinite(loss), found, jnp.inf)
    return jnp.where((spikes.count < warmup) | dropped, 1.0, found)


def update(
    spikes: Spikes, loss, *, factor: float, warmup: int = WARMUP, dropped=False
) -> Spikes:
    """Takes the loss of one step into the average, unless it is a spike or dropped.

    A spike is more than `factor` times the average; what is not finite never enters.
    """
    good = jnp.isfinite(loss) & (ratio(spikes, loss, warmup=warmup) <= factor)
    good &= jnp.logical_not(dropped)
    # The plain mean until the weight of a new loss has come down to WEIGHT.
    weight = jnp.maximum(1 / (spikes.count + 1), WEIGHT)
    average = spikes.average + weight * (loss - spikes.average)
    return spikes._replace(
        average=jnp.where(good, average, spikes.average).astype(jnp.float32),
        count=spikes.count + good.astype(jnp.int32),
    )


def skipped(spikes: Spikes) -> list[int]:
    """The indices that are left out, ascending; waits for the device."""
    return [int(i) for i in np.asarray(spikes.skips) if i != _UNUSED]


def data_index(step: int, skips: Sequence[int] | np.ndarray) -> int:
    """The index of the stream that a step reads; skips are ascending.

    A later skip moves no earlier step, so the steps before a roll-back stay what they
    were.
    """
    for index in skips:
        if index > step:  # unused places too
            break
        step += 1
    return step


def batch(stream, step: int, skips: Sequence[int] | np.ndarray) -> dict:
    """What a step reads of a data.stream.Stream, with the resets of what is left out.

    What a left-out segment would have hidden stays hidden: in a row that has a reset
    in one of them, the next segment begins with one.
    """
    index = data_index(step, skips)
    found = stream.at(index)
    previous = data_index(step - 1, skips) if step else -1
    for left_out in range(previous + 1, index):
        found["resets_BT"][:, 0] |= stream.resets(left_out).any(axis=1)
    return found


def add(spikes: Spikes, *indices: int) -> Spikes:
    """Leaves out `indices` too; those that are left out already change nothing."""
    skips = sorted({*skipped(spikes), *indices})
    if len(skips) > MOST:
        raise UserError(
            f"the loss spikes at segment {indices[-1]} after {MOST} segments were left"
            " out: these are no spikes, the run diverges; lower"
            " config.optimizer.learning_rate or raise config.train.spike_factor"
        )
    filled = np.full(MOST, _UNUSED, np.int32)
    filled[: len(skips)] = skips
    # Where the restored one lies: the compiled step takes no other placement.
    sharding = getattr(spikes.skips, "sharding", None)
    return spikes._replace(skips=jax.device_put(filled, sharding))
