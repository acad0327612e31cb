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

from xlformer.kernels.features import Features, wide

CHUNK_SIZE = 128
# The logarithm of a key that is not there; -inf minus itself would be NaN.
_NO_KEY = -1e30
# Query 0 of a row without a reset sees the carried sums, which come before key 0.
_CARRIED = -1


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
        jnp.full((B, H), _NO_KEY, dtype),
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
      over the rows of the projection, w . x spreads by more than 69 (690) for the query
      and for the key of the largest logarithm as well; with the largest of 256 rows
      at |w . x| = 3 |x| that takes norms of 11 (110).
    """

    def factors(q, k):
        return features.factors(q, projection_MK)[1], *features.factors(
            k, projection_MK
        )

    return _attend(
        factors, q_BTHK, k_BTHK, v_BTHV, sums, start_BT, valid_BT, causal, chunk
    )


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
) -> tuple[jax.Array, Sums | None]:
    """linear_attention of features that are there already.

    The factors of queries and keys; the keys' logarithms (None for 0). The queries'
    would cancel.
    """

    def factors(q, k):
        return q, *k

    k = (k_log_BTH, k_BTHM)
    return _attend(factors, q_BTHM, k, v_BTHV, sums, start_BT, valid_BT, causal, chunk)


def _attend(factors, q, k, v_BTHV, sums, start_BT, valid_BT, causal, chunk):
    B, T, H, V = v_BTHV.shape
    shapes = jax.eval_shape(factors, q, k)
    q_f, k_log, _ = shapes
    M, dtype = q_f.shape[-1], wide(jnp.promote_types(q_f.dtype, v_BTHV.dtype))
    if sums is None:
        sums = empty(B, H, M, V, dtype)
    elif not causal:
        raise ValueError("sums are carried by causal attention only")
    sums = Sums(*lax.stop_gradient(jax.tree.map(lambda x: x.astype(dtype), sums)))
    start_BT = jnp.full((B, T), _CARRIED) if start_BT is None else start_BT
    start_BT = jnp.broadcast_to(start_BT, (B, T)).astype(jnp.int32)
    if valid_BT is None:
        valid_BT = jnp.ones((B, T), bool)
    # A reset in the padding is not there.
    start_BT = lax.cummax(jnp.where(valid_BT, start_BT, _CARRIED), axis=1)
    inputs = (q, k, v_BTHV, start_BT, valid_BT)
    if not causal:
        return _bidirectional(factors, dtype, *inputs), None
    return _causal(factors, dtype, sums, inputs, chunk or CHUNK_SIZE)


def _causal(factors, dtype, sums, inputs, C):
    """Chunk by chunk; `inputs` are arrays [B, T, ...] or trees of them."""
    B, T, H, V = inputs[2].shape
    N = -(-T // C)
    if N == 1:
        C = T

    def split(x):
        """[B, T, ...] -> [N, B, C, ...]; the last position again as padding."""
        x = jnp.pad(x, [(0, 0), (0, N * C - T), *[(0, 0)] * (x.ndim - 2)], mode="edge")
        return jnp.moveaxis(x.reshape(B, N, C, *x.shape[2:]), 1, 0)

    finite = [jnp.isfinite(x).reshape(B, H, -1).all(-1) for x in sums[:2]]
    last_bad_BH = jnp.where(finite[0] & finite[1], _CARRIED - 1, _CARRIED)
    sums = Sums(*[jnp.where(jnp.isfinite(x), x, 0) for x in sums])
    carry = sums, last_bad_BH

    def one(carry, chunk):
        return _chunk(factors, dtype, carry, *chunk)

    if N == 1:
        (sums, last_bad_BH), y_BTHV = one(carry, (0, *inputs))
    else:
        *chunks, valid_NBC = jax.tree.map(split, inputs)
        there_NC = (jnp.arange(N * C) < T).reshape(N, C)
        chunks = (*chunks, valid_NBC & there_NC[:, None])
        firsts_N = jnp.arange(N, dtype=jnp.int32) * C
        (sums, last_bad_BH), y = lax.scan(
            jax.checkpoint(one), carry, (firsts_N, *chunks)
        )
        y_BTHV = jnp.moveaxis(y, 0, 1).reshape(B, N * C, H, V)[:, :T]
    spoilt_BH = last_bad_BH >= inputs[3][:, -1:]
    spoilt = spoilt_BH[..., None]
    sums = Sums(
        jnp.where(spoilt[..., None], jnp.nan, sums.values_BHMV),
        jnp.where(spoilt, jnp.nan, sums.keys_BHM),
        sums.scale_BH,
    )
    return y_BTHV, Sums(*lax.stop_gradient(sums))


def _clean(x_BCHK, keep_BCH):
    return jnp.where(keep_BCH[..., None], x_BCHK, 0)


def _is_finite(x, shape):
    """Which vectors of a tree of arrays [B, C, H, ...] are finite, [B, C, H]."""
    flat = [jnp.isfinite(x).reshape(*shape, -1).all(-1) for x in jax.tree.leaves(x)]
    return jnp.stack(flat).all(0)


def _prepared(factors, dtype, q, k, v_BCHV, valid_BC):
    """Features and values with zeros for padding and for what is not finite.

    Returns: the queries' factor, the keys' logarithm (or None) and factor, values; the
    queries and the keys that are not finite.
    """
    shape = v_BCHV.shape[:3]
    valid_BCH = jnp.broadcast_to(valid_BC[..., None], shape)
    q_ok = _is_finite(q, shape)
    k_ok = _is_finite((k, v_BCHV), shape)

    def clean(tree, ok):
        return jax.tree.map(
            lambda x: jnp.where(ok.reshape(*shape, *[1] * (x.ndim - 3)), x, 0), tree
        )

    q_f, k_log, k_f = factors(clean(q, q_ok), clean(k, k_ok))
    q_f = _clean(q_f, valid_BCH & q_ok)
    k_f = _clean(k_f, valid_BCH & k_ok)
    if k_log is not None:
        k_log = jnp.where(valid_BCH & k_ok, k_log.astype(dtype), _NO_KEY)
    v = _clean(v_BCHV, valid_BCH & k_ok)
    return q_f, k_log, k_f, v, valid_BCH & ~q_ok, valid_BCH & ~k_ok


def _chunk(factors, dtype, carry, first, q, k, v_BCHV, start_BC, valid_BC):
    """One chunk of queries and their keys, after the sums of all keys before it."""
    (S_BHMV, z_BHM, scale_BH), last_bad_BH = carry
    C = v_BCHV.shape[1]
    q_f, k_log, k_f, v, q_bad, k_bad = _prepared(factors, dtype, q, k, v_BCHV, valid_BC)
    position_C = first + jnp.arange(C, dtype=jnp.int32)
    # sees_BHts: query t sees key s; carried_BHt: it sees the sums.
    sees_Bts = position_C[None, None] >= start_BC[..., None]
    sees_Bts &= jnp.tril(jnp.ones((C, C), bool))[None]
    sees_BHts = sees_Bts[:, None]
    carried_BHt = (start_BC < first)[:, None]

    weights_BHts = _product("BtHM,BsHM->BHts", q_f, k_f)
    if k_log is not None:
        log_BHs = jnp.moveaxis(k_log, 1, 2)
        # The largest logarithm among the keys that each query sees.
        most_BHt = jnp.where(sees_BHts, log_BHs[:, :, None], _NO_KEY).max(-1)
        before_BHt = jnp.where(carried_BHt, scale_BH[..., None], _NO_KEY)
        most_BHt = lax.stop_gradient(jnp.maximum(most_BHt, before_BHt))
        # Where a query does not see the key this may be positive.
        relative = log_BHs[:, :, None] - most_BHt[..., None]
        relative = jnp.where(sees_BHts, relative, _NO_KEY)
        weights_BHts *= jnp.exp(relative)
        decay_BHt = jnp.exp(before_BHt - most_BHt)
        scale_BH = most_BHt[..., -1]
        k_weight = jnp.exp(relative[:, :, -1])
    else:
        decay_BHt = jnp.ones((), dtype)
        scale_BH, k_weight = jnp.zeros_like(scale_BH), jnp.ones((), dtype)
    weights_BHts = jnp.where(sees_BHts, weights_BHts, 0).astype(v.dtype)
    decay_BHt = jnp.where(carried_BHt, decay_BHt, 0)

    sums = _product("BHts,BsHV->BtHV", weights_BHts, v)
    norm_BHt = weights_BHts.sum(-1, dtype=dtype)
    past = _product("BtHM,BHMV->BtHV", q_f, S_BHMV.astype(q_f.dtype))
    sums += jnp.moveaxis(decay_BHt, 2, 1)[..., None] * past
    norm_BHt += decay_BHt * _product("BtHM,BHM->BHt", q_f, z_BHM.astype(q_f.dtype))
    y_BtHV = _divide(sums, jnp.moveaxis(norm_BHt, 2, 1)[..., None], v_BCHV.dtype)

    # The sums after the chunk hold what its last query sees.
    k_weight = jnp.where(sees_BHts[:, :, -1], k_weight, 0)
    k_f = (k_f * jnp.moveaxis(k_weight, 2, 1)[..., None]).astype(k_f.dtype)
    S_BHMV = decay_BHt[..., -1, None, None] * S_BHMV
    S_BHMV += _product("BsHM,BsHV->BHMV", k_f, v)
    z_BHM = decay_BHt[..., -1, None] * z_BHM + k_f.sum(1, dtype=dtype)

    position_BCH = jnp.broadcast_to(position_C[None, :, None], k_bad.shape)
    bad_BCH = jnp.where(k_bad, position_BCH, _CARRIED - 1)
    bad_BCH = jnp.maximum(lax.cummax(bad_BCH, axis=1), last_bad_BH[:, None])
    spoilt_BCH = q_bad | (bad_BCH >= start_BC[..., None])
    y_BtHV = jnp.where((spoilt_BCH & valid_BC[..., None])[..., None], jnp.nan, y_BtHV)
    return (Sums(S_BHMV, z_BHM, scale_BH), bad_BCH[:, -1]), y_BtHV


def _bidirectional(factors, dtype, q, k, v_BTHV, start_BT, valid_BT):
    """Every query sees every key from the row's start on."""
    T = v_BTHV.shape[1]
    visible_BT = valid_BT & (jnp.arange(T, dtype=jnp.int32)[None] >= start_BT[:, -1:])
    q_f, k_log, k_f, v, q_bad, k_bad = _prepared(factors, dtype, q, k, v_BTHV, valid_BT)
    k_f = jnp.where(visible_BT[..., None, None], k_f, 0)
    if k_log is not None:
        k_log = jnp.where(visible_BT[..., None], k_log, _NO_KEY)
        most = lax.stop_gradient(k_log.max(1, keepdims=True))
        k_f = (k_f * jnp.exp(k_log - most)[..., None]).astype(k_f.dtype)
    S_BHMV = _product("BsHM,BsHV->BHMV", k_f, v)
    z_BHM = k_f.sum(1, dtype=dtype)
    sums = _product("BtHM,BHMV->BtHV", q_f, S_BHMV.astype(q_f.dtype))
    norm = _product("BtHM,BHM->BtH", q_f, z_BHM.astype(q_f.dtype))[..., None]
    y_BTHV = _divide(sums, norm, v_BTHV.dtype)
    spoilt = q_bad | (k_bad & visible_BT[..., None]).any(1, keepdims=True)
    return jnp.where((spoilt & valid_BT[..., None])[..., None], jnp.nan, y_BTHV)


def _divide(sums, norm, dtype):
    """sums / norm, and 0 where the norm has vanished; see linear_attention."""
    least = 1e-300 if norm.dtype == jnp.float64 else 1e-30
    there = jnp.abs(norm) > least
    return jnp.where(there, sums / jnp.where(there, norm, 1), 0).astype(dtype)


def _product(spec, *arrays):
    return jnp.einsum(spec, *arrays, preferred_element_type=wide(arrays[0].dtype))
