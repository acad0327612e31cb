"""Depth-wise convolution: what a position sees, and its left context."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlformer.layers.separable import SeparableNetwork, depthwise

B, T, F, W, C = 2, 7, 3, 5, 4


pytestmark = pytest.mark.usefixtures("float64")


def given():
    random = np.random.default_rng(0)
    return (random.normal(size=s) for s in ((B, C + T, F), (W, F)))


def by_hand(x_BSF, kernel_WF, start_BT, left):
    """Of the last T positions of [context; x], tap by tap."""
    y_BTF = np.zeros((B, T, F))
    for b, t, w in np.ndindex(B, T, W):
        s = t + w - left
        if start_BT[b, t] <= s < T:
            y_BTF[b, t] += kernel_WF[w] * x_BSF[b, C + s]
    return y_BTF


@pytest.mark.parametrize("causal", [True, False])
def test_sees_what_the_start_lets_it_see(causal):
    x_BSF, kernel_WF = given()
    left = W - 1 if causal else (W - 1) // 2
    # Row 0 with two positions of context, and a reset at 3; row 1 with all of it.
    start_BT = np.array([[-2, -2, -2, 3, 3, 3, 3], [-C] * T])
    expected_BTF = by_hand(x_BSF, kernel_WF, start_BT, left)
    # What is hidden may be NaN, as long as nobody sees it.
    x_BSF[0, : C - 2] = np.nan
    arrays = x_BSF[:, C:], kernel_WF, start_BT, x_BSF[:, :C]
    found_BTF = depthwise(*map(jnp.asarray, arrays), causal=causal)
    np.testing.assert_allclose(found_BTF, expected_BTF, 0, 1e-14)
    whole_BTF = depthwise(*map(jnp.asarray, arrays[:2]), causal=causal)
    expected_BTF = by_hand(x_BSF, kernel_WF, np.zeros((B, T)), left)
    np.testing.assert_allclose(whole_BTF, expected_BTF, 0, 1e-14)


def test_segments_with_their_context_equal_one_pass():
    random = np.random.default_rng(1)
    x_BTF = jnp.asarray(random.normal(size=(B, 9, F)))
    network = SeparableNetwork(11, 0.0, jax.nn.initializers.normal(), jnp.float64)
    params = network.init(jax.random.key(0), x_BTF)
    whole_BTF, inputs = network.apply(params, x_BTF)
    contexts = tuple(x[:, 2:6] for x in inputs)
    start_BT = np.broadcast_to(-4, (B, 3))
    found_BTF, _ = network.apply(params, x_BTF[:, 6:], start_BT, contexts)
    np.testing.assert_allclose(found_BTF, whole_BTF[:, 6:], 0, 1e-14)
