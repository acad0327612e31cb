"""The attention operation against a double loop, in values and all gradients."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from attention_cases import (
    CASES,
    PARTLY,
    RESETS,
    check_against_double_loop,
    check_close,
    check_no_gradient_crosses,
    make_arrays,
    probabilities,
    values_and_gradients,
)

from xlformer.errors import UserError
from xlformer.kernels import blocked, dropout, pallas_tpu, xla
from xlformer.kernels.call import Call, interpreted
from xlformer.kernels.relative_attention import (
    choose,
    relative_attention,
    visible_attention,
)
from xlformer.kernels.visibility import Visibility


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(blocked, "CHUNK_SIZE", 2)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_double_loop(name):
    check_against_double_loop("xla", name)


# Those in which the keys of a chunk, or its distances, are another part of all.
CHUNKED = [
    *reference.RULES,
    "no_memory",
    "memory_shorter",
    "no_positions",
    "bidirectional_window_memory_shorter",
    "bidirectional_one_query",
    "partly_filled_window",
    "reset_two",
]


@pytest.mark.parametrize("name", CHUNKED)
def test_blocked_equals_the_double_loop(name, small_chunks):
    check_against_double_loop("blocked", name)


@pytest.mark.parametrize("name", sorted(RESETS))
def test_no_gradient_crosses_a_reset(name):
    check_no_gradient_crosses("xla", name)


@pytest.mark.parametrize("causal", [True, False])
def test_blocked_equals_xla_in_float64_with_dropout(causal):
    """In chunks as large as they are, the last one not full."""
    with jax.enable_x64(True):
        arrays = make_arrays(B=1, T=140, M=25, H=2, causal=causal, dtype=np.float64)
        options = dict(
            causal=causal,
            window=60,
            dropout_rate=0.3,
            dropout_key=jax.random.split(jax.random.key(0), 1),
        )
        found = values_and_gradients(arrays, "blocked", **options)
        expected = values_and_gradients(arrays, "xla", **options)
        check_close(*found, *expected, tolerance=1e-9)


def test_bfloat16_stays_near_the_double_loop():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in make_arrays()]
    actual = relative_attention(*arrays, window=4)
    assert actual.dtype == jnp.bfloat16
    exact = [np.asarray(x, np.float64) for x in arrays]
    expected = reference.attention(*exact, window=4)
    np.testing.assert_allclose(np.asarray(actual, float), expected, atol=0.03)


def test_no_product_of_bfloat16_numbers_is_made_in_float32():
    """Neither forward nor backward: matrix units are slower there."""
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in make_arrays()]

    def loss(arrays):
        return relative_attention(*arrays, implementation="xla").sum()

    text = jax.jit(jax.grad(loss)).lower(arrays).as_text()
    found = re.findall(
        r"dot_general.* : \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\)", text
    )
    # Three forward, two for each of them backward.
    assert found == 9 * [("bf16", "bf16")]


def test_float64_stays_float64():
    with jax.enable_x64(True):
        arrays = make_arrays(dtype=np.float64)
        actual = relative_attention(*arrays)
        assert actual.dtype == jnp.float64
        expected = reference.attention(*arrays)
        np.testing.assert_allclose(actual, expected, atol=1e-12, rtol=0)


@functools.cache
def _uniform():
    """Equal scores and values 1: the output is the sum of the probabilities kept."""
    qu_BTHK, qw_BTHK, k_BSHK, v_BSHK, r_SHK = make_arrays(T=3, M=997, K=1)
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


def test_every_implementation_drops_what_the_hash_says(small_chunks):
    keys, rate = jax.random.split(jax.random.key(0), 2), 0.4
    kept_BTHS = probabilities("xla", rate=0.0, key=None)
    B, T, H, S = kept_BTHS.shape
    words = dropout.seeds(keys, B, H)[:, None, :, None]
    query, key = (np.arange(n, dtype=np.int32) for n in (T, S))
    keep_BTHS = dropout.keep_pairs(
        words[..., 0],
        words[..., 1],
        query[None, :, None, None],
        key[None, None, None],
        rate,
    )
    expected_BTHS = np.where(keep_BTHS, kept_BTHS / (1 - rate), 0)
    for name in ("xla", "blocked", "pallas_tpu", "pallas_gpu"):
        with interpreted(query_tile=8, key_tile=8):
            found_BTHS = probabilities(name, rate=rate, key=keys)
        np.testing.assert_allclose(found_BTHS, expected_BTHS, atol=1e-6, err_msg=name)


def test_the_hash_has_no_pattern():
    """Neither its means nor its products with neighbours differ from chance."""
    B, H, T, S, rate = 2, 3, 200, 300, 0.3
    words = dropout.seeds(jax.random.split(jax.random.key(3), B), B, H)[..., None, None]
    keep = dropout.keep_pairs(
        words[:, :, 0],
        words[:, :, 1],
        jnp.arange(T)[None, None, :, None],
        jnp.arange(S)[None, None, None],
        rate,
    )
    z_BHTS = (np.asarray(keep) - (1 - rate)) / (rate * (1 - rate)) ** 0.5
    for axes in ((0, 1, 2, 3), (2, 3), (0, 1, 2), (0, 1, 3), (3,)):
        n = np.prod([z_BHTS.shape[axis] for axis in axes])
        means = z_BHTS.mean(axes) * n**0.5  # each of variance 1
        assert np.abs(means).max() < 5
        assert 0.5 < (means**2).mean() < 2 or means.size < 100
    for axis in range(4):
        for distance in (1, 2, 16, 64):
            near = z_BHTS * np.roll(z_BHTS, distance, axis)
            if distance < z_BHTS.shape[axis]:
                assert abs(near.mean()) * near.size**0.5 < 5, (axis, distance)


# The choice ---------------------------------------------------------------------------


def test_an_unknown_implementation_is_named():
    with pytest.raises(UserError, match=r"attention='xlaa', did you mean 'xla'\?"):
        relative_attention(*make_arrays(), implementation="xlaa")


def call(*, B=2, causal=True, window=None, **shape):
    arrays = make_arrays(B=B, causal=causal, **{"H": 1, "K": 2, **shape})
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    qu_BTHK, _, k_BSHK, v_BSHK, r_SHK = shapes
    visibility = Visibility(window, causal=causal)
    return Call.of(qu_BTHK, k_BSHK, v_BSHK, r_SHK, visibility, rate=0.0)


def test_auto_chooses_by_platform_and_shape():
    for platform in ("cpu", "gpu"):
        assert choose(call(T=255), platform) == "xla"
        assert choose(call(T=256), platform) == "blocked"
        assert choose(call(T=256, causal=False), platform) == "xla"
        assert choose(call(T=256, causal=False, window=9), platform) == "blocked"
    assert choose(call(T=64), "tpu") == "pallas_tpu"
    assert choose(call(T=1), "tpu") == "xla"
    assert choose(call(T=256, causal=False, window=9), "tpu") == "blocked"
    assert choose(call(T=256, dtype=np.float64), "tpu") == "blocked"
    assert choose(call(T=256, M=40_000, K=128, B=1), "tpu") == "blocked"


def test_auto_says_once_what_and_why(caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        choose(call(T=257, M=1), "cpu")
    assert [r.getMessage() for r in caplog.records] == [
        "attention=auto is 'blocked' for 257 queries, 258 keys on cpu: chunks of "
        "queries skip keys out of sight"
    ]


def test_auto_falls_back_with_one_warning(caplog, monkeypatch):
    def fail(call):
        raise RuntimeError("Mosaic failed\nwith a long story")

    monkeypatch.setattr(pallas_tpu, "try_out", fail)
    for _ in range(2):
        assert choose(call(T=300, M=3), "tpu") == "blocked"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith("times the bytes: Mosaic failed")


def test_an_explicit_kernel_that_cannot_run_is_refused():
    arrays = make_arrays()
    with pytest.raises(UserError) as error:
        relative_attention(*arrays, implementation="pallas_tpu")
    assert str(error.value) == (
        "config.model.attention='pallas_tpu': needs a TPU, this is cpu: set 'auto' or "
        "'blocked'"
    )
    with interpreted(query_tile=8, key_tile=8):
        arrays = make_arrays(causal=False)
        with pytest.raises(UserError, match="knows only causal attention"):
            relative_attention(*arrays, causal=False, implementation="pallas_tpu")
        arrays = make_arrays(B=1, H=1, T=8, M=60_000, K=128)
        with pytest.raises(UserError, match=r"60008 keys with d_head=128 .* \d+ MiB"):
            relative_attention(*arrays, implementation="pallas_tpu")


def test_its_three_arguments_are_one_visibility():
    arrays = make_arrays(causal=False)
    y_BTHK = relative_attention(*arrays, window=2, key_start_BT=PARTLY, causal=False)
    visibility = Visibility(window=2, key_start_BT=PARTLY, causal=False)
    np.testing.assert_array_equal(y_BTHK, visible_attention(*arrays, visibility))


def test_wrong_arguments_are_refused():
    qu_BTHK, qw_BTHK, k_BSHK, v_BSHK, r_SHK = make_arrays()
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
            expected_TS[~Visibility().mask(np.arange(T), np.arange(S), S - T)[0, 0]] = (
                np.nan
            )
        known_TS = ~np.isnan(expected_TS)
        np.testing.assert_array_equal(actual_TS[known_TS], expected_TS[known_TS])
        assert known_TS.sum() >= T * (S - T) + T * (T + 1) // 2
