"""The attention operation against a double loop, in values and all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from quick import jit

from xlformer.errors import UserError
from xlformer.kernels import xla
from xlformer.kernels.relative_attention import relative_attention

NAMES = ("qu_BTHK", "qw_BTHK", "k_BSHK", "v_BSHK", "r_SHK")


def _arrays(*, B=2, T=5, M=7, H=3, K=5, R=None, causal=True, dtype=np.float32, seed=0):
    """The five array arguments; R is the width of (qw, r)."""
    random, S = np.random.default_rng(seed), M + T
    rows = S if causal else S + T - 1
    shapes = (
        (B, T, H, K),
        (B, T, H, R or K),
        (B, S, H, K),
        (B, S, H, K),
        (rows, H, R or K),
    )
    return [random.normal(size=shape).astype(dtype) for shape in shapes]


# (B, T) = (2, 5) and M = 7: three valid slots in row 0, none in row 1.
PARTLY = np.array([[4] * 5, [7] * 5])
RESETS = {
    "at_0": np.array([[7] * 5, [0] * 5]),
    "inside": np.array([[0, 0, 9, 9, 9], [2, 8, 8, 8, 8]]),
    "last": np.array([[0, 0, 0, 0, 11], [0] * 5]),
    "two": np.array([[0, 8, 8, 10, 10], [3, 3, 3, 10, 11]]),
}
CASES = {
    "causal": {},
    "window": dict(window=3),
    "window_of_self": dict(window=0),
    "head_size_7": dict(K=7),
    "one_query": dict(T=1, M=11),
    "no_memory": dict(T=7, M=0),
    "memory_shorter": dict(T=7, M=3),
    "memory_longer": dict(T=3, M=13),
    "wider_positions": dict(R=6),
    "no_positions": dict(r=False),
    "bidirectional": dict(causal=False),
    "bidirectional_one_query": dict(causal=False, T=1, M=3),
    "bidirectional_window": dict(causal=False, window=2, T=7, M=3),
    "bidirectional_no_positions": dict(causal=False, r=False),
    "partly_filled": dict(key_start_BT=PARTLY),
    "partly_filled_window": dict(key_start_BT=PARTLY, window=5),
    **{f"reset_{name}": dict(key_start_BT=start) for name, start in RESETS.items()},
}


def _split(case):
    """(arrays, options of the operation) of a case."""
    case = dict(case)
    keys = ("window", "key_start_BT")
    options = {k: case.pop(k) for k in keys if k in case} | {
        "causal": case.get("causal", True)
    }
    relative = case.pop("r", True)
    arrays = _arrays(**case)
    if not relative:
        arrays[1] = arrays[4] = None
    return arrays, options


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_double_loop(name):
    arrays, options = _split(CASES[name])
    dy_BTHK = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)

    def loss(arrays):
        y_BTHK = relative_attention(*arrays, **options)
        return (y_BTHK * dy_BTHK).sum(), y_BTHK

    (_, y_BTHK), grads = jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    assert y_BTHK.dtype == jnp.float32
    exact = [None if x is None else x.astype(np.float64) for x in arrays]
    expected_BTHK = reference.attention(*exact, **options)
    np.testing.assert_allclose(y_BTHK, expected_BTHK, atol=1e-5, rtol=0)
    expected = reference.attention_gradients(dy_BTHK, *exact, **options)
    for argument, actual, array in zip(NAMES, grads, expected, strict=True):
        if array is None:
            assert actual is None
            continue
        np.testing.assert_allclose(
            actual, array, atol=1e-5, rtol=1e-5, err_msg=f"gradient of {argument}"
        )


@pytest.mark.parametrize("name", sorted(RESETS))
def test_no_gradient_crosses_a_reset(name):
    """Of a query's output to keys and values before its start: exactly 0."""
    start_BT = RESETS[name]
    arrays = _arrays()
    B, T, H, K = arrays[0].shape

    def loss(k_BSHK, v_BSHK, weights_BT):
        qu_BTHK, qw_BTHK, _, _, r_SHK = arrays
        y_BTHK = relative_attention(
            qu_BTHK, qw_BTHK, k_BSHK, v_BSHK, r_SHK, key_start_BT=start_BT
        )
        return (y_BTHK * weights_BT[..., None, None]).sum()

    grad = jit(jax.grad(loss, argnums=(0, 1)))
    for t in range(T):
        weights_BT = np.zeros((B, T), np.float32)
        weights_BT[:, t] = 1
        for g_BSHK in map(np.asarray, grad(arrays[2], arrays[3], weights_BT)):
            for b in range(B):
                start, end = start_BT[b, t], 7 + t
                assert not g_BSHK[b, :start].any() and not g_BSHK[b, end + 1 :].any()
        # The values' gradient is the probability: it is the last one of the two.
        assert (g_BSHK[0, start_BT[0, t] : 7 + t + 1] > 0).all()


