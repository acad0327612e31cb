"""Softmax cross-entropy whose logits exist only one vocabulary chunk at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

CHUNK_SIZE = 8192


def softmax_nll(
    h_ND: jax.Array,
    table_VD: jax.Array,
    bias_V: jax.Array,
    targets_N: jax.Array,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> jax.Array:
    """-log softmax(h @ table.T + bias)[target], in nats, in at least float32.

    The logits are computed chunk_size words at a time, once forward and once backward;
    the largest temporary is N x chunk_size. The table is cast to the dtype of h.
    """
    with jax.named_scope("softmax_nll"):
        return _nll(h_ND, table_VD, bias_V, targets_N, chunk_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll(h_ND, table_VD, bias_V, targets_N, chunk_size):
    return _forward(h_ND, table_VD, bias_V, targets_N, chunk_size)[0]


def _logits(h_ND, table_VD, bias_V):
    dtype = jnp.promote_types(h_ND.dtype, jnp.float32)
    logits_NV = jnp.einsum(
        "ND,VD->NV", h_ND, table_VD.astype(h_ND.dtype), preferred_element_type=dtype
    )
    return logits_NV + bias_V.astype(dtype)[None]


def _chunks(V, chunk_size):
    """Starts of the full chunks, and the size of what is left."""
    return jnp.arange(V // chunk_size) * chunk_size, V % chunk_size


def _forward(h_ND, table_VD, bias_V, targets_N, chunk_size):
    dtype = jnp.promote_types(h_ND.dtype, jnp.float32)

    def accumulate(carry, table_CD, bias_C):
        max_N, sum_N = carry
        logits_NC = _logits(h_ND, table_CD, bias_C)
        new_N = jnp.maximum(max_N, logits_NC.max(1))
        terms_NC = jnp.exp(logits_NC - new_N[:, None])
        return new_N, sum_N * jnp.exp(max_N - new_N) + terms_NC.sum(1)

    def body(carry, start):
        table_CD = lax.dynamic_slice_in_dim(table_VD, start, chunk_size)
        bias_C = lax.dynamic_slice_in_dim(bias_V, start, chunk_size)
        return accumulate(carry, table_CD, bias_C), None

    N, V = h_ND.shape[0], table_VD.shape[0]
    starts, rest = _chunks(V, chunk_size)
    carry = jnp.full(N, -jnp.inf, dtype), jnp.zeros(N, dtype)
    if starts.size:
        carry, _ = lax.scan(body, carry, starts)
    if rest:
        carry = accumulate(carry, table_VD[V - rest :], bias_V[V - rest :])
    lse_N = carry[0] + jnp.log(carry[1])
    rows_ND = table_VD[targets_N].astype(h_ND.dtype)
    target_N = jnp.einsum("ND,ND->N", h_ND, rows_ND, preferred_element_type=dtype)
    target_N += bias_V[targets_N].astype(dtype)
    return lse_N - target_N, (h_ND, table_VD, bias_V, targets_N, lse_N)


def _backward(chunk_size, saved, g_N):
    h_ND, table_VD, bias_V, targets_N, lse_N = saved
    dtype = lse_N.dtype

    def gradients(table_CD, bias_C):
        logits_NC = _logits(h_ND, table_CD, bias_C)
        p_NC = jnp.exp(logits_NC - lse_N[:, None]) * g_N[:, None]
        low_NC = p_NC.astype(h_ND.dtype)
        matmul = functools.partial(jnp.einsum, preferred_element_type=dtype)
        dh_ND = matmul("NC,CD->ND", low_NC, table_CD.astype(h_ND.dtype))
        dtable_CD = matmul("NC,ND->CD", low_NC, h_ND).astype(table_VD.dtype)
        return dh_ND, dtable_CD, p_NC.sum(0).astype(bias_V.dtype)

    def body(carry, start):
        dh_ND, dtable_VD, dbias_V = carry
        table_CD = lax.dynamic_slice_in_dim(table_VD, start, chunk_size)
        bias_C = lax.dynamic_slice_in_dim(bias_V, start, chunk_size)
        more_ND, dtable_CD, dbias_C = gradients(table_CD, bias_C)
        dtable_VD = lax.dynamic_update_slice_in_dim(dtable_VD, dtable_CD, start, 0)
        dbias_V = lax.dynamic_update_slice_in_dim(dbias_V, dbias_C, start, 0)
        return (dh_ND + more_ND, dtable_VD, dbias_V), None

    V = table_VD.shape[0]
    starts, rest = _chunks(V, chunk_size)
    if starts.size:
        carry = (jnp.zeros(h_ND.shape, dtype), *map(jnp.zeros_like, (table_VD, bias_V)))
        (dh_ND, dtable_VD, dbias_V), _ = lax.scan(body, carry, starts)
        if rest:
            more_ND, tail_CD, tail_C = gradients(
                table_VD[V - rest :], bias_V[V - rest :]
            )
            dh_ND += more_ND
            dtable_VD = dtable_VD.at[V - rest :].set(tail_CD)
            dbias_V = dbias_V.at[V - rest :].set(tail_C)
    else:
        dh_ND, dtable_VD, dbias_V = gradients(table_VD, bias_V)
    rows_ND = table_VD[targets_N].astype(dtype)
    dh_ND -= g_N[:, None] * rows_ND
    dtarget_ND = (g_N[:, None] * h_ND.astype(dtype)).astype(table_VD.dtype)
    dtable_VD = dtable_VD.at[targets_N].add(-dtarget_ND)
    dbias_V = dbias_V.at[targets_N].add(-g_N.astype(bias_V.dtype))
    return dh_ND.astype(h_ND.dtype), dtable_VD, dbias_V, None


_nll.defvjp(_forward, _backward)
