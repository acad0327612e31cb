"""Linformer's attention: a naive form, padding, sharing, and what is refused."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import check

from xlformer.errors import UserError
from xlformer.layers.linformer import linformer_attention

GOLDEN = pathlib.Path(check.__file__).parent
B, T, H, K, V, N, P = 3, 7, 2, 5, 3, 11, 4
RANDOM = np.random.default_rng(0)
LENGTHS = np.array([7, 0, 3])
VALID = np.arange(T)[None] < LENGTHS[:, None]


def array(*shape):
    return RANDOM.normal(size=shape)


def floats(*shapes):
    return [jnp.asarray(array(*shape), jnp.float32) for shape in shapes]


def naive(q_BTHK, k_BSHK, v_BSHV, e_NP, f_NP, lengths):
    y_BTHV = np.zeros((*q_BTHK.shape[:3], v_BSHV.shape[3]), np.result_type(q_BTHK))
    for b, n in enumerate(lengths):
        for h in range(q_BTHK.shape[2]):
            own = min(h, k_BSHK.shape[2] - 1)
            k_PK = e_NP[:n].T @ k_BSHK[b, :n, own]
            v_PV = f_NP[:n].T @ v_BSHV[b, :n, own]
            for t in range(q_BTHK.shape[1]):
                weights = np.exp(k_PK @ q_BTHK[b, t, h])
                y_BTHV[b, t, h] = weights @ v_PV / weights.sum()
    return y_BTHV


@pytest.mark.parametrize("heads", [H, 1])
def test_it_attends_to_sums_of_what_is_no_padding(heads):
    """NaN in padding spoils neither values nor gradients."""
    given = array(B, T, H, K), array(B, T, heads, K), array(B, T, heads, V)
    given += array(N, P), array(N, P)
    direction = [array(*x.shape) for x in given]
    cotangent = array(B, T, H, V) * VALID[:, :, None, None]
    padded = [np.where(VALID[:, :, None, None], x, np.nan) for x in given[:3]]

    def loss(given):
        y_BTHV = linformer_attention(*given, valid_BT=VALID)
        return (y_BTHV * cotangent).sum(), y_BTHV

    with jax.enable_x64(True):
        given_jax = [jnp.asarray(x) for x in (*padded, *given[3:])]
        grads, y_BTHV = jax.jit(jax.grad(loss, has_aux=True))(given_jax)
    step = [x + 1e-30j * d for x, d in zip(given, direction, strict=True)]
    expected = naive(*step, LENGTHS)
    real = VALID[:, :, None, None]
    np.testing.assert_allclose(
        np.where(real, y_BTHV, 0), np.where(real, expected.real, 0), rtol=0, atol=1e-13
    )
    slope = sum(np.vdot(g, d) for g, d in zip(grads, direction, strict=True))
    expected_slope = (expected.imag * 1e30 * cotangent).sum()
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "arrays"), [("linformer", 25), ("linformer_context", 8)]
)
def test_equals_the_program_of_lucidrains(name, arrays):
    result = check.check(GOLDEN / f"{name}.npz")
    assert result.ok, result.problems
    assert result.compared == result.total == arrays


def test_with_identities_it_is_full_attention():
    q, k, v = floats((B, T, H, K), (B, T, H, K), (B, T, H, V))
    y = linformer_attention(q, k, v, jnp.eye(T), jnp.eye(T))
    weights = jax.nn.softmax(jnp.einsum("BTHK,BSHK->BHTS", q, k))
    full = jnp.einsum("BHTS,BSHV->BTHV", weights, v)
    np.testing.assert_allclose(y, full, rtol=0, atol=2e-6)


def test_more_positions_than_rows_are_refused():
    q, k, v, e = floats((B, 12, H, K), (B, 12, H, K), (B, 12, H, V), (N, P))
    with pytest.raises(UserError, match="12 tokens, but config.model.context_length=1"):
        linformer_attention(q, k, v, e, e)
    y = linformer_attention(q, k[:, :N], v[:, :N], e, e)
    assert y.shape == (B, 12, H, V)


def test_bfloat16_trains_on_a_cpu_too():
    given = floats((B, T, H, K), (B, T, H, K), (B, T, H, V), (N, P), (N, P))

    def grads(dtype):
        def loss(arrays):
            return jnp.square(linformer_attention(*arrays).astype(jnp.float32)).sum()

        return jax.jit(jax.grad(loss))([x.astype(dtype) for x in given])

    for rough, fine in zip(grads(jnp.bfloat16), grads(jnp.float32), strict=True):
        error = np.linalg.norm(rough.astype(jnp.float32) - fine)
        assert error < 0.05 * np.linalg.norm(fine)
