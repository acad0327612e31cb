"""The memory as keys and values: what evaluation and generation carry.

Keys and values of the memory depend only on stored layer inputs and on parameters, the
rows of the positions on parameters alone. Projected once instead of in every segment,
a layer saves 4 D H K M / T + 2 D H K S / (T B) operations a token. Where H K = D it
takes twice the bytes of the plain memory. With T 80 and M 640 scoring was 1.4 times as
fast with it (6 layers of d_model 256, 2 CPU cores, 2026-11-22: docs/performance.md).

Two forms with the same interface: `Cache` for segments, `Ring` for single tokens.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xlformer.kernels.relative_attention import visible_attention
from xlformer.layers import memory, positions


class Cache(NamedTuple):
    """Keys and values at the last M positions, oldest first.

    Attributes:
      keys_LBHMK, values_LBHMK: only the last length_B[b] slots of row b count. Heads
        in front, as the products want them: no segment turns them round again.
      r_LSHK: position row of each distance, for the longest segment; None without.
      length_B: int32, how many slots are valid.
    """

    keys_LBHMK: Any
    values_LBHMK: Any
    r_LSHK: Any
    length_B: Any

    @property
    def longest(self) -> int | None:
        """The most inputs that a segment may have; None is any number."""
        # There is one row of r for each distance, M + T of them: it was projected for
        # the longest segment once, and a longer one would read beyond its end.
        if self.r_LSHK is None:
            return None
        return self.r_LSHK.shape[1] - self.keys_LBHMK.shape[3]

    def scanned(self):
        """(what goes from layer to layer, what each layer gets its own part of)."""
        return None, (self.keys_LBHMK, self.values_LBHMK, self.r_LSHK)

    def attend(self, carried, scanned, index, *, visibility, end, rotary, **options):
        """What Attention calls in place of the operation: see its `attend`.

        It keeps (None, the last M keys and values of [memory; x[:end]]).
        """
        del carried, index
        keys_BHMK, values_BHMK, r_SHK = scanned

        def attend(qu_BTHK, qw_BTHK, k_BTHK, v_BTHK):
            T = k_BTHK.shape[1]
            k_BHTK, v_BHTK = (jnp.swapaxes(x, 1, 2) for x in (k_BTHK, v_BTHK))
            k_BHSK = jnp.concatenate([keys_BHMK, k_BHTK], axis=2)
            v_BHSK = jnp.concatenate([values_BHMK, v_BHTK], axis=2)
            # What a query does not see may be NaN: see memory.py. A key that is made of
            # what is not finite is so throughout, so the first of its numbers tells. It
            # is asked of each head, because another may lie on another device.
            bad_BHS = ~jnp.isfinite(k_BHSK[..., 0])
            k_BHSK, v_BHSK = (
                jnp.where(bad_BHS[..., None], 0, x) for x in (k_BHSK, v_BHSK)
            )
            k_BSHK, v_BSHK = (jnp.swapaxes(x, 1, 2) for x in (k_BHSK, v_BHSK))
            # Keys are cached before they are turned, because their place in [memory;
            # segment] changes with every segment.
            if rotary:
                qu_BTHK, k_BSHK = positions.rotated(qu_BTHK, k_BSHK)
            y_BTHK = visible_attention(
                qu_BTHK,
                qw_BTHK,
                k_BSHK,
                v_BSHK,
                None if r_SHK is None else r_SHK[: k_BSHK.shape[1]],
                visibility,
                **options,
            )
            sees = functools.partial(visibility.sees, T=T)
            seen_BTH = jax.vmap(sees, 1, 2)(bad_BHS)
            y_BTHK = jnp.where(seen_BTH[..., None], jnp.nan, y_BTHK)
            kept = (keys_BHMK, k_BHTK), (values_BHMK, v_BHTK)
            kept = tuple(memory.append(*x, end, axis=2) for x in kept)
            return y_BTHK, (None, kept)

        return attend

    def after(self, carried, scanned):
        """The cache after the segment, of what the layers have kept."""
        del carried
        return self._replace(keys_LBHMK=scanned[0], values_LBHMK=scanned[1])


class Ring(NamedTuple):
    """Keys and values at the last N = M + 1 positions, each written once, none moved.

    Attributes:
      keys_LBHNK, values_LBHNK: the slot after the newest one is written next.
      r_LCHK: position rows in the order of the slots, twice: with t[c] = r[(N-1-c) % N]
        the N rows from N-1-newest on are those of all slots. None without.
      length_B: int32, how many of the M positions before the next one are valid.
      newest: int32, the slot of the last token, the same in all rows.
    """

    keys_LBHNK: Any
    values_LBHNK: Any
    r_LCHK: Any
    length_B: Any
    newest: Any

    @property
    def longest(self) -> int:
        return 1

    def scanned(self):
        """What goes from layer to layer, and what each layer gets its own part of.

        All slots of all layers go from layer to layer: so each layer can write one slot
        in place, and nothing is stacked again.
        """
        return (self.keys_LBHNK, self.values_LBHNK), self.r_LCHK

    def attend(
        self,
        carried,
        scanned,
        index,
        *,
        visibility,
        end,
        rotary,
        **options,
    ):
        """What Attention calls, as in Cache: it writes one slot, and keeps them all."""
        # A single token always enters the memory, and one query needs no kernel.
        del end, options
        N = self.keys_LBHNK.shape[3]
        slot = (self.newest + 1) % N
        distance_N = (slot - jnp.arange(N)) % N
        # In [memory; token] the token is the last of N keys, its own.
        visible_BN = visibility.allows(
            0, N - 1 - distance_N[None], M=N - 1, start=visibility.key_start_BT
        )
        r_NHK = scanned
        # The table holds all distances twice, so that wherever the ring stands the rows
        # of its slots are contiguous: one slice instead of a gather.
        if r_NHK is not None:
            r_NHK = lax.dynamic_slice_in_dim(scanned, N - 1 - slot, N)

        def attend(qu_BTHK, qw_BTHK, k_BTHK, v_BTHK):
            # Written first and read then, so that the compiler need not copy them.
            zero = jnp.zeros_like(slot)
            here = index.astype(slot.dtype), zero, zero, slot, zero
            kept = tuple(
                lax.dynamic_update_slice(old, jnp.swapaxes(new, 1, 2)[None], here)
                for old, new in zip(carried, (k_BTHK, v_BTHK), strict=True)
            )
            k_BHNK, v_BHNK = (
                lax.dynamic_index_in_dim(x, index, 0, False) for x in kept
            )
            if rotary:
                k_BHNK = _turned_back(k_BHNK, distance_N)
            y_BTHK = _one_query(qu_BTHK, qw_BTHK, k_BHNK, v_BHNK, r_NHK, visible_BN)
            return y_BTHK, (kept, None)

        return attend

    def after(self, carried, scanned):
        del scanned
        newest = (self.newest + 1) % self.keys_LBHNK.shape[3]
        keys_LBHNK, values_LBHNK = carried
        return Ring(keys_LBHNK, values_LBHNK, self.r_LCHK, self.length_B, newest)


_SLOTS = ("layers", "batch", "heads", None, None)
_ROWS = ("layers", None, "heads", None)
CACHE_AXES = Cache(_SLOTS, _SLOTS, _ROWS, ("batch",))
RING_AXES = Ring(_SLOTS, _SLOTS, _ROWS, ("batch",), ())


def ring(cache: Cache) -> Ring:
    """Turns a cache into a ring of the same memory, for single tokens.

    Where there are position rows, the cache must have those of M + 1 distances.
    """
    keys_LBHNK, values_LBHNK = (
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 1), (0, 0)))
        for x in (cache.keys_LBHMK, cache.values_LBHMK)
    )
    M, r_LCHK = cache.keys_LBHMK.shape[3], cache.r_LSHK
    if r_LCHK is not None:
        r_LCHK = jnp.tile(r_LCHK[:, : M + 1][:, ::-1], (1, 2, 1, 1))
    # The oldest slot is 0 and the free one is the last: it is written next.
    newest = jnp.asarray(M - 1, jnp.int32)
    return Ring(keys_LBHNK, values_LBHNK, r_LCHK, cache.length_B, newest)


def _turned_back(k_BHNK, distance_N):
    """Keys turned back by their distance, for a query that is not turned at all.

    Then keys can stay where they are as they grow older.
    """
    N, K = k_BHNK.shape[2:]
    dtype = jnp.promote_types(k_BHNK.dtype, jnp.float32)
    table_NK = positions.sinusoid(-np.arange(N), K, dtype)[distance_N]
    k_BNHK = jnp.swapaxes(k_BHNK, 1, 2)
    return jnp.swapaxes(positions.rotate(k_BNHK, table_NK[None]), 1, 2)


def _one_query(qu_BTHK, qw_BTHK, k_BHNK, v_BHNK, r_NHK, visible_BN) -> jax.Array:
    """Attention of one query to slots in any order; r_NHK is in the same order."""
    # Scores and softmax in at least float32, as in the kernels.
    dtype = jnp.promote_types(qu_BTHK.dtype, jnp.float32)
    with jax.named_scope("one_query"):
        scores_BHTN = jnp.einsum(
            "BTHK,BHNK->BHTN", qu_BTHK, k_BHNK, preferred_element_type=dtype
        )
        if r_NHK is not None:
            scores_BHTN += jnp.einsum(
                "BTHK,NHK->BHTN", qw_BTHK, r_NHK, preferred_element_type=dtype
            )
        lowest = jnp.finfo(dtype).min
        scores_BHTN = jnp.where(visible_BN[:, None, None], scores_BHTN, lowest)
        p_BHTN = jax.nn.softmax(scores_BHTN).astype(v_BHNK.dtype)
        return jnp.einsum("BHTN,BHNK->BTHK", p_BHTN, v_BHNK)
