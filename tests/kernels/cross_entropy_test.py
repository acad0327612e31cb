"""The chunked cross-entropy against log_softmax, and what it never allocates."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from xlformer.kernels.cross_entropy import selected_nll, softmax_nll

N, D, V = 7, 5, 13
ARGUMENTS = ("h_ND", "table_VD", "bias_V")


def _arrays(dtype, V=V, spread=1.0):
    random = np.random.default_rng(0)
    h_ND, table_VD = random.normal(size=(N, D)), random.normal(size=(V, D))
    bias_V = spread * random.normal(size=V)
    targets_N = random.integers(V, size=N)
    targets_N[:2] = 0, V - 1
    return [jnp.asarray(x, dtype) for x in (h_ND, table_VD, bias_V)], targets_N


def _plain(h_ND, table_VD, bias_V, targets_N):
    log_p_NV = jax.nn.log_softmax(h_ND @ table_VD.T + bias_V[None])
    return -jnp.take_along_axis(log_p_NV, targets_N[:, None], axis=1)[:, 0]


def _value_and_grad(function, targets_N, weights_N):
    def loss(arrays):
        nll_N = function(*arrays, targets_N)
        return (nll_N * weights_N).sum(), nll_N

    return jax.value_and_grad(loss, has_aux=True)


def _check(dtype, chunk_size, tolerance, spread=1.0):
    arrays, targets_N = _arrays(dtype, spread=spread)
    weights_N = jnp.asarray(np.random.default_rng(1).normal(size=N), dtype)
    chunked = functools.partial(softmax_nll, chunk_size=chunk_size)
    (_, nll_N), grads = jit(_value_and_grad(chunked, targets_N, weights_N))(arrays)
    (_, expected_N), expected = _value_and_grad(_plain, targets_N, weights_N)(arrays)
    assert nll_N.dtype == dtype
    close = functools.partial(
        np.testing.assert_allclose, rtol=tolerance, atol=tolerance
    )
    close(nll_N, expected_N)
    for name, actual, array in zip(ARGUMENTS, grads, expected, strict=True):
        close(actual, array, err_msg=name)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, V, V + 4])
def test_values_and_gradients_in_float32(chunk_size):
    _check(jnp.float32, chunk_size, 1e-5)


@pytest.mark.parametrize("chunk_size", [3, V])
def test_values_and_gradients_in_float64(chunk_size):
    with jax.enable_x64(True):
        _check(jnp.float64, chunk_size, 1e-12)


def test_the_maximum_may_move_by_many_nats_between_chunks():
    _check(jnp.float32, 3, 1e-5, spread=100.0)


@pytest.mark.parametrize("chunk_size", [3, V])
def test_bfloat16_accumulates_in_float32(chunk_size):
    (h_ND, table_VD, _), targets_N = _arrays(jnp.bfloat16)
    bias_V = jnp.zeros(V, jnp.float32)
    arrays, weights_N = (h_ND, table_VD.astype(jnp.float32), bias_V), jnp.ones(N)
    chunked = functools.partial(softmax_nll, chunk_size=chunk_size)
    (_, nll_N), grads = jit(_value_and_grad(chunked, targets_N, weights_N))(arrays)
    exact = tuple(x.astype(jnp.float32) for x in arrays)
    (_, expected_N), expected = _value_and_grad(_plain, targets_N, weights_N)(exact)
    assert nll_N.dtype == jnp.float32
    # Products of bfloat16 numbers are exact in float32; only the gradients are rounded.
    np.testing.assert_allclose(nll_N, expected_N, atol=1e-5)
    for actual, array, given in zip(grads, expected, arrays, strict=True):
        assert actual.dtype == given.dtype
        np.testing.assert_allclose(actual.astype(jnp.float32), array, atol=0.03)


@pytest.mark.parametrize("chunk_size", [5, V])
@pytest.mark.parametrize("form", ["all", "selected"])
def test_what_bfloat16_predicts_well_keeps_its_gradient(form, chunk_size):
    """p - 1 is rounded, not p: near 1 bfloat16 has only 1 - 1/256.

    Nor is it made of the normaliser's own rounding, which grows with the logits.
    """
    (h_ND, table_VD, _), targets_N = _arrays(jnp.bfloat16)
    h_ND, targets_N = 0.1 * h_ND, jnp.full(N, targets_N[3])
    weights_N = jnp.exp(jnp.linspace(-3, 3, N))
    selected_N = jnp.arange(N) % 3 > 0 if form == "selected" else jnp.full(N, True)

    @jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def grad(h_ND, table_VD, bias_V):
        arrays = h_ND, table_VD, bias_V, targets_N
        if form == "all":
            return (weights_N * softmax_nll(*arrays, chunk_size=chunk_size)).sum()
        options = {"tokens": 3, "chunk_size": chunk_size}
        return (weights_N * selected_nll(*arrays, selected_N, **options)).sum()

    # The arrays are exact in bfloat16: only products and gradients are rounded.
    table_VD = table_VD.astype(jnp.float32)
    exact = [np.asarray(x, np.float64) for x in (h_ND, table_VD)]
    for bias in (5.0, 8.0, 11.0):  # p from 0.9 to 0.9999
        for shift in (0.0, 200.0):
            bias_V = jnp.full(V, shift).at[targets_N[0]].add(bias)
            expected = _by_hand(*exact, bias_V, targets_N, weights_N * selected_N)
            pairs = zip(grad(h_ND, table_VD, bias_V), expected, strict=True)
            for name, (x, y) in zip(ARGUMENTS, pairs, strict=True):
                error = np.linalg.norm(np.asarray(x, np.float64) - y)
                assert error < 0.01 * np.linalg.norm(y), (name, bias, shift)


def _by_hand(h_ND, table_VD, bias_V, targets_N, weights_N):
    """Gradients of the weighted sum, in float64."""
    bias_V, weights_N = (np.asarray(x, np.float64) for x in (bias_V, weights_N))
    p_NV = np.exp(h_ND @ table_VD.T + (bias_V - bias_V.max()))
    p_NV /= p_NV.sum(axis=1, keepdims=True)
    d_NV = (p_NV - (np.arange(V) == np.asarray(targets_N)[:, None])) * weights_N[
        :, None
    ]
    return d_NV @ table_VD, d_NV.T @ h_ND, d_NV.sum(axis=0)


def _largest(text):
    shapes = re.findall(r"\w+\[([\d,]+)\]", text)
    return max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)


def test_no_array_of_tokens_by_vocabulary():
    words, chunk_size = 101, 11
    arrays, targets_N = _arrays(jnp.float32, words)

    def programs(chunk_size):
        chunked = functools.partial(softmax_nll, chunk_size=chunk_size)
        function = _value_and_grad(chunked, targets_N, jnp.ones(N))
        yield str(jax.make_jaxpr(function)(arrays))
        yield jit(function).lower(arrays).compile().as_text()

    for program in programs(chunk_size):
        assert _largest(program) == words * D  # the table and its gradient
    for program in programs(words):
        assert _largest(program) == words * N


def test_the_default_chunk_is_smaller_than_a_word_vocabulary():
    words = 30011
    arrays, targets_N = _arrays(jnp.float32, words)
    function = _value_and_grad(softmax_nll, targets_N, jnp.ones(N))
    assert _largest(str(jax.make_jaxpr(function)(arrays))) == words * D < words * N


# Selected tokens ----------------------------------------------------------------------

SELECTIONS = {
    "none": [],
    "all": range(N),
    "one": [4],
    "a chunk": [0, 2, 6],
    "a chunk and one": [1, 2, 3, 5],
}


def _check_selected(dtype, selected, tolerance, *, tokens=3, chunk_size=5):
    """Against all tokens, masked; what is not selected may be anything."""
    (h_ND, table_VD, bias_V), targets_N = _arrays(dtype)
    bias_V = bias_V.astype(table_VD.dtype)
    selected_N = np.isin(np.arange(N), list(selected))
    weights_N = jnp.asarray(np.random.default_rng(1).normal(size=N))
    weights_N = weights_N.astype(jnp.promote_types(dtype, jnp.float32))
    chunked = functools.partial(
        selected_nll, selected_N=selected_N, tokens=tokens, chunk_size=chunk_size
    )

    def masked(*arguments):
        nll_N = softmax_nll(*arguments, chunk_size=chunk_size)
        return jnp.where(selected_N, nll_N, 0)

    arrays = h_ND, table_VD, bias_V
    (_, nll_N), grads = jit(_value_and_grad(chunked, targets_N, weights_N))(arrays)
    wanted = _value_and_grad(masked, targets_N, weights_N)
    (_, expected_N), expected = jit(wanted)(arrays)
    assert nll_N.dtype == expected_N.dtype and not nll_N[~selected_N].any()
    close = functools.partial(
        np.testing.assert_allclose, rtol=tolerance, atol=tolerance
    )
    close(nll_N, expected_N)
    for name, actual, array in zip(ARGUMENTS, grads, expected, strict=True):
        assert actual.dtype == array.dtype
        close(actual.astype(float), array.astype(float), err_msg=name)


@pytest.mark.parametrize("name", SELECTIONS)
def test_selected_tokens_are_those_of_all(name):
    _check_selected(jnp.float32, SELECTIONS[name], 1e-5)


@pytest.mark.parametrize("tokens", [1, 4, N, N + 9])
def test_selected_tokens_in_float64_and_in_chunks_of_any_size(tokens):
    with jax.enable_x64(True):
        _check_selected(jnp.float64, [0, 3, 4, 5, 6], 1e-12, tokens=tokens)


def test_selected_tokens_in_bfloat16():
    _check_selected(jnp.bfloat16, SELECTIONS["a chunk and one"], 0.02)


def test_tokens_that_are_not_selected_cost_nothing():
    """Their hidden vectors are never read: a NaN there reaches nothing."""
    (h_ND, table_VD, bias_V), targets_N = _arrays(jnp.float32)
    selected_N = np.arange(N) % 3 == 1
    h_ND = jnp.where(selected_N[:, None], h_ND, jnp.nan)
    chunked = functools.partial(selected_nll, selected_N=selected_N, tokens=2)
    function = _value_and_grad(chunked, targets_N, jnp.ones(N))
    found = jit(function)((h_ND, table_VD, bias_V))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["all", "selected"])
def test_temporaries_are_a_tenth_of_the_logits_of_the_largest_vocabulary(form, dtype):
    """The compiler's count, forward and backward, at WikiText-103's size."""
    tokens, words, width = 4096, 267_735, 64

    def loss(h_ND, table_VD, bias_V, targets_N, selected_N):
        if form == "all":
            return softmax_nll(h_ND, table_VD, bias_V, targets_N).mean()
        arrays = h_ND, table_VD, bias_V, targets_N, selected_N
        return selected_nll(*arrays).mean()

    shapes = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (
            ((tokens, width), dtype),
            ((words, width), jnp.float32),
            ((words,), jnp.float32),
            ((tokens,), jnp.int32),
            ((tokens,), bool),
        )
    ]
    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    memory = grad.lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * tokens * words * 4
