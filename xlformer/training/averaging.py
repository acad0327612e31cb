"""Averages of iterates: NT-ASGD's, and that of a run's tail.

NT-ASGD is plain SGD until validations get no better, then the average of its iterates.

Merity, Keskar & Socher (2018), algorithm 1, as AWD-LSTM's program has it: a validation
switches if its loss exceeds the least of all but the last n before it. From then on
torch.optim.ASGD with t0=0 and lambd=0 goes on from the parameters, of which two things
are no paper's: the average leaves out the first iterate after the switch (after step t
it is the mean of iterates 2 to t, after step 1 it is iterate 1), and a rate takes
effect one step late (the first step has its own).

The tail's average is the mean of the parameters after each of the last steps, a share
of the run (Jain et al. 2018, JMLR 18:223): each counts the same, what came before not
at all.

The average itself is TrainState.ema, which are the parameters until it begins: so what
is validated, read and sampled is the average wherever there is one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Averaging(NamedTuple):
    """What NT-ASGD remembers; lives in the TrainState.

    Attributes:
      losses_N: of the last n validations, the newest last.
      least: of the validations before those; infinite where there are none.
      triggered: whether the parameters are averaged.
      count: steps since.
      rate: learning rate that the next of them uses.
    """

    losses_N: jax.Array
    least: jax.Array
    triggered: jax.Array
    count: jax.Array
    rate: jax.Array


def init(nonmonotone: int, dtype=jnp.float32) -> Averaging:
    """Before the first step; nonmonotone is n."""
    return Averaging(
        losses_N=jnp.full((nonmonotone,), jnp.inf, dtype),
        least=jnp.array(jnp.inf, dtype),
        triggered=jnp.array(False),
        count=jnp.zeros((), jnp.int32),
        rate=jnp.zeros((), dtype),
    )


def validated(averaging: Averaging, loss) -> Averaging:
    """After a validation with this loss; one that is no number switches nothing."""
    losses_N = averaging.losses_N
    loss = jnp.asarray(loss, losses_N.dtype)
    return averaging._replace(
        losses_N=jnp.concatenate([losses_N[1:], loss[None]]),
        # fmin, because a loss that is no number is not less than any.
        least=jnp.fmin(averaging.least, losses_N[0]),
        triggered=averaging.triggered | (loss > averaging.least),
    )


def forgotten(averaging: Averaging) -> Averaging:
    """Without its losses, where those that follow are measured in another way."""
    fresh = init(averaging.losses_N.shape[0], averaging.losses_N.dtype)
    return averaging._replace(losses_N=fresh.losses_N, least=fresh.least)


def rate(averaging: Averaging, scheduled) -> jax.Array:
    """The learning rate of the next step, where the schedule says `scheduled`."""
    late = averaging.triggered & (averaging.count > 0)
    return jnp.where(late, averaging.rate, scheduled)


def weight(averaging: Averaging) -> jax.Array:
    """Of the next iterate in the average: 1 until the switch, then 1, 1, 1/2, 1/3."""
    count = jnp.maximum(averaging.count, 1).astype(averaging.rate.dtype)
    return jnp.where(averaging.triggered, 1 / count, 1)


def stepped(averaging: Averaging, scheduled) -> Averaging:
    """After a step for which the schedule said `scheduled`."""
    return averaging._replace(
        count=averaging.count + averaging.triggered.astype(jnp.int32),
        rate=jnp.asarray(scheduled, averaging.rate.dtype),
    )


# The tail of a run -------------------------------------------------------------------


class Tail(NamedTuple):
    """What is known of the average over a run's tail; lives in the TrainState.

    Attributes:
      count: steps whose parameters are in it.
      start: after how many steps it begins. A run that is told to begin it elsewhere,
        because its share or the steps of the run have changed, begins it anew.
    """

    count: jax.Array
    start: jax.Array


def tail_start(train) -> int:
    """After how many steps the average begins; train: the section of a config.

    At least the last step is in it.
    """
    return train.steps - max(1, round(train.tail_average * train.steps))


def tail_init(train) -> Tail:
    """Before the first step."""
    return Tail(jnp.zeros((), jnp.int32), jnp.int32(tail_start(train)))


def tail_stepped(tail: Tail, step, start: int) -> Tail:
    """After a step before which `step` were taken."""
    count = jnp.where(tail.start == start, tail.count, 0)
    return Tail(
        jnp.where(step >= start, count + 1, 0).astype(jnp.int32), jnp.int32(start)
    )


def tail_weight(tail: Tail) -> jax.Array:
    """Of the newest parameters in the mean; 1 where there is none yet."""
    return 1 / jnp.maximum(tail.count, 1).astype(float)
