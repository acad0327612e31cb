"""LSTM layers against a loop written from the equations; masks, resets, penalties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlformer.layers import recurrent
from xlformer.layers.recurrent import LSTMState, Masks, Places, Rates, Weights

T, B, D, N = 7, 3, 5, 4
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(T, B, D))
H, C = RANDOM.normal(size=(2, B, N))
WEIGHTS = Weights(
    RANDOM.normal(size=(D, 4, N)),
    RANDOM.normal(size=(N, 4, N)),
    RANDOM.normal(size=(4, N)),
    RANDOM.normal(size=(4, N)),
)
# A row with a reset at once, one in the middle, one of none; each with its padding, and
# in the first a reset that lies in it.
RESETS = np.zeros((B, T), bool)
RESETS[0, 0] = RESETS[0, 6] = RESETS[1, 3] = True
LENGTHS = np.array([5, T, 2])


pytestmark = pytest.mark.usefixtures("float64")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def cell(x_D, h_N, c_N, weights):
    """Hochreiter & Schmidhuber 1997 with forget gates, a row at a time."""
    gates_GN = np.einsum("D,DGN->GN", x_D, weights.input_DGN) + weights.input_GN
    gates_GN += np.einsum("M,MGN->GN", h_N, weights.hidden_NGN) + weights.hidden_GN
    i, f, g, o = gates_GN
    c_N = sigmoid(f) * c_N + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c_N), c_N


def rows_alone(weights, resets_BT, lengths_B):
    """Outputs and states of `cell`; where padded, the last output again."""
    y_TBN, h_BN, c_BN = np.zeros((T, B, N)), H.copy(), C.copy()
    for b, t in np.ndindex(B, T):
        if t < lengths_B[b]:
            if resets_BT[b, t]:
                h_BN[b], c_BN[b] = 0, 0
            h_BN[b], c_BN[b] = cell(X[t, b], h_BN[b], c_BN[b], weights)
        y_TBN[t, b] = h_BN[b]
    return y_TBN, h_BN, c_BN


def naive(x_TBD, h_BN, c_BN, weights, at):
    """The same for JAX to differentiate: a Python loop, a product for each gate."""
    outputs = []
    for t in range(T):
        h, c = (jnp.where(at.reset_TB[t][:, None], 0, x) for x in (h_BN, c_BN))
        inner = [
            x_TBD[t] @ weights.input_DGN[:, k]
            + h @ weights.hidden_NGN[:, k]
            + (weights.input_GN + weights.hidden_GN)[k][None]
            for k in range(4)
        ]
        i, f, o = (jax.nn.sigmoid(inner[k]) for k in (0, 1, 3))
        c = f * c + i * jnp.tanh(inner[2])
        valid_B1 = at.valid_TB[t][:, None]
        h_BN = jnp.where(valid_B1, o * jnp.tanh(c), h_BN)
        c_BN = jnp.where(valid_B1, c, c_BN)
        outputs.append(h_BN)
    return jnp.stack(outputs), h_BN, c_BN


def test_a_segment_is_the_cell_token_by_token():
    for resets_BT, lengths in ((RESETS, LENGTHS), (RESETS * False, np.array([T] * B))):
        plain = resets_BT is not RESETS
        at = Places() if plain else recurrent.places(T, resets_BT, lengths)
        found = recurrent.layer(X, H, C, WEIGHTS, at)
        expected = rows_alone(WEIGHTS, resets_BT, lengths)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-13)


def test_gradients_are_those_of_the_naive_loop():
    at = recurrent.places(T, RESETS, LENGTHS)
    by = RANDOM.normal(size=(T, B, N)), *RANDOM.normal(size=(2, B, N))

    def gradients(function):
        def loss(*arrays):
            found = function(*arrays, at)
            return sum((x * w).sum() for x, w in zip(found, by, strict=True))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(X, H, C, WEIGHTS)

    found, expected = gradients(recurrent.layer), gradients(naive)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)
        assert np.abs(y).max() > 0.1


def test_what_is_nan_before_a_reset_or_in_padding_stays_there():
    resets_BT, lengths_B = np.zeros((B, T), bool), np.array([5, T, 2])
    resets_BT[:, 0] = True
    at = recurrent.places(T, resets_BT, lengths_B)
    x_TBD = np.where(at.valid_TB[..., None], X, np.nan)

    @jax.jit
    def gradient(x_TBD, h_BN, c_BN):
        def loss(weights):
            state = LSTMState((h_BN,), (c_BN,))
            outputs, after = recurrent.stack(x_TBD, state, [weights], at)
            return (outputs.raw[0] ** 2).sum(), (outputs, after)

        return jax.value_and_grad(loss, has_aux=True)(WEIGHTS)

    found = gradient(x_TBD, H * np.nan, C * np.nan)
    expected = gradient(np.where(at.valid_TB[..., None], X, 0), H * 0, C * 0)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


def test_dropped_recurrent_weights_show_from_the_second_step_on():
    state = LSTMState((H * 0,), (C * 0,))
    masks = Masks(weight=(RANDOM.random((N, 4, N)) < 0.5,))
    (plain_TBN,), _ = recurrent.stack(X, state, [WEIGHTS], Places())[0]
    rates = Rates(weight=0.25)
    (found_TBN,), _ = recurrent.stack(X, state, [WEIGHTS], Places(), masks, rates)[0]
    np.testing.assert_array_equal(found_TBN[0], plain_TBN[0])
    assert (found_TBN[1] != plain_TBN[1]).all()
    kept_NGN = np.where(masks.weight[0], WEIGHTS.hidden_NGN / 0.75, 0)
    dropped = WEIGHTS._replace(hidden_NGN=kept_NGN)
    y_TBN, *_ = recurrent.layer(X, H * 0, C * 0, dropped, Places())
    np.testing.assert_allclose(found_TBN, y_TBN, atol=1e-15)


def test_a_locked_mask_is_the_same_at_every_step():
    state = LSTMState((H, H), (C, C))
    second = WEIGHTS._replace(input_DGN=RANDOM.normal(size=(N, 4, N)))
    mask_BN, last_BN = RANDOM.random((2, B, N)) < 0.5
    masks, rates = Masks(hidden=(mask_BN,), output_BN=last_BN), Rates(0, 0.2, 0.5)
    arrays = X, state, [WEIGHTS, second], Places(), masks, rates
    outputs, _ = recurrent.stack(*arrays)
    for k, (mask, rate) in enumerate(((mask_BN, 0.2), (last_BN, 0.5))):
        expected_TBN = np.where(mask[None], outputs.raw[k] / (1 - rate), 0)
        np.testing.assert_allclose(outputs.dropped[k], expected_TBN, atol=1e-15)
        assert mask.any() and not mask.all()
    # The second layer reads what is left of the first.
    y_TBN, *_ = recurrent.layer(outputs.dropped[0], H, C, second, Places())
    np.testing.assert_allclose(outputs.raw[1], y_TBN, atol=1e-15)


def test_penalties_are_means_over_rows_of_what_counts():
    y_TBN, at = RANDOM.normal(size=(T, B, N)), recurrent.places(T, RESETS, LENGTHS)
    squares, changes = [], []
    for b in range(B):
        valid = range(LENGTHS[b])
        squares.append(np.mean([y_TBN[t, b] ** 2 for t in valid]))
        pairs = [t for t in valid if t and not RESETS[b, t]]
        change = [(y_TBN[t, b] - y_TBN[t - 1, b]) ** 2 for t in pairs]
        changes.append(np.mean(change))
    assert recurrent.activation_penalty(y_TBN, at) == pytest.approx(np.mean(squares))
    assert recurrent.temporal_penalty(y_TBN, at) == pytest.approx(np.mean(changes))
    whole = (y_TBN**2).mean(), np.square(np.diff(y_TBN, axis=0)).mean()
    assert recurrent.activation_penalty(y_TBN, Places()) == pytest.approx(whole[0])
    assert recurrent.temporal_penalty(y_TBN, Places()) == pytest.approx(whole[1])


def test_penalties_of_nothing_are_0():
    nothing = recurrent.places(T, None, 0)
    for penalty in (recurrent.activation_penalty, recurrent.temporal_penalty):
        assert penalty(np.zeros((T, B, N)), Places()) == 0
        assert penalty(np.full((T, B, N), np.nan), nothing) == 0
    assert recurrent.temporal_penalty(np.ones((1, B, N)), Places()) == 0
