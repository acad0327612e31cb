"""Attention in linear time through feature maps (Katharopoulos et al. 2020; FAVOR+).

    y_t = phi(q_t)^T S_t / phi(q_t)^T z_t
    S_t = sum_s phi(k_s) v_s^T,  z_t = sum_s phi(k_s)

over the keys s that query t sees. With phi(x) = exp(log) f the query's logarithm
cancels, and the keys' count relative to the largest that the query sees, so that
nothing overflows and no later key changes an earlier output, not by one bit.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from xlformer.kernels import linear_blocks as blocks
from xlformer.kernels.features import Features
from xlformer.kernels.products import wide
from xlformer.kernels.relative_attention import platform

CHUNK_SIZE = 128
# On 2 CPU cores 64 takes 0.87 to 0.9 of the time of 128 (8 heads of 64, 256 features,
# T = 4,096, forward and backward), whose larger products a matrix unit wants.
CPU_CHUNK_SIZE = 64
# How many features of queries there are at a time: on a CPU what its cache holds; on a
# TPU what leaves room in its vector memory for all that is made of them (of 2^25 the
# compiler for v5e moves half as many bytes again through HBM); a GPU would rather have
# few large kernels.
BLOCK_SIZE = {"cpu": 1 << 21, "tpu": 1 << 22, "gpu": 1 << 25}
# The sums before each of a block's n chunks are a product of n x n: at 16 a fortieth of
# what the chunk costs otherwise (K = V = 64, 256 features).
MOST_CHUNKS = 16


class Sums(NamedTuple):
    """The sums over all keys so far, divided by exp(scale); float32 at least.

    Attributes:
      values_BHMV, keys_BHM: S and z of the module's docstring.
      scale_BH: the largest logarithm of those keys.
    """

    values_BHMV: jax.Array
    keys_BHM: jax.Array
    scale_BH: jax.Array


def empty(B: int, H: int, M: int, V: int, dtype=jnp.float32) -> Sums:
    """The sums over no keys."""
    dtype = wide(dtype)
    return Sums(
        jnp.zeros((B, H, M, V), dtype),
        jnp.zeros((B, H, M), dtype),
        jnp.full((B, H), blocks.NO_KEY, dtype),
    )


def linear_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    features: Features,
    projection_MK: jax.Array | None,
    *,
    sums: Sums | None = None,
    start_BT: jax.Array | None = None,
    valid_BT: jax.Array | None = None,
    causal: bool = True,
    chunk: int = 0,
) -> tuple[jax.Array, Sums | None]:
    """Attends with the kernel of `features`; for the softmax ones that is exp(q . k).

    Args:
      q_BTHK, k_BTHK: queries and keys; for a softmax kernel each divided by K^(1/4).
      v_BTHV: values; V may differ from K.
      features, projection_MK: see Features; the projection is a constant.
      sums: those of the keys before this segment, constants; None for none.
      start_BT: the first key that each query sees, an index into the segment, or -1: it
        sees what `sums` holds as well. It is that of the last reset: it never
        decreases in t, and is t where it has changed. [B, 1] where causal is False.
      valid_BT: False on the right of a row for padding, which attends to nothing, is
        seen by nobody and enters no sums.
      causal: whether queries see no later keys.
      chunk: keys that are attended to in one product; 0 chooses. It changes rounding.

    Returns:
      y_BTHV in the dtype of v, and the sums after the segment (None if not causal). A
      query gives 0 where its denominator, relative to the largest key that it sees, is
      less than 1e-30 (float64: 1e-300): it sees no key, or its features and those of
      all its keys hardly meet. A softmax map's denominators reach this only where,
      over the rows of the projection, w . x spreads by more than 63 (680) for the query
      and for the key of the largest logarithm as well; with the largest of 256 rows
      at |w . x| = 3 |x| that takes norms of 10 (110).
    """

    dtype = jnp.result_type(q_BTHK, k_BTHK, v_BTHV)
    q, k, v = (x.astype(dtype) for x in (q_BTHK, k_BTHK, v_BTHV))

    def key_map(k):
        return features.factors(k, projection_MK)

    def query_map(q):
        return key_map(q)[1]

    maps = blocks.Maps(query_map, key_map, overflows=features.map.overflows)
    y, sums = _attend(maps, q, (k,), v, sums, start_BT, valid_BT, causal, chunk)
    return y.astype(v_BTHV.dtype), sums


def from_features(
    q_BTHM: jax.Array,
    k_log_BTH: jax.Array | None,
    k_BTHM: jax.Array,
    v_BTHV: jax.Array,
    *,
    sums: Sums | None = None,
    start_BT: jax.Array | None = None,
    valid_BT: jax.Array | None = None,
    causal: bool = True,
    chunk: int = 0,
    normalise: bool = True,
) -> tuple[jax.Array, Sums | None]:
    """linear_attention of features that are there already.

    The factors of queries and keys; the keys' logarithms (None for 0). The queries'
    would cancel. With normalise=False nothing is divided, y = phi(q)^T S: only for keys
    without logarithms.
    """
    if not normalise and k_log_BTH is not None:
        raise ValueError("what is not divided must have no logarithms")

    dtype = jnp.result_type(q_BTHM, k_BTHM, v_BTHV)
    q, k, v = (x.astype(dtype) for x in (q_BTHM, k_BTHM, v_BTHV))
    k = (k,) if k_log_BTH is None else (k_log_BTH, k)

    def key_map(*k):
        return k if len(k) == 2 else (None, *k)

    maps = blocks.Maps(lambda q: q, key_map, normalise)
    y, sums = _attend(maps, q, k, v, sums, start_BT, valid_BT, causal, chunk)
    return y.astype(v_BTHV.dtype), sums


def _attend(maps, q, k, v_BTHV, sums, start_BT, valid_BT, causal, chunk):
    B, T, H, V = v_BTHV.shape
    M, dtype = jax.eval_shape(maps.query, q).shape[-1], wide(v_BTHV.dtype)
    if sums is None:
        sums = empty(B, H, M, V, dtype)
    elif not causal:
        raise ValueError("sums are carried by causal attention only")
    if start_BT is None:
        start_BT = jnp.full((B, T), blocks.CARRIED)
    start_BT = jnp.broadcast_to(start_BT, (B, T)).astype(jnp.int32)
    if valid_BT is None:
        valid_BT = jnp.ones((B, T), bool)
    # A reset in the padding is not there.
    start_BT = lax.cummax(jnp.where(valid_BT, start_BT, blocks.CARRIED), axis=1)
    C = min(chunk or (CPU_CHUNK_SIZE if platform() == "cpu" else CHUNK_SIZE), T)
    # An exported program leaves open how many rows it will have: then as for one.
    rows = B if isinstance(B, int) else 1
    n = _chunks_at_once(
        -(-T // C), BLOCK_SIZE.get(platform(), BLOCK_SIZE["gpu"]) // (rows * H * M * C)
    )
    inputs = blocks.Inputs(q, k, v_BTHV, start_BT, valid_BT)
    carry = _to_carry(sums, dtype)
    with jax.named_scope("linear_attention"):
        if not causal:
            return blocks.bidirectional(maps, carry, inputs, n * C), None
        y_BTHV, carry = blocks.causal(maps, carry, inputs, n, C)
    return y_BTHV, _to_sums(carry, start_BT[:, -1])


def _chunks_at_once(N: int, most: int) -> int:
    """Of N chunks; blocks have about the same number, and none more than `most`."""
    blocks = -(-N // max(1, min(most, MOST_CHUNKS)))
    return -(-N // blocks)


def _to_carry(sums: Sums, dtype) -> blocks.Carry:
    values_BHMV, keys_BHM, scale_BH = (lax.stop_gradient(x.astype(dtype)) for x in sums)
    sums_BHUM = jnp.concatenate([values_BHMV.swapaxes(2, 3), keys_BHM[:, :, None]], 2)
    bad_BH = ~(jnp.isfinite(sums_BHUM).all((2, 3)) & jnp.isfinite(scale_BH))
    sums_BHUM = jnp.where(bad_BH[..., None, None], 0, sums_BHUM)
    scale_BH = jnp.where(bad_BH, blocks.NO_KEY, scale_BH)
    last_bad_BH = jnp.where(bad_BH, blocks.CARRIED, blocks.CARRIED - 1)
    return blocks.Carry(sums_BHUM, scale_BH, last_bad_BH)


def _to_sums(carry: blocks.Carry, start_B) -> Sums:
    sums_BHUM = lax.stop_gradient(carry.sums)
    spoilt_BH = carry.last_bad >= start_B[:, None]
    sums_BHUM = jnp.where(spoilt_BH[..., None, None], jnp.nan, sums_BHUM)
    return Sums(sums_BHUM[:, :, :-1].swapaxes(2, 3), sums_BHUM[:, :, -1], carry.scale)
