"""The attention layer of each type against the double loop, from its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import jit

from xlformer.kernels.visibility import Visibility
from xlformer.layers import positions
from xlformer.layers.attention import (
    LEARNED_ABSOLUTE,
    LEARNED_RELATIVE,
    RELATIVE,
    SINUSOID,
    Attention,
)

B, T, M, D, H, K, TABLE = 2, 5, 7, 6, 3, 5, 11
S = M + T
TYPES = (RELATIVE, LEARNED_RELATIVE, SINUSOID, LEARNED_ABSOLUTE)


def _layer(attn_type, **fields):
    defaults = dict(
        n_head=H,
        d_head=K,
        attn_type=attn_type,
        own_biases=True,
        table_length=TABLE,
        clamp_length=0,
        dropout=0.0,
        attention_dropout=0.0,
        kernel_init=jax.nn.initializers.normal(1.0),
        dtype=jnp.float32,
    )
    return Attention(**defaults | fields)


def _inputs(attn_type):
    random = np.random.default_rng(0)
    context_BSD = random.normal(size=(B, S, D)).astype(np.float32)
    r_SD = None
    if attn_type == RELATIVE:
        r_SD = np.asarray(positions.sinusoid(positions.distances(S, 0), D, jnp.float32))
    return context_BSD[:, M:], context_BSD, r_SD


def _params(layer, x_BTD, context_BSD, r_SD):
    arrays = x_BTD, context_BSD, Visibility()
    shapes = jax.eval_shape(
        lambda key: layer.init(key, *arrays, r_SD=r_SD)["params"], jax.random.key(0)
    )
    random = np.random.default_rng(1)
    leaves, tree = jax.tree.flatten(shapes)
    leaves = [random.normal(size=x.shape).astype(np.float32) / 2 for x in leaves]
    return jax.tree.unflatten(tree, leaves)


def _expected(params, x_BTD, context_BSD, position_terms, **options):
    """position_terms: q_BTHK -> (u_HK, position queries, r_SHK) of the type."""
    q_BTHK = np.einsum("BTD,DHK->BTHK", x_BTD, params["qkv"][:, 0])
    k_BSHK = np.einsum("BSD,DHK->BSHK", context_BSD, params["qkv"][:, 1])
    v_BSHK = np.einsum("BSD,DHK->BSHK", context_BSD, params["qkv"][:, 2])
    u_HK, qw_BTHK, r_SHK = position_terms(q_BTHK)
    qw_BTHK = None if qw_BTHK is None else qw_BTHK / K**0.5
    y_BTHK = reference.attention(
        (q_BTHK + u_HK) / K**0.5, qw_BTHK, k_BSHK, v_BSHK, r_SHK, **options
    )
    return np.einsum("BTHK,HKD->BTD", y_BTHK, params["output"])


def _check(layer, params, inputs, position_terms, **options):
    x_BTD, context_BSD, r_SD = inputs
    arrays = {"params": params}, x_BTD, context_BSD, Visibility(**options)
    actual, _ = jit(layer.apply)(*arrays, r_SD=r_SD)
    expected = _expected(params, x_BTD, context_BSD, position_terms, **options)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)


def test_type_0_has_sinusoids_projected_and_two_biases():
    layer, inputs = _layer(RELATIVE), _inputs(RELATIVE)
    params = _params(layer, *inputs)
    assert set(params) == {"qkv", "output", "u", "v", "position"}

    def terms(q_BTHK):
        r_SHK = np.einsum("SD,DHK->SHK", inputs[2], params["position"])
        return params["u"], q_BTHK + params["v"], r_SHK

    _check(layer, params, inputs, terms, window=8)


def test_type_0_takes_the_biases_that_all_layers_share():
    own, shared = _layer(RELATIVE), _layer(RELATIVE, own_biases=False)
    x_BTD, context_BSD, r_SD = _inputs(RELATIVE)
    params = _params(own, x_BTD, context_BSD, r_SD)
    arrays = x_BTD, context_BSD, Visibility()
    expected, _ = jit(own.apply)({"params": params}, *arrays, r_SD=r_SD)
    rest = {k: x for k, x in params.items() if k not in "uv"}
    actual, _ = jit(shared.apply)(
        {"params": rest},
        *arrays,
        r_SD=r_SD,
        biases=(params["u"], params["v"]),
    )
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("clamp_length", [0, 3, 100])
@pytest.mark.parametrize("table_length", [S, 5])
def test_type_1_has_a_row_and_a_bias_for_each_distance(clamp_length, table_length):
    """[(q + u).k + q.E_d + b_d] / sqrt(K); far distances repeat the farthest row."""
    layer = _layer(
        LEARNED_RELATIVE, clamp_length=clamp_length, table_length=table_length
    )
    inputs = _inputs(LEARNED_RELATIVE)
    params = _params(layer, *inputs)
    assert set(params) == {"qkv", "output", "u", "distance", "distance_bias"}
    kept = min(clamp_length or table_length, table_length)

    def terms(q_BTHK):
        rows = [table_length - 1 - min(d, kept - 1) for d in range(S)]
        bias_SH1 = params["distance_bias"][rows][..., None]
        r_SHK = np.concatenate([params["distance"][rows], bias_SH1], axis=-1)
        qw_BTHK = np.concatenate([q_BTHK, np.ones((B, T, H, 1))], axis=-1)
        return params["u"], qw_BTHK, r_SHK

    _check(layer, params, inputs, terms)


@pytest.mark.parametrize("attn_type", TYPES)
def test_without_position_terms_it_is_plain_causal_attention(attn_type):
    layer, inputs = _layer(attn_type), _inputs(attn_type)
    params = _params(layer, *inputs)
    for name in params.keys() - {"qkv", "output"}:
        params[name] = np.zeros_like(params[name])
    _check(layer, params, inputs, lambda q_BTHK: (0, None, None))


def test_dropout_of_probabilities_and_outputs_have_keys_of_their_own():
    keys = tuple(jax.random.split(jax.random.key(0)))
    x_BTD, context_BSD, r_SD = _inputs(RELATIVE)
    params = _params(_layer(RELATIVE), x_BTD, context_BSD, r_SD)

    def apply(keys=None, **fields):
        layer = _layer(RELATIVE, **fields)
        arrays = {"params": params}, x_BTD, context_BSD, Visibility()
        return np.asarray(layer.apply(*arrays, r_SD=r_SD, keys=keys)[0])

    plain = apply()
    np.testing.assert_array_equal(apply(dropout=0.5, attention_dropout=0.5), plain)
    outputs = apply(keys, dropout=0.5)
    same = apply((None, keys[1]), dropout=0.5)
    np.testing.assert_array_equal(outputs, same)
    kept = outputs != 0
    np.testing.assert_allclose(outputs[kept], 2 * plain[kept], rtol=1e-5)
    assert 0.2 < kept.mean() < 0.8
    probabilities = apply(keys, attention_dropout=0.5)
    assert (probabilities != plain).mean() > 0.9
    same = apply((keys[0], None), attention_dropout=0.5)
    np.testing.assert_array_equal(probabilities, same)
