"""What tests see of halting: given probabilities, and each token of a model."""

import jax.numpy as jnp

from xlformer.layers import halting


def run(p_NBT, states_NBTD, mode, *, epsilon, force=False):
    """All steps of given probabilities and states: (y_BTD, weights_NBT, Halting).

    force: whether the last step halts whatever still runs.
    """
    N = p_NBT.shape[0]
    found = halting.begin(p_NBT.shape[1:], p_NBT.dtype)
    y_BTD, weights = jnp.zeros_like(states_NBTD[0]), []
    for n in range(N):
        p_BT = p_NBT[n]
        if mode == halting.GLOBAL:
            p_BT = halting.global_probability(p_BT)
        last = force and n == N - 1
        w_BT, found = halting.halt(found, p_BT, epsilon=epsilon, last=last)
        y_BTD = halting.combine(y_BTD, states_NBTD[n], w_BT, mode)
        weights.append(w_BT)
    return y_BTD, jnp.stack(weights), found


def effective_weights(weights_NBT, mode):
    """How much of each step's state is in the output of `combine`, [N, B, T]."""
    if mode == halting.ACCUMULATE:
        return weights_NBT
    kept_NBT = jnp.flip(jnp.cumprod(jnp.flip(1 - weights_NBT, 0), 0), 0)
    later_NBT = jnp.concatenate([kept_NBT[1:], jnp.ones_like(kept_NBT[:1])])
    return weights_NBT * later_NBT


def of_tokens(model, params, x_BTD, state, lengths=None):
    """How many steps each token took, and its remainder: (updates_BT, rest_BT)."""
    trunk = model.trunk_module(x_BTD.dtype)
    params = {"params": params.get("trunk", params)}
    options = {"lengths": lengths, "method": "forward"}
    *_, found = trunk.apply(params, x_BTD, state, **options)
    return found.updates_BT, found.remainder_BT
