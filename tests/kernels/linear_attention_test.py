"""Linear attention against the quadratic form, row by row and key by key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlformer.kernels import linear_attention as linear
from xlformer.kernels.features import FEATURES, Features
from xlformer.kernels.linear_attention import empty, linear_attention


@pytest.fixture(autouse=True, params=[1, 1 << 20])
def block(request, monkeypatch):
    """One chunk at a time, and all."""
    monkeypatch.setitem(linear.BLOCK_SIZE, "cpu", request.param)


B, T, H, K, V, M = 2, 13, 2, 3, 5, 7


def quadratic(q, k, v, features, projection, *, start=None, valid=None, causal=True):
    """Weights of all pairs in the log domain; `start` and `valid` are [B, T]."""
    log_q, f_q = features(q, projection)
    log_k, f_k = features(k, projection)
    B, T = q.shape[:2]
    start = np.zeros((B, T), int) if start is None else start
    valid = np.ones((B, T), bool) if valid is None else valid
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    sees = (s[None] >= start[..., None]) & valid[:, None] & valid[..., None]
    if causal:
        sees &= (s <= t)[None]
    sees = sees[:, None]
    log = (log_q[:, :, None] + log_k[:, None]).transpose(0, 3, 1, 2)
    log = jnp.where(sees, log, -jnp.inf)
    most = jax.lax.stop_gradient(log.max(-1, keepdims=True))
    most = jnp.where(jnp.isfinite(most), most, 0)
    a = jnp.exp(log - most) * jnp.einsum("bthm,bshm->bhts", f_q, f_k)
    norm = a.sum(-1, keepdims=True)
    a = jnp.where(norm == 0, 0, a / jnp.where(norm == 0, 1, norm))
    return jnp.einsum("bhts,bshv->bthv", a, v)


def arrays(seed=0, T=T, scale=1.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (M, K), (B, T, H, V)]
    q, k, v, w, c = [rng.normal(size=s).astype(dtype) for s in shapes]
    return scale * q, scale * k, v, w, c


def both(function, q, k, v, w, c):
    """Values, and gradients to q, k and v."""

    def loss(q, k, v):
        y = function(q, k, v, w)
        return (y * c).sum(), y

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, y), grads = jax.jit(run)(q, k, v)
    return y, *grads


def check(ours, reference, inputs, tolerance=1e-10):
    for a, b in zip(both(ours, *inputs), both(reference, *inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", FEATURES)
def test_equals_the_quadratic_form(name, causal):
    features = Features(name, 0.0 if FEATURES[name].nonnegative else 2.0)
    options = dict(causal=causal)
    with jax.enable_x64(True):
        check(
            lambda *a: linear_attention(*a[:3], features, a[3], chunk=4, **options)[0],
            lambda *a: quadratic(*a[:3], features, a[3], **options),
            arrays(),
        )


@pytest.mark.parametrize("chunk", [1, 8, 16])
@pytest.mark.parametrize("causal", [True, False])
def test_resets_and_padding_in_chunks_of_any_size(chunk, causal):
    start = np.array([[0] * 5 + [5] * 4 + [9] * 4, [-1] * 13])
    start = start if causal else start[:, 4:5] + 3
    valid = np.arange(T)[None] < np.array([13, 11])[:, None]
    options = dict(causal=causal)
    features = Features()
    with jax.enable_x64(True):
        check(
            lambda *a: linear_attention(
                *a[:3],
                features,
                a[3],
                start_BT=start,
                valid_BT=valid,
                chunk=chunk,
                **options,
            )[0],
            lambda *a: quadratic(
                *a[:3],
                features,
                a[3],
                start=np.broadcast_to(start, (B, T)),
                valid=valid,
                **options,
            ),
            arrays(),
        )


def test_segments_equal_one_pass():
    q, k, v, w, _ = arrays(scale=3)
    features = Features()
    with jax.enable_x64(True):
        run = jax.jit(functools.partial(linear_attention, features=features, chunk=4))
        whole, end = run(q, k, v, projection_MK=w)
        sums, found = empty(B, H, M, V, np.float64), []
        for a, b in [(0, 1), (1, 2), (2, 9), (9, 13)]:
            y, sums = run(q[:, a:b], k[:, a:b], v[:, a:b], projection_MK=w, sums=sums)
            found.append(y)
        np.testing.assert_allclose(np.concatenate(found, 1), whole, rtol=1e-11)
        for a, b in zip(sums, end, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11)
