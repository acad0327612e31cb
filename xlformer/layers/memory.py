"""Transformer-XL's memory: slots of a fixed number, the newest last, some valid.

Slots that are not valid are masked, so a cold memory equals no memory exactly. The
PyTorch original begins without slots, which static shapes do not allow. The TensorFlow
original and Hugging Face attend to zeros instead (`attend_zero_memory`): their keys
score through the positions, and draw weight from what is there.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Memory(NamedTuple):
    """The input of each layer at the last M positions, oldest first.

    Attributes:
      hidden_LBMD: cached layer inputs; only the last length_B[b] slots of row b count.
      length_B: int32, how many slots are valid.
    """

    hidden_LBMD: Any
    length_B: Any


# Logical axes of the state: see Model.state_axes.
STATE_AXES = Memory(("layers", "batch", "memory", "embed"), ("batch",))


def expand_resets(resets_BT: jax.Array | None, T: int) -> jax.Array | None:
    """Pads [B, 1], a reset before the segment, to [B, T]; None stays None."""
    if resets_BT is None or resets_BT.shape[1] == T:
        return resets_BT
    if resets_BT.shape[1] != 1:
        raise ValueError(
            f"resets_BT has {resets_BT.shape[1]} columns, expected {T} or 1"
        )
    return jnp.pad(resets_BT, ((0, 0), (0, T - 1)))


def key_start(length_B: jax.Array, resets_BT: jax.Array | None, *, M: int, T: int):
    """First visible key of each query, [B, T], counted in [memory; segment].

    Without a reset that is the oldest valid slot, afterwards the last reset token. It
    never decreases from one query to the next, which Visibility relies on.
    """
    start_BT = jnp.broadcast_to(M - length_B[:, None], (length_B.shape[0], T))
    if resets_BT is None:
        return start_BT
    positions_BT = jnp.broadcast_to(M + jnp.arange(T)[None], resets_BT.shape)
    return jnp.maximum(
        start_BT, lax.cummax(jnp.where(resets_BT, positions_BT, 0), axis=1)
    )


def append(memory: jax.Array, x: jax.Array, end, *, axis: int = 1) -> jax.Array:
    """The last M of [memory; x[:end]] along `axis`, of arrays [B, ...].

    Args:
      memory: the old memory.
      x: what comes after it.
      end: how many positions of x count: an int, a traced scalar, or one a row, [B].
      axis: that of the positions, after that of the batch.
    """
    M, take = memory.shape[axis], functools.partial(lax.slice_in_dim, axis=axis)
    x = x.astype(memory.dtype)
    # Where `end` is known at compile time nothing is copied in vain: a segment at least
    # as long as the memory replaces it, and the old memory is not even read.
    if isinstance(end, int):
        if end >= M:
            return take(x, end - M, end)
        return jnp.concatenate([take(memory, end, None), take(x, 0, end)], axis)
    # M + end positions of [memory; x] count, and the last M of them begin at `end`.
    both = jnp.concatenate([memory, x], axis)
    if end.ndim == 0:
        return lax.dynamic_slice_in_dim(both, end, M, axis)
    return jax.vmap(lambda x, start: lax.dynamic_slice_in_dim(x, start, M, axis - 1))(
        both, end
    )


def next_length(length_B, resets_BT, end, *, M: int) -> jax.Array:
    """How many slots are valid after `end` more positions.

    After a reset only what has come since counts.
    """
    length_B = length_B + end
    if resets_BT is not None:
        # A reset beyond `end` lies in padding, or in the extended context of the next
        # segment, which brings it again: it does not count here.
        T = resets_BT.shape[1]
        end_B = jnp.broadcast_to(jnp.asarray(end), length_B.shape)
        index_BT = jnp.broadcast_to(jnp.arange(T)[None], resets_BT.shape)
        counts_BT = resets_BT & (index_BT < end_B[:, None])
        last_B = jnp.where(counts_BT, index_BT, -1).max(axis=1)
        length_B = jnp.where(last_B >= 0, end_B - last_B, length_B)
    return jnp.minimum(length_B, M).astype(jnp.int32)


# Masks hide a value by giving it the weight 0, but 0 * NaN is NaN: even after a reset
# an overflow in an earlier text would spoil the row for ever. So what is not finite is
# taken out before attention, and put back where it is seen (Visibility.sees).


def valid_slots(state: Memory) -> Memory:
    """The memory with zeros in the slots that do not count."""
    M = state.hidden_LBMD.shape[2]
    valid_BM = jnp.arange(M)[None] >= M - state.length_B[:, None]
    hidden_LBMD = jnp.where(valid_BM[None, ..., None], state.hidden_LBMD, 0)
    return state._replace(hidden_LBMD=hidden_LBMD)


def finite(x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The vectors with zeros in place of those that are not finite, and where, [B, S].

    One number that is not finite spoils all that a query makes of its vector.
    """
    bad_BS = ~jnp.isfinite(x_BSD).all(axis=-1)
    return jnp.where(bad_BS[..., None], 0, x_BSD), bad_BS


def turned(x_BT, turn_B):
    """Each row turned round to the right by so many positions."""
    return jax.vmap(lambda x, turn: jnp.roll(x, turn, axis=0))(x_BT, turn_B)
