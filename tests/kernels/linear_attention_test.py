"""Linear attention against the quadratic form, in values and all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from xlformer.errors import UserError
from xlformer.kernels import linear_attention as module
from xlformer.kernels.features import FEATURES, Features
from xlformer.kernels.linear_attention import empty, from_features, linear_attention

B, T, H, K, V, M = 2, 13, 2, 3, 5, 7
START = np.array([[0] * 5 + [5] * 4 + [9] * 4, [-1] * 13])
VALID = np.arange(T)[None] < np.array([13, 11])[:, None]
# Signed features have denominators near 0, which no reference is good for.
MAPS = [Features(n, 0.1 if m.nonnegative else 2.0) for n, m in FEATURES.items()]


class Chosen:
    """The map of a number that is known when running: all of them compile at once."""

    map = FEATURES["exp"]  # the most careful one: its features may overflow

    def __init__(self, index):
        self.index = index

    def factors(self, x, projection_MK):
        def branch(features):
            def run(x):
                log, f = features(x, projection_MK)
                pad = [(0, 0)] * (f.ndim - 1) + [(0, 2 * M - f.shape[-1])]
                return log, jnp.pad(f, pad)

            return run

        return lax.switch(self.index, [branch(features) for features in MAPS], x)


def quadratic(q, k, v, projection, features, *, start=None, valid=None, causal=True):
    """The weights of all pairs, relative to the largest of each query."""
    log_q, f_q = features.factors(q, projection)
    log_k, f_k = features.factors(k, projection)
    B, T = q.shape[:2]
    start = np.zeros((B, T), int) if start is None else np.broadcast_to(start, (B, T))
    valid = np.ones((B, T), bool) if valid is None else valid
    t, s = np.arange(T)[None, :, None], np.arange(T)[None, None]
    sees = (s >= start[..., None]) & valid[:, None] & valid[..., None]
    sees = (sees & (s <= t) if causal else sees)[:, None]
    log = (log_q[:, :, None] + log_k[:, None]).transpose(0, 3, 1, 2)
    log = jnp.where(sees, log, -1e30)
    most = lax.stop_gradient(log.max(-1, keepdims=True))
    a = jnp.einsum("bthm,bshm->bhts", f_q, f_k) * jnp.where(
        sees, jnp.exp(log - most), 0
    )
    norm = a.sum(-1, keepdims=True)
    a = jnp.where(norm == 0, 0, a / jnp.where(norm == 0, 1, norm))
    return jnp.einsum("bhts,bshv->bthv", a, v)


def arrays(seed=0, dtype=np.float64, V=V):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (M, K)]
    return [rng.normal(size=s).astype(dtype) for s in shapes]


def with_gradients(function):
    """Values, and gradients to q, k and v; the loss weighs all outputs differently."""

    @jax.jit
    def run(q, k, v, *rest):
        def loss(q, k, v):
            y = function(q, k, v, *rest)
            return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

        run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        (_, y), grads = run(q, k, v)
        return y, *grads

    return run


def check(found, expected, tolerance=1e-10):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def blocks_of(monkeypatch, chunks):
    monkeypatch.setattr(module, "MOST_CHUNKS", chunks)


@pytest.mark.parametrize("causal", [True, False])
def test_every_map_equals_the_quadratic_form(causal, monkeypatch):
    blocks_of(monkeypatch, 2)

    def ours(q, k, v, w, index):
        y, _ = linear_attention(q, k, v, Chosen(index), w, causal=causal, chunk=4)
        return y

    def reference(q, k, v, w, index):
        return quadratic(q, k, v, w, Chosen(index), causal=causal)

    with jax.enable_x64(True):
        ours, reference = with_gradients(ours), with_gradients(reference)
        for index in range(len(MAPS)):
            inputs = [*arrays(index), index]
            check(ours(*inputs), reference(*inputs))


@functools.cache
def expected_with_resets(causal):
    features, start = Features(), START if causal else START[:, 6:7]
    function = functools.partial(
        quadratic, features=features, start=start, valid=VALID, causal=causal
    )
    with jax.enable_x64(True):
        return with_gradients(function)(*arrays())


@pytest.mark.parametrize(
    "causal, chunk, chunks", [(1, 1, 16), (1, 4, 1), (1, 8, 2), (1, 99, 1), (0, 4, 2)]
)
def test_resets_and_padding_in_chunks_and_blocks_of_any_size(
    causal, chunk, chunks, monkeypatch
):
    blocks_of(monkeypatch, chunks)
    start = START if causal else START[:, 6:7]
    options = dict(start_BT=start, valid_BT=VALID, causal=bool(causal), chunk=chunk)

    def ours(q, k, v, w):
        return linear_attention(q, k, v, Features(), w, **options)[0]

    with jax.enable_x64(True):
        check(with_gradients(ours)(*arrays()), expected_with_resets(bool(causal)))


def test_segments_with_carried_sums_equal_one_pass():
    """Resets and padding included; single positions are generation's steps."""
    q, k, v, w = arrays()
    q, k = 3 * q, 3 * k

    @jax.jit
    def run(q, k, v, sums, start, valid):
        options = dict(sums=sums, start_BT=start, valid_BT=valid, chunk=2)
        return linear_attention(q, k, v, Features(), w, **options)

    with jax.enable_x64(True):
        y, end = run(q, k, v, empty(B, H, M, V, np.float64), START, VALID)
        sums, found = empty(B, H, M, V, np.float64), []
        # The second one's last four are padding.
        for a, b in [(0, 5), (5, 8), (8, 9), (9, 10), (10, 13)]:
            pad = [(0, 0), (0, 5 - (b - a) if b - a > 1 else 0)]
            part = [np.pad(x[:, a:b], pad + [(0, 0)] * 2) for x in (q, k, v)]
            start = np.pad(START[:, a:b], pad, mode="edge")
            # Starts before the segment are all in the sums, which a reset has cleared.
            start = np.where(start >= a, start - a, -1)
            valid = np.pad(VALID[:, a:b], pad)
            some, sums = run(*part, sums, start, valid)
            found.append(some[:, : b - a])
        check([np.concatenate(found, 1)], [y])
        check(sums, end)


