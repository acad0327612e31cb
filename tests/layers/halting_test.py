"""Adaptive computation time: weights, steps and remainders of given probabilities."""

import halting_steps
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlformer.layers import halting
from xlformer.layers.halting import ACCUMULATE, CONVEX

N, B, T, D = 7, 2, 11, 3
EPSILON = 0.01


pytestmark = pytest.mark.usefixtures("float64")


def given(seed=0):
    """Probabilities of which some halt at once, some late, some never."""
    random = np.random.default_rng(seed)
    p_NBT = random.uniform(size=(N, B, T)) * np.linspace(0.02, 1.2, T)
    p_NBT = np.minimum(p_NBT, 0.999)
    p_NBT[:, :, 0] = 1e-3
    return p_NBT, random.normal(size=(N, B, T, D))


def run(p_NBT, states_NBTD=None, mode=ACCUMULATE, **options):
    if states_NBTD is None:
        states_NBTD = np.zeros((*p_NBT.shape, 1))
    arrays = jnp.asarray(p_NBT), jnp.asarray(states_NBTD)
    return halting_steps.run(*arrays, mode, epsilon=EPSILON, **options)


def by_hand(p_N):
    """(weights, steps, remainder) of one position, one step after the other."""
    h, weights, steps, rest = 0.0, [], 0, 0.0
    for p in p_N:
        if h == 1:
            weights.append(0.0)
        elif h + p > 1 - EPSILON:
            weights.append(1 - h)
            steps, rest, h = steps + 1, 1 - h, 1
        else:
            weights.append(p)
            steps, h = steps + 1, h + p
    return weights, steps, rest


def test_each_position_halts_by_itself():
    p_NBT, states_NBTD = given()
    y_BTD, weights_NBT, found = run(p_NBT, states_NBTD)
    expected = [by_hand(p_NBT[:, b, t]) for b in range(B) for t in range(T)]
    weights_PN, steps_P, rest_P = map(np.array, zip(*expected, strict=True))
    np.testing.assert_allclose(weights_NBT.reshape(N, -1).T, weights_PN, 0, 1e-15)
    np.testing.assert_array_equal(found.updates_BT.reshape(-1), steps_P)
    np.testing.assert_allclose(found.remainder_BT.reshape(-1), rest_P, 0, 1e-15)
    sum_BTD = (np.asarray(weights_NBT)[..., None] * states_NBTD).sum(0)
    np.testing.assert_allclose(y_BTD, sum_BTD, 0, 1e-14)


@pytest.mark.parametrize("force", [False, True])
def test_weights_sum_to_one_where_a_position_halts(force):
    p_NBT, _ = given()
    _, weights_NBT, found = run(p_NBT, force=force)
    halted_BT, sum_BT = np.asarray(found.halted_BT), np.asarray(weights_NBT).sum(0)
    assert (weights_NBT >= 0).all() and halted_BT[:, 1:].any()
    np.testing.assert_allclose(sum_BT[halted_BT], 1, 0, 1e-15)
    assert halted_BT.all() == force
    # What has not halted took every step, and left the rest of the sum to nobody.
    assert (sum_BT[~halted_BT] <= 1 - EPSILON).all()
    assert (found.updates_BT[~halted_BT] == N).all()
    assert (found.remainder_BT[~halted_BT] == 0).all()
    rest = found.remainder_BT[halted_BT]
    assert (rest > 0).all() and (rest <= 1).all()


def test_a_probability_above_the_threshold_halts_at_once():
    p_NBT = np.full((N, 1, 2), 1 - EPSILON + 1e-9)
    p_NBT[:, :, 1] = 1 - EPSILON  # not above it
    _, states_NBTD = given()
    states_NBTD = states_NBTD[:, :1, :2]
    y_BTD, weights_NBT, found = run(p_NBT, states_NBTD)
    assert found.updates_BT.tolist() == [[1, 2]]
    assert found.remainder_BT[0, 0] == 1 and weights_NBT[0, 0, 0] == 1
    np.testing.assert_array_equal(y_BTD[0, 0], states_NBTD[0, 0, 0])


def test_convex_weights_favour_late_steps():
    p_NBT, states_NBTD = given()
    y_BTD, weights_NBT, _ = run(p_NBT, states_NBTD, CONVEX)
    effective_NBT = halting_steps.effective_weights(weights_NBT, CONVEX)
    sum_BT = 1 - np.prod(1 - np.asarray(weights_NBT), 0)
    np.testing.assert_allclose(effective_NBT.sum(0), sum_BT, 0, 1e-14)
    assert (sum_BT[:, 1:4] < 0.99).all()  # not those of true ACT
    sum_BTD = (np.asarray(effective_NBT)[..., None] * states_NBTD).sum(0)
    np.testing.assert_allclose(y_BTD, sum_BTD, 0, 1e-14)


def test_ponder_falls_with_higher_probabilities():
    @jax.jit
    def ponder(logits_NBT):
        *_, found = run(jax.nn.sigmoid(logits_NBT))
        return (found.updates_BT + found.remainder_BT).sum(), found.updates_BT

    logits_NBT = np.random.default_rng(0).normal(size=(N, B, T)) - 2
    slope_NBT, before_BT = jax.grad(ponder, has_aux=True)(logits_NBT)
    # Steps are whole numbers without a slope: it is the remainder's, which falls with
    # what came before the step that halts.
    assert (slope_NBT <= 0).all() and (slope_NBT < 0).any()
    assert (ponder(logits_NBT + 1)[1] <= before_BT).all()


def test_a_global_probability_is_a_mean_from_where_a_position_begins():
    p_BT = np.random.default_rng(0).uniform(size=(2, 5))
    found_BT = halting.global_probability(jnp.asarray(p_BT))
    np.testing.assert_allclose(found_BT, p_BT.mean(1, keepdims=True) + 0 * p_BT)
    start_BT = np.array([[0, 1, 2, 2, 2], [0, 0, 0, 0, 0]])
    found_BT = halting.global_probability(jnp.asarray(p_BT), jnp.asarray(start_BT))
    expected = [[p_BT[b, s:].mean() for s in start_BT[b]] for b in range(2)]
    np.testing.assert_allclose(found_BT, expected)
