"""Dropout whose units follow a key for each row of the batch.

With a key a row it does not matter on which device a row lies, nor in which group of
rows its gradient is computed: the same units are dropped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


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
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def bernoulli(key: jax.Array, p: float, shape: tuple[int, ...]) -> jax.Array:
    """True with probability p; key as in `dropout`."""
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
