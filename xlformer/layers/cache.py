"""The memory as keys and values: what evaluation and generation carry.

Keys and values of the memory depend only on stored layer inputs and on parameters, the
rows of the positions on parameters alone. Projected once instead of in every segment,
a layer saves 4 D H K M / T + 2 D H K S / (T B) operations a token.

Two forms with the same interface: `Cache` for segments, `Ring` for single tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xlformer.kernels.relative_attention import relative_attention
from xlformer.layers import memory, positions


class Cache(NamedTuple):
    """Keys and values at the last M positions, oldest first.

    Attributes:
      keys_LBMHK, values_LBMHK: only the last length_B[b] slots of row b count.
      r_LSHK: position row of each distance, for the longest segment; None without.
      length_B: int32, how many slots are valid.
    """

    keys_LBMHK: Any
    values_LBMHK: Any
    r_LSHK: Any
    length_B: Any

    @property
    def longest(self) -> int | None:
        """The most inputs that a segment may have; None is any number."""
        if self.r_LSHK is None:
            return None
        return self.r_LSHK.shape[1] - self.keys_LBMHK.shape[2]

    def scanned(self):
        """(what is carried through the layers, what each layer gets its part of)."""
        return None, (self.keys_LBMHK, self.values_LBMHK, self.r_LSHK)

    def attend(self, carried, scanned, index, *, key_start_BT, end, rotary, **options):
        """For Attention: keeps the last M keys and values of [memory; x[:end]]."""
        del carried, index
        keys_BMHK, values_BMHK, r_SHK = scanned

        def attend(qu_BTHK, qw_BTHK, k_BTHK, v_BTHK):
            k_BSHK = jnp.concatenate([keys_BMHK, k_BTHK], axis=1)
            v_BSHK = jnp.concatenate([values_BMHK, v_BTHK], axis=1)
            if rotary:
                qu_BTHK, k_BSHK = positions.rotated(qu_BTHK, k_BSHK)
            y_BTHK = relative_attention(
                qu_BTHK,
                qw_BTHK,
                k_BSHK,
                v_BSHK,
                None if r_SHK is None else r_SHK[: k_BSHK.shape[1]],
                key_start_BT=key_start_BT,
                **options,
            )
            kept = (keys_BMHK, k_BTHK), (values_BMHK, v_BTHK)
            return y_BTHK, tuple(memory.append(*x, end) for x in kept)

        return attend

    def after(self, carried, scanned):
        """The cache that follows; the arguments are what the layers returned."""
        del carried
        return self._replace(keys_LBMHK=scanned[0], values_LBMHK=scanned[1])


class Ring(NamedTuple):
    """Keys and values at the last N = M + 1 positions, each written once, none moved.

    Attributes:
      keys_LBNHK, values_LBNHK: the slot after the newest one is written next.
      r_LCHK: position rows in the order of the slots, twice: with t[c] = r[(N-1-c) % N]
        the N rows from N-1-newest on are those of all slots. None without.
      length_B: int32, how many of the M positions before the next one are valid.
      newest: int32, the slot of the last token, the same in all rows.
    """

    keys_LBNHK: Any
    values_LBNHK: Any
    r_LCHK: Any
    length_B: Any
    newest: Any

    @property
    def longest(self) -> int:
        return 1

    def scanned(self):
        """As of Cache: all slots of all layers are carried, to be written in place."""
        return (self.keys_LBNHK, self.values_LBNHK), self.r_LCHK

    def attend(
        self,
        carried,
        scanned,
        index,
        *,
        key_start_BT,
        end,
        window,
        rotary,
        **options,
    ):
        """For Attention: writes one slot of this layer; keeps all slots of all."""
        del end, options
        N = self.keys_LBNHK.shape[2]
        slot = (self.newest + 1) % N
        distance_N = (slot - jnp.arange(N)) % N
        seen_B = N - 1 - key_start_BT[:, 0] if key_start_BT is not None else N - 1
        visible_BN = distance_N[None] <= jnp.reshape(seen_B, (-1, 1))
        if window is not None:
            visible_BN &= distance_N[None] <= window
        r_NHK = scanned
        if r_NHK is not None:
            r_NHK = lax.dynamic_slice_in_dim(scanned, N - 1 - slot, N)

        def attend(qu_BTHK, qw_BTHK, k_BTHK, v_BTHK):
            # Written first and read then, so that the compiler need not copy them.
            zero = jnp.zeros_like(slot)
            here = index.astype(slot.dtype), zero, slot, zero, zero
            kept = tuple(
                lax.dynamic_update_slice(old, new[None], here)
                for old, new in zip(carried, (k_BTHK, v_BTHK), strict=True)
            )
            k_BNHK, v_BNHK = (
                lax.dynamic_index_in_dim(x, index, 0, False) for x in kept
            )
            if rotary:
                k_BNHK = _turned_back(k_BNHK, distance_N)
            y_BTHK = _one_query(qu_BTHK, qw_BTHK, k_BNHK, v_BNHK, r_NHK, visible_BN)
            return y_BTHK, kept

        return attend

    def after(self, carried, scanned):
        del scanned
        newest = (self.newest + 1) % self.keys_LBNHK.shape[2]
        keys_LBNHK, values_LBNHK = carried
        return Ring(keys_LBNHK, values_LBNHK, self.r_LCHK, self.length_B, newest)


_SLOTS = ("layers", "batch", None, "heads", None)
_ROWS = ("layers", None, "heads", None)
AXES = Cache(_SLOTS, _SLOTS, _ROWS, ("batch",))
RING_AXES = Ring(_SLOTS, _SLOTS, _ROWS, ("batch",), ())


def ring(cache: Cache) -> Ring:
    """The same memory for single tokens; needs the rows of M + 1 distances."""
    keys_LBNHK, values_LBNHK = (
        jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0)))
        for x in (cache.keys_LBMHK, cache.values_LBMHK)
    )
    M, r_LCHK = cache.keys_LBMHK.shape[2], cache.r_LSHK
    if r_LCHK is not None:
        r_LCHK = jnp.tile(r_LCHK[:, : M + 1][:, ::-1], (1, 2, 1, 1))
    newest = jnp.asarray(M - 1, jnp.int32)
    return Ring(keys_LBNHK, values_LBNHK, r_LCHK, cache.length_B, newest)


def _turned_back(k_BNHK, distance_N):
    """Keys turned against a query at place 0."""
    N, K = k_BNHK.shape[1], k_BNHK.shape[-1]
    dtype = jnp.promote_types(k_BNHK.dtype, jnp.float32)
    return positions.rotate(
        k_BNHK, positions.sinusoid(-np.arange(N), K, dtype)[distance_N]
    )


def _one_query(qu_BTHK, qw_BTHK, k_BNHK, v_BNHK, r_NHK, visible_BN) -> jax.Array:
    """Attention of one query to slots in any order, r in theirs."""
    dtype = jnp.promote_types(qu_BTHK.dtype, jnp.float32)
    with jax.named_scope("one_query"):
        scores_BHTN = jnp.einsum(
            "BTHK,BNHK->BHTN", qu_BTHK, k_BNHK, preferred_element_type=dtype
        )
        if r_NHK is not None:
            scores_BHTN += jnp.einsum(
                "BTHK,NHK->BHTN", qw_BTHK, r_NHK, preferred_element_type=dtype
            )
        lowest = jnp.finfo(dtype).min
        scores_BHTN = jnp.where(visible_BN[:, None, None], scores_BHTN, lowest)
        p_BHTN = jax.nn.softmax(scores_BHTN).astype(v_BNHK.dtype)
        return jnp.einsum("BHTN,BNHK->BTHK", p_BHTN, v_BNHK)