def test_no_later_key_changes_an_earlier_output_by_one_bit(monkeypatch):
    blocks_of(monkeypatch, 2)
    q, k, v, w = arrays(dtype=np.float32)
    run = jax.jit(lambda *x: linear_attention(*x, Features(), w, chunk=4)[0])
    before = run(q, k, v)
    for t in range(1, T):
        # The logarithm of a long key is small, that of one along a row of w is large.
        for key, value in [(50, 1e6), (w[0], -1e6), (1e10, 1e37), (np.nan, np.inf)]:
            k_other, v_other = k.copy(), v.copy()
            k_other[:, t:], v_other[:, t:] = key, value
            after = run(q, k_other, v_other)
            np.testing.assert_array_equal(after[:, :t], before[:, :t])
            assert (after[:, t:] != before[:, t:]).all()


def test_weights_are_positive_causal_and_sum_to_one():
    q, k, _, w = arrays()
    identity = np.broadcast_to(np.eye(T)[None, :, None], (B, T, H, T))
    with jax.enable_x64(True):
        a = jax.jit(lambda v: linear_attention(q, k, v, Features(), w, chunk=4)[0])(
            identity
        )
    a = np.asarray(a).transpose(1, 3, 0, 2)
    np.testing.assert_allclose(a.sum(1), 1, rtol=1e-12)
    later = np.arange(T)[None] > np.arange(T)[:, None]
    assert (a[later] == 0).all() and (a[~later] > 0).all()


def test_keys_of_any_norm_give_finite_values_and_gradients():
    q, k, v, w = arrays(dtype=np.float32)

    @with_gradients
    def run(q, k, v, scale):
        return linear_attention(scale * q, scale * k, v, Features(), w, chunk=4)[0]

    for scale in (1e-20, 1, 5, 20, 1e3, 1e8):
        for x in run(q, k, v, np.float32(scale)):
            assert np.isfinite(x).all(), scale
    # Up to norms of 10 (three numbers of 5), it is exact.
    with jax.enable_x64(True):
        exact = quadratic(*[np.float64(x) for x in (5 * q, 5 * k, v, w)], Features())
    np.testing.assert_allclose(run(q, k, v, np.float32(5))[0], exact, atol=2e-5)


def test_bfloat16_stays_near_the_quadratic_form():
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays()]
    run = jax.jit(lambda *x: linear_attention(*x[:3], Features(), x[3], chunk=4))
    y, sums = run(*rounded)
    assert y.dtype == jnp.bfloat16 and {x.dtype for x in sums} == {jnp.dtype("float32")}
    exact = quadratic(*[np.asarray(x, np.float32) for x in rounded], Features())
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=0.03)


def test_no_product_of_bfloat16_numbers_is_made_in_float32():
    """But those that add the sums of chunks, which are float32 themselves."""
    q, k, v, w = [jnp.asarray(x, jnp.bfloat16) for x in arrays()]

    def loss(q, k, v):
        return linear_attention(q, k, v, Features(), w, chunk=4)[0].sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    wide = [x for x in products if "tensor" in x and "xbf16>, tensor" not in x]
    assert len(products) > 15 and all("HIGHEST" in x for x in wide), wide


