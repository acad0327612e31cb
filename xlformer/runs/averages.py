"""The mean of the parameters of several checkpoints: what `average:N` reads.

So the TensorFlow original made the weights that it released (its avg_checkpoints.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def mean(read: Callable[[int], Any], steps: Sequence[int]):
    """The mean of read(step) over these steps, where those trees lie.

    One is read after the other, so that no more than two of them are in memory: the sum
    and the next. The devices add them in their own dtype, or in float32 where that has
    fewer bits: the error is below N units of the last place, for N steps. The original
    adds in float64, which devices do not have. What is no float is that of the first
    step.
    """
    first, *others = steps
    found = read(first)
    if not others:
        return found
    dtypes = tuple(x.dtype for x in jax.tree.leaves(found))
    total = _widened(found)
    del found
    for step in others:
        total = _added(total, read(step))
    return _divided(total, len(steps), dtypes)


def _is_float(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


@jax.jit
def _widened(tree):
    def widened(x):
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if _is_float(x) else x

    return jax.tree.map(widened, tree)


# In the place of the sum so far.
@functools.partial(jax.jit, donate_argnums=0)
def _added(total, more):
    return jax.tree.map(
        lambda a, b: a + b.astype(a.dtype) if _is_float(a) else a, total, more
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _divided(total, count: int, dtypes: tuple):
    leaves, tree = jax.tree.flatten(total)
    return tree.unflatten(
        (x / count).astype(dtype) if _is_float(x) else x
        for x, dtype in zip(leaves, dtypes, strict=True)
    )
