"""Random rows: unbiased, with the errors that formulas give; and when they change."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlformer.kernels.features import Features
from xlformer.kernels.linear_attention import linear_attention
from xlformer.layers import favor

N, K = 20_000, 5
SOFTMAX = ("positive", "hyperbolic", "trigonometric")
E1 = np.eye(K)[0] / 2
RANDOM = np.random.default_rng(3)
X, Y = np.array([[0.3, -0.2, 0.1, 0.25, -0.1], [0.1, 0.3, -0.2, 0.3, 0.1]])
# The sign of R is seen where x and y have one direction, which is that of an axis.
PAIRS = np.array([[E1, E1], [-E1, -E1], [X, Y]])


projection = jax.jit(
    favor.projection,
    static_argnames=("features_name", "m", "K", "orthogonal", "dtype"),
)


@functools.cache
def draws(orthogonal, m, features_name="positive", K=K):
    """N matrices, as N draws of one layer."""

    def one(draw):
        kind = dict(features_name=features_name, m=m, K=K, orthogonal=orthogonal)
        return favor.projection(7, 1, draw, **kind)

    return jax.jit(jax.vmap(one))(jnp.arange(N))


@functools.partial(jax.jit, static_argnums=0)
def products(name, w_NMK, pairs_P2K):
    """phi(x) . phi(y) of each draw and pair, [N, P]."""

    def one(w_MK):
        log_P2, f_P2M = Features(name)(pairs_P2K, w_MK)
        return jnp.exp(log_P2.sum(1)) * f_P2M.prod(1).sum(-1)

    return jax.lax.map(one, w_NMK, batch_size=1000)


def estimates(name, w_NMK, pairs_P2K=PAIRS):
    found = products(name, w_NMK, jnp.asarray(pairs_P2K, jnp.float32))
    return np.asarray(found, np.float64)


def kernel(pairs_P2K):
    return np.exp((pairs_P2K[:, 0] * pairs_P2K[:, 1]).sum(-1))


def errors_in_standard_errors(found_NP, expected_P):
    # Trigonometric features have no error where x = y, but rounding.
    standard_P = found_NP.std(0) / len(found_NP) ** 0.5 + 1e-6
    return (found_NP.mean(0) - expected_P) / standard_P


@pytest.mark.parametrize("orthogonal", [True, False], ids=["orthogonal", "iid"])
@pytest.mark.parametrize("name", SOFTMAX)
def test_features_are_unbiased(name, orthogonal):
    # 7 rows: one block of 5, and one that is cut.
    found = estimates(name, draws(orthogonal, 7))
    assert np.abs(errors_in_standard_errors(found, kernel(PAIRS))).max() < 3


def test_rotations_are_uniform_and_a_qr_alone_is_not():
    """Q as it comes is biased at x = y = +-e_1 / 2, by the sign of x: both programs."""
    g_NKK = jax.random.normal(jax.random.key(0), (N, K, K))
    q_NKK = np.asarray(jnp.linalg.qr(g_NKK)[0])
    assert q_NKK[:, 0, 0].max() < 0
    w_NMK = np.swapaxes(q_NKK, 1, 2)
    length_NM = np.linalg.norm(RANDOM.normal(size=(N, K, K)), axis=-1)
    biased = estimates(
        "positive", jnp.asarray(w_NMK * length_NM[..., None], jnp.float32)
    )
    off = errors_in_standard_errors(biased, kernel(PAIRS))
    assert off[0] < -10 and off[1] > 10
    ours_NKK = np.asarray(favor.rotations(jax.random.key(0), N, K))
    for first in (ours_NKK[:, 0, 0], ours_NKK[:, -1, -1]):
        assert abs(np.mean(first)) < 3 / (K * N) ** 0.5


def squared_error(name, m, x, y):
    """Of independent rows, lemma 2 and theorem 1 of the paper's appendix."""
    kernel = np.exp(x @ y)
    z2, d2 = ((x + y) ** 2).sum(), ((x - y) ** 2).sum()
    positive = np.exp(z2) * kernel**2 * (1 - np.exp(-z2)) / m
    return {
        "positive": positive,
        "hyperbolic": positive * (1 - np.exp(-z2)) / 2,
        "trigonometric": np.exp(z2) * kernel**-2 * (1 - np.exp(-d2)) ** 2 / (2 * m),
    }[name]


@pytest.mark.parametrize("name", SOFTMAX)
def test_the_squared_error_is_the_formulas(name):
    m, pairs = 7, np.array([[X, Y], [1.4 * X, -0.7 * Y]])
    found = ((estimates(name, draws(False, m), pairs) - kernel(pairs)) ** 2).mean(0)
    expected = [squared_error(name, m, *pair) for pair in pairs]
    np.testing.assert_allclose(found, expected, rtol=0.05)


def test_orthogonal_rows_err_less_and_less_than_their_bound():
    """Theorem 2, for m <= K."""
    m, pairs = K, np.array([[X, X], [X, Y], [1.2 * X, Y]])
    for (x, y), found in zip(
        pairs, estimates("positive", draws(True, m), pairs).T, strict=True
    ):
        error = (found - np.exp(x @ y)) ** 2
        independent = squared_error("positive", m, x, y)
        less = np.exp(x @ y) - np.exp(-(x @ x + y @ y) / 2)
        bound = independent - 2 * (m - 1) / (m * (K + 2)) * less**2
        assert error.mean() < bound + 3 * error.std() / N**0.5
        assert error.mean() < independent - 3 * error.std() / N**0.5