def test_what_is_not_finite_spoils_only_the_queries_that_see_it():
    q, k, v, w = arrays(dtype=np.float32)
    k[0, 2], v[0, 6, 0], q[0, 10], q[1, 12], k[1, 11] = (
        np.nan,
        np.inf,
        np.nan,
        np.nan,
        1,
    )

    @jax.jit
    def run(q, k, v, sums):
        def loss(q, k, v):
            options = dict(start_BT=START, valid_BT=VALID, sums=sums, chunk=4)
            y, end = linear_attention(q, k, v, Features(), w, **options)
            return jnp.where(jnp.isfinite(y), y, 0).sum(), (y, end)

        grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        (_, found), grads = grad(q, k, v)
        return *found, grads

    y, sums, grads = run(q, k, v, empty(B, H, M, V))
    spoilt = np.isnan(y).any(-1)
    expected = np.zeros((B, T, H), bool)
    expected[0, 2:5], expected[0, 6:9, 0], expected[0, 10] = True, True, True
    np.testing.assert_array_equal(spoilt, expected)
    assert all(np.isfinite(x).all() for x in (*sums, *grads))
    assert (y[1, 11:] == 0).all()  # padding
    # Sums that are not finite spoil what sees them, until a reset.
    sums = jax.tree.map(lambda x: x.at[0].set(np.nan).at[1, 0].set(np.nan), sums)
    y, sums, _ = run(q, k, v, sums)
    np.testing.assert_array_equal(np.isnan(y[0]).any(-1), expected[0])
    assert np.isnan(y[1, :11, 0]).all() and np.isfinite(y[1, :, 1]).all()
    assert np.isnan(sums.keys_BHM[1, 0]).all() and np.isfinite(sums.keys_BHM[0]).all()


@pytest.mark.parametrize("name", ["exp", "square"])
def test_features_that_overflow_hide_behind_a_reset(name):
    q, k, v, w = arrays(dtype=np.float32)
    large = k.copy()
    large[0, 0] = 1e25 * w[0]

    @jax.jit
    def run(k):
        def loss(k):
            options = dict(start_BT=START, chunk=4)
            y, sums = linear_attention(q, k, v, Features(name), w, **options)
            return jnp.where(jnp.isfinite(y), y, 0).sum(), (y, sums)

        return jax.grad(loss, has_aux=True)(k)

    grad, (y, sums) = run(large)
    _, (expected, _) = run(k)
    after = np.flatnonzero(START[0] > 0)
    assert len(after) and np.isnan(y[0, : after[0]]).all()
    np.testing.assert_array_equal(y[0, after], expected[0, after])
    np.testing.assert_array_equal(y[1], expected[1])
    assert all(np.isfinite(x).all() for x in (grad, *sums))


def test_a_query_that_meets_no_key_gives_zero_and_no_gradient():
    q, k, v, _ = arrays(dtype=np.float32)
    q, k = np.abs(q), -np.abs(k)

    def run(q, k, v):
        return linear_attention(q, k, v, Features("relu"), None, chunk=4)[0]

    for x in with_gradients(run)(q, k, v):
        assert (x == 0).all()


def test_features_that_exist_already_give_the_same():
    q, k, v, w = arrays(dtype=np.float32)
    features = Features()
    (_, q_f), (k_log, k_f) = features(q, w), features(k, w)
    found, sums = jax.jit(from_features)(q_f, k_log, k_f, v)
    run = jax.jit(lambda *x: linear_attention(*x, features, w))
    expected, expected_sums = run(q, k, v)
    check([found, *sums], [expected, *expected_sums], 1e-6)


def test_what_is_not_divided_are_the_sums_themselves():
    q, k, v, _ = arrays()
    with jax.enable_x64(True):
        for causal in (True, False):
            run = functools.partial(
                from_features, causal=causal, normalise=False, chunk=4
            )
            found, _ = jax.jit(run)(q, None, k, v)
            a = np.einsum("bthk,bshk->bhts", q, k)
            expected = np.einsum("bhts,bshv->bthv", np.tril(a) if causal else a, v)
            check([found], [expected])
    with pytest.raises(ValueError, match="must have no logarithms"):
        from_features(q, k[..., 0], k, v, normalise=False)


def test_refusals():
    q, k, v, w = arrays(dtype=np.float32)
    with pytest.raises(UserError, match="did you mean 'positive'"):
        Features("positiv")
    with pytest.raises(ValueError, match="'hyperbolic' need a projection"):
        linear_attention(q, k, v, Features("hyperbolic"), None)
    with pytest.raises(ValueError, match="causal attention only"):
        sums = empty(B, H, M, V)
        linear_attention(q, k, v, Features(), w, sums=sums, causal=False)
