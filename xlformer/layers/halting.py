"""Adaptive computation time (Graves 2016, arXiv:1603.08983), for each position.

Each step n brings a probability p_n of halting there. With h the sum of those before, a
position halts at the first step with h + p > 1 - epsilon. That step weighs the
remainder R = 1 - h, those before it weigh their p, those after it nothing, so that the
weights sum to 1. Gradients are those of tensor2tensor's program: into the probabilities
through weights and remainder, not into the decision.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from xlformer.kernels import watching

# How weighted states become an output: see `combine`. GLOBAL is CONVEX where all
# positions have one probability.
ACCUMULATE, CONVEX, GLOBAL = "accumulate", "convex", "global"


class Halting(NamedTuple):
    """What is known of each position after some steps.

    Attributes:
      halted_BT: bool, whether it takes no further step.
      sum_BT: its probabilities so far; 1 once it has halted.
      updates_BT: how many steps it took.
      remainder_BT: R of the step at which it halted, else 0.
    """

    halted_BT: Any
    sum_BT: Any
    updates_BT: Any
    remainder_BT: Any


def begin(shape, dtype) -> Halting:
    """Before the first step."""
    zeros_BT = jnp.zeros(shape, dtype)
    return Halting(jnp.zeros(shape, bool), zeros_BT, zeros_BT, zeros_BT)


def halt(state: Halting, p_BT: jax.Array, *, epsilon: float, last=False):
    """One step with probabilities p: (its weights_BT, the state after it).

    last: whether whatever still runs halts here, with the remainder as its weight.
      Without it a position that never halts has weights that sum to less than 1, and
      the remainder 0, as in tensor2tensor.
    """
    running_BT = ~state.halted_BT
    watching.tell(lambda: watching.Running(running_BT))
    stops_BT = running_BT & ((state.sum_BT + p_BT > 1 - epsilon) | last)
    rest_BT = 1 - state.sum_BT
    weights_BT = jnp.where(stops_BT, rest_BT, jnp.where(running_BT, p_BT, 0))
    return weights_BT, Halting(
        state.halted_BT | stops_BT,
        # Not the sum, which could round to a little less than 1.
        jnp.where(stops_BT, 1, state.sum_BT + weights_BT),
        state.updates_BT + running_BT,
        jnp.where(stops_BT, rest_BT, state.remainder_BT),
    )


def combine(y_BTD: jax.Array, state_BTD: jax.Array, weights_BT, mode: str):
    """The output so far, with one more state in it; it begins as zeros.

    accumulate: the sum of w s, which is Graves' and tensor2tensor's 'accumulated'.
    convex, global: w s + (1 - w) y, as the paper's listing and tensor2tensor's 'basic'
      and 'global'. A later weight takes from all before it, so that what a state has in
      the end is w times the product of later (1 - w), and the sum 1 - prod(1 - w).
    """
    w_BT1 = weights_BT[..., None].astype(state_BTD.dtype)
    kept_BTD = y_BTD if mode == ACCUMULATE else (1 - w_BT1) * y_BTD
    return w_BT1 * state_BTD + kept_BTD


def global_probability(p_BT: jax.Array, start_BT: jax.Array | None = None):
    """The mean of p over what each position sees: from its start on, to the end.

    It looks ahead, so it is for models that do. start_BT: the first position that each
    one sees; None is all.
    """
    T = p_BT.shape[1]
    if start_BT is None:
        return jnp.broadcast_to(p_BT.mean(1, keepdims=True), p_BT.shape)
    from_BT = lax.cumsum(p_BT, axis=1, reverse=True)
    sums_BT = jnp.take_along_axis(from_BT, start_BT, axis=1)
    return sums_BT / (T - start_BT).astype(p_BT.dtype)
