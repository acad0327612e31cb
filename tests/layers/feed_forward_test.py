"""Dropout, layer normalisation and the feed-forward network."""

import jax
import jax.numpy as jnp
import numpy as np

from xlformer.layers.feed_forward import FeedForward, LayerNorm, dropout, layer_norm

B, T, D, F = 2, 3, 5, 7


def test_dropout_keeps_the_mean_and_the_dtype():
    x = jnp.ones((101, 103), jnp.bfloat16)
    y = dropout(x, 0.25, jax.random.key(0))
    assert y.dtype == x.dtype
    y = np.asarray(y, float)
    kept = y != 0
    assert abs(kept.mean() - 0.75) < 0.02
    np.testing.assert_allclose(y[kept], 1 / 0.75, rtol=0.005)


def test_dropout_is_off_without_a_key_or_a_rate():
    x = jnp.ones(3)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def _norm(x, scale, bias, epsilon):
    x = np.asarray(x, np.float64)
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(
        x.var(-1, keepdims=True) + epsilon
    )
    return normal * np.asarray(scale) + np.asarray(bias)


def test_layer_norm_is_the_formula():
    random = np.random.default_rng(0)
    x = random.normal(size=(B, T, D)).astype(np.float32)
    scale_D, bias_D = random.normal(size=(2, D)).astype(np.float32)
    # A large epsilon: its place in the formula shows.
    actual = layer_norm(x, scale_D, bias_D, 0.5)
    np.testing.assert_allclose(actual, _norm(x, scale_D, bias_D, 0.5), atol=1e-5)


def test_layer_norm_has_exact_statistics_in_bfloat16():
    # 256 + 1 is not a bfloat16: a mean in bfloat16 would be off by a half.
    x = jnp.asarray([[256.0, 258.0, 260.0, 262.0]], jnp.bfloat16)
    y = layer_norm(x, jnp.ones(4), jnp.zeros(4), 1e-5)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(float), _norm(x, 1, 0, 1e-5), atol=0.01)


def test_layer_norm_module_starts_as_the_plain_norm():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    y, params = LayerNorm(1e-5).init_with_output(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, params["params"]) == {"scale": (D,), "bias": (D,)}
    np.testing.assert_allclose(y, _norm(x, 1, 0, 1e-5), atol=1e-5)


def _feed_forward(rate=0.0):
    random = np.random.default_rng(0)
    shapes = dict(in_kernel=(D, F), in_bias=F, out_kernel=(F, D), out_bias=D)
    params = {k: random.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    module = FeedForward(F, rate, jax.nn.initializers.zeros, jnp.float32)
    return module, params, random.normal(size=(B, T, D)).astype(np.float32)


def test_feed_forward_is_the_formula():
    module, params, x = _feed_forward()
    hidden = np.maximum(x @ params["in_kernel"] + params["in_bias"], 0)
    expected = hidden @ params["out_kernel"] + params["out_bias"]
    actual = module.apply({"params": params}, x)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_feed_forward_drops_hidden_units_and_outputs():
    module, params, x = _feed_forward(rate=0.5)
    keys = jax.random.split(jax.random.key(0))
    hidden = np.maximum(x @ params["in_kernel"] + params["in_bias"], 0)
    hidden = np.asarray(dropout(jnp.asarray(hidden), 0.5, keys[0]))
    output = hidden @ params["out_kernel"] + params["out_bias"]
    expected = dropout(jnp.asarray(output), 0.5, keys[1])
    actual = module.apply({"params": params}, x, keys)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