def test_bfloat16_stays_near_the_double_loop():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in _arrays()]
    actual = relative_attention(*arrays, window=4)
    assert actual.dtype == jnp.bfloat16
    exact = [np.asarray(x, np.float64) for x in arrays]
    expected = reference.attention(*exact, window=4)
    np.testing.assert_allclose(np.asarray(actual, float), expected, atol=0.03)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        arrays = _arrays(dtype=np.float64)
        actual = relative_attention(*arrays)
        assert actual.dtype == jnp.float64
        expected = reference.attention(*arrays)
        np.testing.assert_allclose(actual, expected, atol=1e-12, rtol=0)


@functools.cache
def _uniform():
    """Equal scores and values 1: the output is the sum of the probabilities kept."""
    qu_BTHK, qw_BTHK, k_BSHK, v_BSHK, r_SHK = _arrays(T=3, M=997, K=1)
    zero = np.zeros_like
    return zero(qu_BTHK), zero(qw_BTHK), k_BSHK, np.ones_like(v_BSHK), zero(r_SHK)


def test_dropout_keeps_the_mean_over_the_keys():
    apply = jax.jit(functools.partial(relative_attention, dropout_rate=0.3))
    y_BTHK = apply(*_uniform(), dropout_key=jax.random.key(0))
    # The sd of a mean of n Bernoulli(0.7)/0.7 is sqrt(0.3 / 0.7 / n).
    sd = (0.3 / 0.7 / 997) ** 0.5
    deviation = np.asarray(y_BTHK) - 1
    assert 0.3 * sd < np.abs(deviation).mean() < 2 * sd
    assert np.abs(deviation.mean()) < 4 * sd / y_BTHK.size**0.5


def test_dropout_follows_its_key_alone():
    apply = functools.partial(relative_attention, *_uniform())
    plain = apply()
    key = jax.random.key(0)
    np.testing.assert_array_equal(plain, apply(dropout_rate=0.0, dropout_key=key))
    np.testing.assert_array_equal(plain, apply(dropout_rate=0.3, dropout_key=None))
    one = apply(dropout_rate=0.3, dropout_key=key)
    np.testing.assert_array_equal(one, apply(dropout_rate=0.3, dropout_key=key))
    other = apply(dropout_rate=0.3, dropout_key=jax.random.key(1))
    assert (np.asarray(one) != np.asarray(other)).mean() > 0.5


def test_an_unknown_implementation_is_named():
    with pytest.raises(UserError, match=r"attention='xlaa', did you mean 'xla'\?"):
        relative_attention(*_arrays(), implementation="xlaa")


def test_wrong_arguments_are_refused():
    qu_BTHK, qw_BTHK, k_BSHK, v_BSHK, r_SHK = _arrays()
    with pytest.raises(ValueError, match="both qw_BTHK and r_SHK"):
        relative_attention(qu_BTHK, None, k_BSHK, v_BSHK, r_SHK)
    with pytest.raises(ValueError, match="11 rows, expected 12"):
        relative_attention(qu_BTHK, qw_BTHK, k_BSHK, v_BSHK, r_SHK[1:])
    with pytest.raises(ValueError, match="12 rows, expected 16"):
        relative_attention(qu_BTHK, qw_BTHK, k_BSHK, v_BSHK, r_SHK, causal=False)


def test_relative_shift_moves_distances_to_keys():
    # T = 3 queries, S = 5 keys; each row holds its distances 4..0 and one junk column.
    raw_TW = np.array([[4, 3, 2, 1, 0, -9]] * 3)
    expected_TS = [
        [2, 1, 0, None, None],
        [3, 2, 1, 0, None],
        [4, 3, 2, 1, 0],
    ]
    shifted_TS = np.asarray(xla.relative_shift(jnp.asarray(raw_TW)[None, None], 5))[
        0, 0
    ]
    for t, row in enumerate(expected_TS):
        visible = [d for d in row if d is not None]
        assert shifted_TS[t, : len(visible)].tolist() == visible


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 7), (5, 5), (5, 7), (3, 11)])
def test_relative_shift_equals_a_double_loop(T, S):
    random = np.random.default_rng(0)
    for W in {S + 1, max(S + 1, S + T - 1)}:  # causal with its junk column, or not
        raw_TW = random.normal(size=(T, W)).astype(np.float32)
        expected_TS = reference.relative_shift(raw_TW, S)
        actual_TS = xla.relative_shift(jnp.asarray(raw_TW)[None, None], S)[0, 0]
        if W == S + 1:  # The one junk column stands for all keys that lie ahead.
            expected_TS[~xla.visible(T, S, window=None)] = np.nan
        known_TS = ~np.isnan(expected_TS)
        np.testing.assert_array_equal(actual_TS[known_TS], expected_TS[known_TS])
        assert known_TS.sum() >= T * (S - T) + T * (T + 1) // 2


def test_visible_is_a_band():
    def visible(T, S, **options):
        return xla.visible(T, S, **options).astype(int).tolist()

    assert visible(3, 5, window=None) == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1] * 5]
    assert visible(3, 5, window=1) == [
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert visible(2, 3, window=0) == [[0, 1, 0], [0, 0, 1]]
    assert visible(2, 3, window=None, causal=False) == [[1, 1, 1], [1, 1, 1]]
    assert visible(2, 4, window=1, causal=False) == [[0, 1, 1, 1], [0, 0, 1, 1]]
