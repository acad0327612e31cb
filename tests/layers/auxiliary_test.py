"""Which layers predict at a step, what of, and that the others cost nothing."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlformer.layers import auxiliary
from xlformer.layers.auxiliary import Classifier, Targets

B, T, D, V = 3, 5, 7, 11


@pytest.mark.parametrize("n_layer", [1, 2, 3, 7])
@pytest.mark.parametrize("steps", [1, 13, 840, 4_000_000])
def test_layer_k_of_n_predicts_until_k_2nths_of_the_training(n_layer, steps):
    last = range(max(0, steps - 2), steps + 2)
    edges = [steps * k // (2 * n_layer) + d for k in range(n_layer) for d in (-1, 0, 1)]
    for step in {*last, *filter(lambda step: step >= 0, edges)}:
        progress = fractions.Fraction(step, steps)
        limits = [fractions.Fraction(k + 1, 2 * n_layer) for k in range(n_layer)]
        expected = [progress < limit for limit in limits[:-1]] + [True]
        found = auxiliary.active(n_layer, steps, np.int32(step))
        np.testing.assert_array_equal(found, expected, err_msg=str(step))


def test_where_the_steps_of_the_training_are_not_known_nothing_ends():
    assert auxiliary.active(3, 0, np.int32(1 << 30)).all()
    assert auxiliary.active(3, 100, None).all()  # its beginning


def test_the_target_after_next_is_known_but_to_the_last_position_that_counts():
    targets_BT = np.arange(B * T).reshape(B, T)
    found = Targets.of(targets_BT, np.array([T, 2, 0]))
    np.testing.assert_array_equal(found.next_BT, targets_BT)
    assert found.next_counts_BT.sum(1).tolist() == [T, 2, 0]
    counts_BT = np.asarray(found.second_counts_BT)
    assert counts_BT.tolist() == [
        [True] * 4 + [False],
        [True] + [False] * 4,
        [False] * 5,
    ]
    expected = (targets_BT + 1)[counts_BT]
    np.testing.assert_array_equal(found.second_BT[counts_BT], expected)
    whole = Targets.of(targets_BT)
    assert whole.next_counts_BT.all() and whole.second_counts_BT.sum() == B * (T - 1)


def made():
    random = np.random.default_rng(0)
    h_BTD = jnp.asarray(random.normal(size=(B, T, D)))
    tables = [random.normal(size=(V, D)) for _ in range(2)]
    biases = [random.normal(size=V) for _ in range(2)]
    classifiers = tuple(map(Classifier, map(jnp.asarray, tables), biases))
    return h_BTD, classifiers, random.integers(V, size=(B, T))


def test_a_layers_loss_is_the_weighted_sum_of_two_means_over_rows():
    with jax.enable_x64(True):
        h_BTD, classifiers, targets_BT = made()
        lengths_B = np.array([T, 2, 1])
        targets = Targets.of(targets_BT, lengths_B)
        loss = jax.jit(auxiliary.loss)
        found = np.asarray(loss(h_BTD, classifiers, targets, jnp.array([0.7, 0.2])))
    h_BTD, classifiers = jax.tree.map(np.asarray, (h_BTD, classifiers))

    def mean(classifier, first):
        logits = h_BTD @ classifier.table_VD.T + classifier.bias_V
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        rows = []
        for b, length in enumerate(lengths_B):
            at = [log_p[b, t, targets_BT[b, t + first]] for t in range(length - first)]
            rows.append(-np.mean(at) if at else 0.0)
        return np.mean(rows)

    expected = 0.7 * mean(classifiers[0], 0) + 0.2 * mean(classifiers[1], 1)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_what_has_the_weight_0_is_not_computed():
    """Neither forward nor backward: a branch of the compiled program."""
    h_BTD, classifiers, targets_BT = made()
    bad = Classifier(jnp.full((V, D), jnp.nan), jnp.zeros(V))
    loss = jax.jit(jax.value_and_grad(auxiliary.loss, argnums=(0, 1)))
    targets = Targets.of(targets_BT)
    weights = jnp.array([0.0, 0.5])
    value, (h, (first, second)) = loss(h_BTD, (bad, classifiers[1]), targets, weights)
    assert np.isfinite(value) and np.isfinite(h).all() and np.abs(h).max() > 0
    assert not np.any(first.table_VD) and np.any(second.table_VD)
    both = loss(h_BTD, (bad, classifiers[1]), targets, jnp.array([0.1, 0.5]))[0]
    assert np.isnan(both)
