"""The gate of GTrXL: its formula, and what its bias is for."""

import jax
import jax.numpy as jnp
import numpy as np

from xlformer.layers import gating

B, T, D = 2, 3, 5


def _case(bias):
    random = np.random.default_rng(0)
    x_BTD, y_BTD = random.normal(size=(2, B, T, D))
    shapes = (D, 3, D), (D, 2, D), (D, D)
    matrices = (random.normal(size=shape) for shape in shapes)
    return x_BTD, y_BTD, gating.Weights(*matrices, bias + random.normal(size=D))


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _formula(x, y, weights):
    """Of the paper's section 3.2, on vectors."""
    (w_r, w_z, w_h), (u_r, u_z) = (
        np.swapaxes(w, 0, 1) for w in (weights.new_DCE, weights.residual_DCE)
    )
    r = _sigmoid(y @ w_r + x @ u_r)
    z = _sigmoid(y @ w_z + x @ u_z - weights.bias_E)
    h = np.tanh(y @ w_h + (r * x) @ weights.reset_DE)
    return (1 - z) * x + z * h


def test_it_is_the_formula():
    with jax.enable_x64(True):
        x_BTD, y_BTD, weights = _case(bias=0.5)
        found = gating.gru(*map(jnp.asarray, (x_BTD, y_BTD)), weights)
        expected = _formula(x_BTD, y_BTD, weights)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_large_bias_leaves_the_residual_as_it_is():
    def moved(bias):
        x_BTD, y_BTD, weights = _case(bias)
        return np.abs(gating.gru(x_BTD, y_BTD, weights) - x_BTD).max()

    with jax.enable_x64(True):
        assert moved(90.0) == 0 and moved(20.0) < 1e-5 and moved(0.0) > 0.5


def test_the_module_has_six_matrices_and_one_bias_which_is_two():
    x_BTD, y_BTD, _ = _case(bias=0.0)
    module = gating.GRUGate(jax.nn.initializers.normal(0.1), jnp.bfloat16)
    arrays = jnp.asarray(x_BTD, jnp.bfloat16), jnp.asarray(y_BTD, jnp.bfloat16)
    found, variables = module.init_with_output(jax.random.key(0), *arrays)
    assert found.dtype == jnp.bfloat16
    sizes = {name: x.size for name, x in variables["params"].items()}
    assert sizes.pop("bias") == D and (variables["params"]["bias"] == 2).all()
    assert sum(sizes.values()) == 6 * D * D
    # The state of the sub-layer hardly enters a fresh layer: sigmoid(-2) is 0.12.
    assert np.abs(found.astype(float) - arrays[0].astype(float)).max() < 0.5
