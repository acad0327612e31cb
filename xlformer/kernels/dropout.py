"""Dropout whose units follow a key for each row of the batch.

With a key a row it does not matter on which device a row lies, nor in which group of
rows its gradient is computed: the same units are dropped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Keys(NamedTuple):
    """What a forward pass draws from.

    Attributes:
      shared: one key, for what all rows share (the sinusoids of the distances).
      rows_B: a key for each row.
    """

    shared: Any
    rows_B: Any


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries with probability `rate` and rescales; None switches it off.

    key: one key, or one for each row of x, [B].
    """
    if key is None or not rate:
        return x
    keep = bernoulli(key, 1 - rate, x.shape)
    # Rescaled in training, so that evaluation has nothing to do.
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def bernoulli(key: jax.Array, p: float, shape: tuple[int, ...]) -> jax.Array:
    """True with probability p; key as in `dropout`."""
    # Keys are jax.random.key arrays: one key has no dimension.
    if not key.ndim:
        return jax.random.bernoulli(key, p, shape)
    return jax.vmap(lambda one: jax.random.bernoulli(one, p, shape[1:]))(key)


def fold(key: jax.Array | None, data) -> jax.Array | None:
    """jax.random.fold_in of one key, or of each of [B]."""
    if key is None:
        return None
    if not key.ndim:
        return jax.random.fold_in(key, data)
    return jax.vmap(jax.random.fold_in, (0, None))(key, data)


# Attention probabilities --------------------------------------------------------------
#
# Each is kept or dropped by a hash of (row, head, query, key), so that a kernel makes
# the bits of a tile again where it needs them, and every implementation drops the same
# units. int32 and its wrap-around are all that a kernel of any platform has.


def seeds(key: jax.Array, B: int, H: int) -> jax.Array:
    """Two words for each row and head, [B, H, 2], int32; key as in `dropout`."""
    if key.ndim:
        bits = jax.vmap(lambda one: jax.random.bits(one, (H, 2), jnp.uint32))(key)
    else:
        bits = jax.random.bits(key, (B, H, 2), jnp.uint32)
    return lax.bitcast_convert_type(bits, jnp.int32)


def keep_pairs(seed_a, seed_b, queries, keys, rate: float):
    """True where the probability of (query, key) is kept.

    All are int32 and broadcast against each other; seed_a and seed_b are the words of
    `seeds`. The mixing steps are lowbias32 (C. Wellons, 2018), the second word
    in their middle.
    """
    x = _mix(queries ^ seed_a, 16, 0x7FEB352D) + keys
    x = _mix(_mix(x, 16, 0x7FEB352D) ^ seed_b, 15, 0x846CA68B)
    # 31 bits, because int32 compares with its sign.
    top = _shift(x ^ _shift(x, 16), 1)
    # A rate near 0 would round to 2^31, which int32 does not have.
    return top < np.int32(min(round((1 - rate) * 2**31), 2**31 - 1))


def _mix(x, shift, factor):
    # By way of uint32: 0x846CA68B is above 2^31, and numpy raises where an integer does
    # not fit its type.
    return (x ^ _shift(x, shift)) * np.uint32(factor).astype(np.int32)


def _shift(x, bits):
    # Not `>>`, which copies the sign of an int32 down; lax wants equal shapes.
    return lax.shift_right_logical(x, jnp.full_like(x, bits))
