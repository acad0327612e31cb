"""Sinusoids, and which distance uses which row."""

import jax
import jax.numpy as jnp
import numpy as np

from xlformer.layers import positions


def test_sinusoid_is_halves_of_sines_and_cosines():
    expected = np.zeros((5, 6))
    for p, i in np.ndindex(5, 3):
        angle = p / 10000 ** (2 * i / 6)
        expected[p, i], expected[p, 3 + i] = np.sin(angle), np.cos(angle)
    actual = positions.sinusoid(np.arange(5), 6, jnp.float32)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=1e-7)


def test_sinusoid_of_traced_positions_is_the_same():
    known = np.array([[0, 1], [7, 3]])
    expected = positions.sinusoid(known, 8, jnp.float32)
    traced = positions.sinusoid(jnp.asarray(known), 8, jnp.float32)
    np.testing.assert_allclose(traced, expected, atol=1e-6)


def test_far_positions_are_rounded_once():
    far = np.array([3799])
    exact = np.sin(3799 / 10000 ** (2 * np.arange(4) / 8))
    actual = positions.sinusoid(far, 8, jnp.float32)[0, :4]
    np.testing.assert_array_equal(actual, exact.astype(np.float32))


def test_positions_of_a_long_stream_are_not_blurred():
    """In float32 4,000,003 / 10000 ** 0.25 is a tenth of a radian off."""
    far = np.array([4_000_003, -4_000_003])
    expected = positions.sinusoid(far, 8, jnp.float32)
    traced = positions.sinusoid(jnp.asarray(far), 8, jnp.float32)
    np.testing.assert_allclose(traced, expected, atol=2e-3)


def test_timing_signal_ends_at_ten_thousand():
    known = np.array([[0, 3], [10, 7919]])
    expected = np.zeros((2, 2, 7))  # the odd column stays 0
    for b, t, i in np.ndindex(2, 2, 3):
        angle = known[b, t] / (1, 100, 10000)[i]
        expected[b, t, i], expected[b, t, 3 + i] = np.sin(angle), np.cos(angle)
    for given in (known, jnp.asarray(known)):
        actual = positions.timing_signal(given, 7, jnp.float32)
        np.testing.assert_allclose(actual, expected, atol=1e-3)


def test_sinusoid_in_other_dtypes():
    low = positions.sinusoid(np.array([3799]), 8, jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    # bfloat16 cannot hold 3799: the angle must not be taken from it.
    traced = positions.sinusoid(jnp.array([3799]), 8, jnp.bfloat16)
    np.testing.assert_allclose(low.astype(float), traced.astype(float), atol=0.01)
    with jax.enable_x64(True):
        assert positions.sinusoid(np.arange(3), 8, jnp.float64).dtype == jnp.float64


def test_distances_are_clamped_from_above():
    assert positions.distances(5, 0).tolist() == [0, 1, 2, 3, 4]
    assert positions.distances(5, 2).tolist() == [0, 1, 2, 2, 2]
    assert positions.distances(5, 4).tolist() == [0, 1, 2, 3, 4]
    assert positions.distances(5, 11).tolist() == [0, 1, 2, 3, 4]


def test_the_last_row_of_a_table_is_distance_0():
    assert positions.nearest_rows(7, 5, 0).tolist() == [6, 5, 4, 3, 2]
    # Beyond the table, or beyond what clamp_length keeps: the farthest row.
    assert positions.nearest_rows(3, 5, 0).tolist() == [2, 1, 0, 0, 0]
    assert positions.nearest_rows(7, 5, 2).tolist() == [6, 5, 5, 5, 5]
    assert positions.nearest_rows(3, 5, 11).tolist() == [2, 1, 0, 0, 0]


def test_rotary_turns_pairs_as_complex_numbers():
    """e^(i p w) times each pair: what is left of two turns is their difference."""
    random = np.random.default_rng(0)
    q_BTHK, k_BSHK = random.normal(size=(2, 3, 2, 6)), random.normal(size=(2, 7, 2, 6))
    with jax.enable_x64(True):
        turned = positions.rotated(jnp.asarray(q_BTHK), jnp.asarray(k_BSHK))
        assert {x.dtype for x in turned} == {jnp.dtype("float64")}
    frequencies = 10000 ** (-np.arange(3) / 3)
    for x, found, first in zip((q_BTHK, k_BSHK), turned, (4, 0), strict=True):
        angles = (first + np.arange(x.shape[1]))[:, None] * frequencies
        expected = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles)[None, :, None]
        np.testing.assert_allclose(found[..., :3], expected.real, atol=1e-12)
        np.testing.assert_allclose(found[..., 3:], expected.imag, atol=1e-12)
    low = positions.rotated(*(jnp.asarray(x, jnp.bfloat16) for x in (q_BTHK, k_BSHK)))
    assert {x.dtype for x in low} == {jnp.dtype("bfloat16")}