def test_rows_of_one_length_underestimate():
    """SMREG is a lower bound of the softmax kernel (theorem 1)."""
    w_NMK = draws(True, 7, favor.REGULARISED)
    np.testing.assert_allclose(np.linalg.norm(w_NMK, axis=-1), K**0.5, rtol=1e-6)
    for rows_NMK in (w_NMK, draws(False, 7, favor.REGULARISED)):
        found = estimates("regularised", rows_NMK)
        assert (errors_in_standard_errors(found, kernel(PAIRS)) < -3).all()
        assert (found.mean(0) > (1 - 2 / K ** (1 / 3)) * kernel(PAIRS)).all()


@pytest.mark.parametrize("m", [3, 5, 12])
def test_rows_are_orthogonal_in_blocks_with_the_norms_of_gaussians(m):
    w_NMK = np.asarray(draws(True, m), np.float64)
    for first in range(0, m, K):
        block_NRK = w_NMK[:1000, first : first + K]
        between_NRR = block_NRK @ np.swapaxes(block_NRK, 1, 2)
        diagonal_NRR = between_NRR * np.eye(block_NRK.shape[1])
        np.testing.assert_allclose(between_NRR, diagonal_NRR, atol=2e-5)
    square_NM = (w_NMK**2).sum(-1)
    # Chi-squared with K degrees of freedom: mean K, variance 2 K.
    assert abs(square_NM.mean() - K) < 3 * (2 * K / (N * m)) ** 0.5
    assert abs(square_NM.var() / (2 * K) - 1) < 0.05
    # Blocks and lengths are drawn apart.
    correlation = np.corrcoef(w_NMK.reshape(N, -1).T)
    lengths = np.corrcoef(square_NM.T)
    for found in (correlation, lengths):
        assert np.abs(found - np.eye(len(found))).max() < 6 / N**0.5


def test_a_draw_is_the_same_in_every_precision_and_transformation():
    kind = dict(features_name="positive", m=12, K=K)
    numbers = jnp.arange(3)

    def layer(carry, number):
        return carry, favor.projection(7, number, 2, **kind)

    alone = np.stack([projection(7, n, 2, **kind) for n in range(3)])
    together = jax.vmap(lambda n: projection(7, n, 2, **kind))(numbers)
    in_turn = jax.jit(lambda n: jax.lax.scan(layer, 0, n)[1])(numbers)
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(in_turn, alone, rtol=1e-5, atol=1e-6)
    with jax.enable_x64(True):
        double = projection(7, 1, 2, dtype=jnp.float64, **kind)
    assert double.dtype == np.float64
    np.testing.assert_array_equal(double, alone[1])
    half = projection(7, 1, 2, dtype=jnp.bfloat16, **kind)
    np.testing.assert_array_equal(half, alone[1].astype(jnp.bfloat16))


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("features_name", ["positive", favor.REGULARISED])
def test_seeds_layers_and_draws_differ(features_name, orthogonal):
    kind = dict(features_name=features_name, m=4, K=3, orthogonal=orthogonal)
    first = projection(7, 1, 2, **kind)
    for other in ((8, 1, 2), (7, 2, 2), (7, 1, 3), (7, 2, 1)):
        found = projection(*other, **kind)
        assert np.abs(found - first).max() > 0.1
    np.testing.assert_array_equal(first, projection(7, 1, 2, **kind))


def test_one_column_has_both_signs():
    w_NMK = np.asarray(draws(True, 3, K=1))
    assert abs((w_NMK > 0).mean() - 0.5) < 0.01


def test_a_draw_lasts_for_its_interval():
    found = [int(favor.draw_number(step, 3)) for step in range(8)]
    assert found == [0, 0, 0, 1, 1, 1, 2, 2]
    assert int(jax.jit(lambda s: favor.draw_number(s, 5))(jnp.int32(14))) == 2
    # Never redrawn; outside of training the first draw.
    assert int(favor.draw_number(10**6, 0)) == 0
    assert int(favor.draw_number(None, 3)) == 0
    assert favor.draw_number(None, 3).dtype == favor.draw_number(7, 3).dtype


def test_the_error_of_attention_falls_with_the_root_of_the_features():
    """Slope -1/2, for small norms alone: the relative variance is exp(|x + y|^2)."""
    B, T, H, counts = 1, 7, 3, (8, 32, 128)
    q_BTHK, k_BTHK, v_BTHK = RANDOM.normal(size=(3, B, T, H, K)).astype(np.float32)
    q_BTHK, k_BTHK = (0.2 * x_BTHK / K**0.25 for x_BTHK in (q_BTHK, k_BTHK))
    weight_BHTS = np.tril(np.exp(np.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BTHK)))
    weight_BHTS /= weight_BHTS.sum(-1, keepdims=True)
    exact_BTHK = np.einsum("BHTS,BSHK->BTHK", weight_BHTS, v_BTHK)

    def attend(w_MK):
        return linear_attention(q_BTHK, k_BTHK, v_BTHK, Features(), w_MK)[0]

    # Rows that are repeated change no estimate, and all counts are one program.
    w_NMK, rows_M = draws(False, 128)[:500], np.arange(128)
    attend = jax.jit(jax.vmap(attend))
    errors = [
        np.square(attend(w_NMK[:, rows_M % m]) - exact_BTHK[None]).mean()
        for m in counts
    ]
    slope = np.polyfit(np.log(counts), 0.5 * np.log(errors), 1)[0]
    assert abs(slope + 0.5) < 0.02, slope


def test_a_cpu_factors_one_matrix_at_a_time():
    """Several at once wait for tasks of a pool whose threads may all be waiting."""

    def one(layer):
        return favor.projection(3, layer, 0, features_name="positive", m=8, K=4)

    text = jax.jit(jax.vmap(one)).lower(jnp.arange(3)).compile().as_text()
    factored = re.findall(r"= \((\w+\[[\d,]*\]).*lapack_sgeqrf", text)
    assert factored == ["f32[4,4]"]
