"""RECL's definitions against loops over them, and against known answers."""

import math
import weakref

import numpy as np
import pytest

from xlformer.instruments import gains as gains_lib

CONTEXTS = list(range(100, 1300, 100))


def naive_gain(short_MN, long_MN, r):
    """Appendix C of Dai et al. 2019, letter by letter: (relative, absolute) of each."""
    M, N = short_MN.shape
    baseline = [min(short_MN[i][t] for i in range(M)) for t in range(N)]
    T = sorted(range(N), key=lambda t: -baseline[t])[: max(1, round(r * N))]

    def f(i, loss):
        return sum(min(baseline[t], loss[i][t]) for t in T) / len(T)

    found = []
    for i in range(M):
        before, after = math.exp(f(i, short_MN)), math.exp(f(i, long_MN))
        found.append(((before - after) / before, before - after))
    return np.array(found).T


def losses(M=3, N=97, seed=0):
    rng = np.random.default_rng(seed)
    return rng.gamma(2.0, size=(2, M, N)).astype(np.float32)


@pytest.mark.parametrize("r", [0.1, 0.5, 1.0])
def test_a_gain_is_the_papers(r):
    short_MN, long_MN = losses()
    found = gains_lib.gain(short_MN, long_MN, r)
    relative, absolute = naive_gain(short_MN, long_MN, r)
    np.testing.assert_allclose(found.relative_M, relative, rtol=1e-6)
    np.testing.assert_allclose(found.absolute_M, absolute, rtol=1e-6)
    assert ((found.relative_M >= 0) & (found.relative_M < 1)).all()
    assert (found.relative_M > 0).any()


def test_the_same_context_gains_nothing():
    short_MN, _ = losses()
    # f(c, c) is the mean of the baseline, of whichever model.
    for r in (0.1, 1.0):
        found = gains_lib.gain(short_MN, short_MN, r)
        np.testing.assert_array_equal(found.relative_M, 0)


def test_one_set_of_tokens_serves_all_models_and_all_of_them_are_one():
    short_MN, long_MN = losses()
    baseline_N = short_MN.min(0)
    chosen_N = gains_lib.hardest(baseline_N, 0.1)
    assert len(chosen_N) == 10
    assert baseline_N[chosen_N].min() >= np.delete(baseline_N, chosen_N).max()
    assert sorted(gains_lib.hardest(baseline_N, 1.0)) == list(range(97))
    assert list(gains_lib.hardest(np.array([1.0, 2.0, 2.0]), 0.3)) == [1]  # of equals
    # What other tokens lose or gain plays no part, for any model.
    found = gains_lib.gain(short_MN, long_MN, 0.1)
    long_MN[:, np.setdiff1d(np.arange(97), chosen_N)] = 0
    again = gains_lib.gain(short_MN, long_MN, 0.1)
    np.testing.assert_array_equal(found.relative_M, again.relative_M)


def test_a_copy_of_a_model_changes_nothing():
    short_MN, long_MN = losses()
    twice = [np.concatenate([x, x[1:2]]) for x in (short_MN, long_MN)]
    for r in (0.1, 0.5, 1.0):
        alone = gains_lib.gain(short_MN, long_MN, r)
        found = gains_lib.gain(*twice, r)
        np.testing.assert_array_equal(found.relative_M[:3], alone.relative_M)
        assert found.relative_M[3] == alone.relative_M[1]


def test_a_stronger_model_of_short_contexts_lowers_all_gains():
    short_MN, long_MN = losses()
    stronger_N = 0.8 * short_MN.min(0, keepdims=True)
    with_it = [np.concatenate([x, stronger_N]) for x in (short_MN, long_MN)]
    alone = gains_lib.gain(short_MN, long_MN, 1.0).relative_M
    found = gains_lib.gain(*with_it, 1.0).relative_M
    assert (found[:3] < alone).all() and found[3] == 0


def test_an_error_is_what_repetitions_spread():
    found = [gains_lib.gain(*losses(2, 400, seed), 0.5) for seed in range(200)]
    spread_M = np.std([gain.relative_M for gain in found], axis=0)
    error_M = np.mean([gain.error_M for gain in found], axis=0)
    # The choice of the tokens varies too, so that it is no more than about right.
    np.testing.assert_allclose(error_M, spread_M, rtol=0.25)


def improving(until, N=4000, noise=0.0):
    """Losses of models that improve linearly until so much context: [M, N] each."""
    rng = np.random.default_rng(1)
    hard_N = rng.gamma(4.0, size=N)
    for c in CONTEXTS:
        used_M1 = np.minimum(c, np.array(until))[:, None]
        yield hard_N * (1.5 - used_M1 / 1000) + noise * rng.normal(size=(len(until), N))


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_lengths_that_are_known_are_found(noise):
    curves = gains_lib.curves(improving((900, 500, 300), noise=noise), (0.1, 0.5, 1.0))
    for r, gains in curves.items():
        assert len(gains) == len(CONTEXTS) - 1
        relative_MC = np.array([gain.relative_M for gain in gains]).T
        found = [gains_lib.recl(CONTEXTS, row, 0.01) for row in relative_MC]
        # Noise may add a step, as only losses below the baseline count.
        assert found[0] in [(900, False), (1000, False)][: 1 + bool(noise)], r
        assert found[1:] == [(500, False), (300, False)], r


@pytest.mark.parametrize("until", [900, 500, 300])
def test_a_length_that_is_known_is_found_alone(until):
    (gains,) = gains_lib.curves(improving((until,)), (0.5,)).values()
    row = [gain.relative_M[0] for gain in gains]
    assert gains_lib.recl(CONTEXTS, row, 0.01) == (until, False)


def test_a_model_that_ignores_context_has_the_first_one():
    assert gains_lib.recl([100, 200, 300], [0.0, 0.0], 0.01) == (100, False)
    assert gains_lib.recl([100, 200, 300], [0.01, 0.009], 0.01) == (200, False)
    found = gains_lib.recl([100, 200, 300], [0.5, 0.01], 0.01)
    assert found == (300, True) and str(found) == "300+"


def test_no_more_than_two_contexts_are_held():
    held = weakref.WeakSet()

    class Row(np.ndarray):
        __hash__ = object.__hash__

    def rows():
        for n in range(5):
            row = np.full((1, 7), 5.0 - n).view(Row)
            held.add(row)
            assert len(held) <= 2
            yield row
            del row

    (found,) = gains_lib.curves(rows(), (1.0,)).values()
    np.testing.assert_allclose([x.relative_M[0] for x in found], 1 - math.exp(-1))


def test_ecl_is_the_first_context_within_a_hundredth():
    nats = [math.log(x) for x in (130, 102, 101, 100.5, 100)]
    assert gains_lib.ecl([1, 2, 3, 4, 5], nats) == 3
    assert gains_lib.ecl([1, 2, 3], [2.0, 2.0, 2.0]) == 1
