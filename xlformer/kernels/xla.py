"""Relative attention in plain XLA: the relative shift as one slice of a flat array."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from xlformer.kernels.dropout import keep_pairs


def attention(
    qu_BTHK,
    qw_BTHK,
    k_BSHK,
    v_BSHK,
    r_SHK,
    visibility,
    *,
    dropout_rate,
    seeds_BH2,
    memory_length=None,
    first_query=0,
    first_key=0,
):
    """See kernels.relative_attention; every score is materialised, [B, H, T, S].

    Part of a call is also done here: the queries from first_query on over the keys from
    first_key on, of a call with memory_length slots of memory. The distances of r are
    those of the part: they end where its last query meets its first key.
    """
    T, S = qu_BTHK.shape[1], k_BSHK.shape[1]
    M = S - T if memory_length is None else memory_length
    queries, keys = np.arange(T) + first_query, np.arange(S) + first_key
    scores_BHTS = scores(qu_BTHK, qw_BTHK, k_BSHK, r_SHK)
    with jax.named_scope("softmax"):
        mask = visibility.mask(queries, keys, M)
        # Added, not selected: the mask is one for all heads and layers, and the
        # gradient need not look at it. Finite, so that a fully masked row makes no NaN.
        scores_BHTS += jnp.where(mask, 0, jnp.finfo(scores_BHTS.dtype).min)
        # The softmax does not depend on what is subtracted, so its gradient is none.
        max_BHT1 = jax.lax.stop_gradient(scores_BHTS.max(-1, keepdims=True))
        p_BHTS = jnp.exp(scores_BHTS - max_BHT1)
        # Before dropout, which in the original comes after the softmax: the sum is that
        # of all probabilities.
        sum_BHT1 = p_BHTS.sum(-1, keepdims=True)
        if dropout_rate:
            keep = keep_pairs(
                seeds_BH2[..., 0, None, None],
                seeds_BH2[..., 1, None, None],
                jnp.asarray(queries, jnp.int32)[None, None, :, None],
                jnp.asarray(keys, jnp.int32)[None, None, None],
                dropout_rate,
            )
            p_BHTS = jnp.where(keep, p_BHTS / (1 - dropout_rate), 0)
    with jax.named_scope("values"):
        v_BHSK = jnp.swapaxes(v_BSHK, 1, 2)
        # In the inputs' dtype: matrix units are several times slower in float32.
        y_BHTK = jnp.einsum("BHTS,BHSK->BHTK", p_BHTS.astype(v_BHSK.dtype), v_BHSK)
        # Divided here and not before: K numbers a query, not S.
        return jnp.swapaxes(y_BHTK / sum_BHT1, 1, 2).astype(v_BHSK.dtype)


def scores(qu_BTHK, qw_BTHK, k_BSHK, r_SHK) -> jax.Array:
    """The scores of all pairs, in at least float32, before any is hidden."""
    # Scores and softmax are in float32 whatever the inputs are: bfloat16 keeps 8 bits,
    # an error of up to 0.06 in a score of 16, and the exponential passes it on.
    dtype = jnp.promote_types(qu_BTHK.dtype, jnp.float32)
    # Heads in front: products of contiguous matrices, not of rows to be gathered. With
    # what else is said here, scoring as a whole is twice as fast on the CPU as in the
    # textbook's order (docs/performance.md: `plain` against `naive`).
    qu_BHTK, k_BHSK = (jnp.swapaxes(x, 1, 2) for x in (qu_BTHK, k_BSHK))
    with jax.named_scope("scores"):
        scores_BHTS = _products(qu_BHTK, k_BHSK, dtype)
        if r_SHK is not None:
            S = k_BSHK.shape[1]
            scores_BHTS += _position_scores(qw_BTHK, r_SHK, S, dtype)
    return scores_BHTS


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _products(a, b, dtype):
    """a b^T of each pair of matrices."""
    return jnp.einsum("...TK,...SK->...TS", a, b, preferred_element_type=dtype)


def _save(a, b, dtype):
    return _products(a, b, dtype), (a, b)


def _backward(dtype, saved, d):
    # Autodiff would multiply in d's dtype, float32, whatever that of a and b: matrix
    # units of a TPU or GPU are several times slower there than in bfloat16. And to make
    # b's gradient it would turn d, the largest array, instead of the gradient: on a CPU
    # 9 % of attention's time (8 rows, 8 heads of 32, T = M = 128, forward and backward)
    # and 1.4 % of a training step's.
    a, b = saved
    d = d.astype(a.dtype)
    multiply = functools.partial(jnp.einsum, preferred_element_type=dtype)
    da, db = multiply("...TS,...SK->...TK", d, b), multiply("...TK,...TS->...KS", a, d)
    return da.astype(a.dtype), jnp.swapaxes(db, -1, -2).astype(b.dtype)


_products.defvjp(_save, _backward)


def _position_scores(qw_BTHK, r_SHK, S, dtype):
    # Columns in descending distance, the largest first. Causal attention has no rows
    # for the negative distances; one junk row stands for them, which the mask hides. (A
    # single query has none either, and the shift needs the column.)
    r_WHK = r_SHK[::-1]
    if r_SHK.shape[0] == S:
        r_WHK = jnp.pad(r_WHK, ((0, 1), (0, 0), (0, 0)))
    # One product a head for all rows of the batch.
    B, T, H, K = qw_BTHK.shape
    qw_HNK = qw_BTHK.transpose(2, 0, 1, 3).reshape(H, B * T, K)
    raw_HNW = _products(qw_HNK, r_WHK.transpose(1, 0, 2), dtype)
    raw_BHTW = jnp.swapaxes(raw_HNW.reshape(H, B, T, -1), 0, 1)
    return relative_shift(raw_BHTW, S)


def relative_shift(raw_BHTW: jax.Array, S: int) -> jax.Array:
    """Moves entry (t, c), of distance S-1-c, to its key s: c = T-1-t+s.

    For T = 2, S = 3 and one junk column x (distances in the table):

        2 1 0 x        1 0 x'       x' = the next row's first entry: masked
        2 1 0 x   ->   2 1 0

    In the flat array of rows of width W that entry lies at t*W + T-1-t+s, which is
    T-1 + t*(W-1) + s: one slice seen with rows of width W-1. The original pads,
    reshapes and slices instead (Dai et al. 2019, appendix B): 24 % more bytes on TPU.
    """
    *batch, T, W = raw_BHTW.shape
    flat = raw_BHTW.reshape(*batch, T * W)
    # Split and not sliced: the gradient of a slice is a `pad`, which looks at every
    # index and so costs a fifth of attention's time on a CPU (8 rows and heads, T = M =
    # 128, forward and backward). That of a split sets zeros beside what there is.
    _, flat, _ = jax.lax.split(flat, (T - 1, T * (W - 1), 1), axis=-1)
    return flat.reshape(*batch, T, W - 1)[..., :S]
