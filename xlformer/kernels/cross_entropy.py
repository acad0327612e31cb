"""Softmax cross-entropy whose logits exist only one vocabulary chunk at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Whole logits of WikiText-103 (9,000 tokens, 267,735 words) would be 9.6 GB in float32.
# At N = 512, D = 128, V = 32,768, forward and backward on 2 CPU cores, chunks of the
# vocabulary take half the time of whole logits (222 ms) and 11 MiB instead of 128;
# chunks of tokens, recomputed in the backward pass, 0.74 of the time and 32 MiB.
CHUNK_SIZE = 4096  # words: at V = 267,735 the temporaries are 3 % of the logits
# Selected tokens at a time. For all tails of an adaptive softmax on all tokens there
# would be 219 MFLOP a token; on the tokens that need them it is about 27 (WikiText-103
# base, where 14 % of the tokens are assumed to be in the tails).
TOKENS = 256


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


def selected_nll(
    h_ND: jax.Array,
    table_VD: jax.Array,
    bias_V: jax.Array,
    targets_N: jax.Array,
    selected_N: jax.Array,
    *,
    chunk_size: int = CHUNK_SIZE,
    tokens: int = TOKENS,
) -> jax.Array:
    """softmax_nll of the selected tokens, and 0 of the others, which cost nothing.

    Selected tokens are moved together and taken `tokens` at a time, in a loop that ends
    with the last of them: exact for any number of them. Reverse differentiation of such
    a loop is not JAX's, so the backward pass runs it again, from the saved normalisers.
    """
    with jax.named_scope("selected_nll"):
        # An exported program leaves open how many tokens there are.
        if isinstance(N := h_ND.shape[0], int):
            tokens = min(tokens, N)
        return _selected(
            h_ND, table_VD, bias_V, targets_N, selected_N, chunk_size, tokens
        )


# All tokens ---------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll(h_ND, table_VD, bias_V, targets_N, chunk_size):
    return _forward(h_ND, table_VD, bias_V, targets_N, chunk_size)[0]


def _save(h_ND, table_VD, bias_V, targets_N, chunk_size):
    nll_N, *norms = _forward(h_ND, table_VD, bias_V, targets_N, chunk_size)
    return nll_N, (h_ND, table_VD, bias_V, targets_N, *norms)


def _backward(chunk_size, saved, g_N):
    sums = _zero_gradients(*saved[:3])
    dh_ND, *sums = _gradients(*saved, g_N, sums, chunk_size)
    return *_as(saved[:3], (dh_ND, *sums)), None


_nll.defvjp(_save, _backward)


def _exact(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _logits(h_ND, table_VD, bias_V):
    dtype = _exact(h_ND.dtype)
    logits_NV = jnp.einsum(
        "ND,VD->NV", h_ND, table_VD.astype(h_ND.dtype), preferred_element_type=dtype
    )
    return logits_NV + bias_V.astype(dtype)[None]


def _over_chunks(chunk_size, V, body, carry):
    """body(carry, start, size) over the vocabulary: the full chunks, then the rest."""
    full = V // chunk_size
    if full:
        starts = jnp.arange(full) * chunk_size
        carry, _ = lax.scan(lambda c, s: (body(c, s, chunk_size), None), carry, starts)
    # The rest is a call of its own: to fill the last chunk would copy the whole table.
    return body(carry, full * chunk_size, V % chunk_size) if V % chunk_size else carry


def _forward(h_ND, table_VD, bias_V, targets_N, chunk_size):
    """Returns nll_N, the largest logit, and log of sum of exp(logits - the largest).

    The last two are not added up: the sum of logits around 40 has lost 2e-6, a fifth of
    1 - p where p is 0.99999.
    """
    dtype = _exact(h_ND.dtype)

    # The largest logit so far and the sum relative to it, both corrected as larger ones
    # come: one pass (Milakov and Gimelshein 2018, arXiv:1805.02867).
    def accumulate(carry, start, size):
        max_N, sum_N = carry
        table_CD = lax.dynamic_slice_in_dim(table_VD, start, size)
        bias_C = lax.dynamic_slice_in_dim(bias_V, start, size)
        logits_NC = _logits(h_ND, table_CD, bias_C)
        new_N = jnp.maximum(max_N, logits_NC.max(1))
        terms_NC = jnp.exp(logits_NC - new_N[:, None])
        return new_N, sum_N * jnp.exp(max_N - new_N) + terms_NC.sum(1)

    N, V = h_ND.shape[0], table_VD.shape[0]
    # exp(-inf - x) is 0, so the first chunk needs no case of its own.
    carry = jnp.full(N, -jnp.inf, dtype), jnp.zeros(N, dtype)
    max_N, sum_N = _over_chunks(chunk_size, V, accumulate, carry)
    log_N = jnp.log(sum_N)
    # The target's logit from its own row: to look for it in each chunk would be a
    # gather more for every one.
    rows_ND = table_VD[targets_N].astype(h_ND.dtype)
    target_N = jnp.einsum("ND,ND->N", h_ND, rows_ND, preferred_element_type=dtype)
    target_N += bias_V[targets_N].astype(dtype)
    return log_N + (max_N - target_N), max_N, log_N


def _gradients(h_ND, table_VD, bias_V, targets_N, max_N, log_N, g_N, sums, chunk_size):
    """Returns dh_ND, and `sums` with the gradients of the table and the bias added."""
    dtype = log_N.dtype
    matmul = functools.partial(jnp.einsum, preferred_element_type=dtype)

    def accumulate(carry, start, size):
        dh_ND, dtable_VD, dbias_V = carry
        table_CD = lax.dynamic_slice_in_dim(table_VD, start, size).astype(h_ND.dtype)
        bias_C = lax.dynamic_slice_in_dim(bias_V, start, size)
        # Made again and not saved: saved they would be the whole logits.
        logits_NC = _logits(h_ND, table_CD, bias_C)
        p_NC = jnp.exp((logits_NC - max_N[:, None]) - log_N[:, None])
        # Rounded after the subtraction: bfloat16 has no number between 0.996 and 1, so
        # of well predicted tokens nothing would be left.
        hit_NC = targets_N[:, None] == start + jnp.arange(size)[None]
        d_NC = (p_NC - hit_NC) * g_N[:, None]
        low_NC = d_NC.astype(h_ND.dtype)
        dh_ND += matmul("NC,CD->ND", low_NC, table_CD)
        dtable_VD = _add(dtable_VD, matmul("NC,ND->CD", low_NC, h_ND), start)
        # The bias's gradient needs no product: d is summed before it is rounded.
        return dh_ND, dtable_VD, _add(dbias_V, d_NC.sum(0), start)

    carry = jnp.zeros(h_ND.shape, dtype), *sums
    return _over_chunks(chunk_size, table_VD.shape[0], accumulate, carry)


def _add(sum_V, more_C, start):
    old_C = lax.dynamic_slice_in_dim(sum_V, start, more_C.shape[0])
    return lax.dynamic_update_slice_in_dim(sum_V, old_C + more_C, start, 0)


def _zero_gradients(h_ND, table_VD, bias_V):
    dtype = _exact(h_ND.dtype)
    return jnp.zeros(table_VD.shape, dtype), jnp.zeros(bias_V.shape, dtype)


def _as(primals, gradients):
    return [g.astype(x.dtype) for x, g in zip(primals, gradients, strict=True)]


# Selected tokens ----------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _selected(h_ND, table_VD, bias_V, targets_N, selected_N, chunk_size, tokens):
    return _save_selected(
        h_ND, table_VD, bias_V, targets_N, selected_N, chunk_size, tokens
    )[0]


def _over_selected(selected_N, tokens, body, carry):
    """body(carry, index_C) with the indices of `tokens` selected tokens at a time.

    After the last one the indices are N, which reads fill values and writes nothing.
    """
    N = selected_N.shape[0]
    # Filled up to whole groups: dynamic_slice moves a slice back that runs over the
    # end, and would take some tokens twice.
    more = -N % tokens if isinstance(N, int) else tokens
    (order_N,) = jnp.nonzero(selected_N, size=N + more, fill_value=N)

    def step(i, carry):
        return body(carry, lax.dynamic_slice_in_dim(order_N, i * tokens, tokens))

    return lax.fori_loop(0, -(-selected_N.sum() // tokens), step, carry)


def _take(x, index_C, fill=0):
    return jnp.asarray(x).at[index_C].get(mode="fill", fill_value=fill)


def _save_selected(h_ND, table_VD, bias_V, targets_N, selected_N, chunk_size, tokens):
    def body(carry, index_C):
        some = _take(h_ND, index_C), table_VD, bias_V, _take(targets_N, index_C)
        found = _forward(*some, chunk_size)
        return [
            x_N.at[index_C].set(x_C, mode="drop")
            for x_N, x_C in zip(carry, found, strict=True)
        ]

    zeros_N = jnp.zeros(h_ND.shape[:1], _exact(h_ND.dtype))
    nll_N, *norms = _over_selected(selected_N, tokens, body, [zeros_N] * 3)
    return nll_N, (h_ND, table_VD, bias_V, targets_N, *norms, selected_N)


def _backward_selected(chunk_size, tokens, saved, g_N):
    h_ND, table_VD, bias_V, targets_N, max_N, log_N, selected_N = saved

    def body(carry, index_C):
        dh_ND, *sums = carry
        h_CD, targets_C, log_C, g_C = (
            _take(x, index_C) for x in (h_ND, targets_N, log_N, g_N)
        )
        # Of what is filled in p is 0: over another normaliser exp(bias) may overflow.
        max_C = _take(max_N, index_C, jnp.inf)
        some = h_CD, table_VD, bias_V, targets_C, max_C, log_C, g_C
        dh_CD, *sums = _gradients(*some, sums, chunk_size)
        return [dh_ND.at[index_C].set(dh_CD, mode="drop"), *sums]

    zeros_ND = jnp.zeros(h_ND.shape, _exact(h_ND.dtype))
    carry = [zeros_ND, *_zero_gradients(h_ND, table_VD, bias_V)]
    gradients = _over_selected(selected_N, tokens, body, carry)
    return *_as(saved[:3], gradients), None, None


_selected.defvjp(_save_selected, _backward_selected)
