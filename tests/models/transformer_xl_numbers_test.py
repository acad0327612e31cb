"""Transformer-XL as numbers: dropout, dtypes, gradients, what may be NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_transformer as small
import trained_run
from jax import jit
from small_transformer import TINY, D

from xlformer import models

pytestmark = pytest.mark.usefixtures("float64")


def _train(model, key, **options):
    tokens_BT = small.tokens(3, 7)
    rngs = {"dropout": jax.random.key(key)}
    return small.score(model, tokens_BT, [5, 2], train=True, rngs=rngs, **options)[0]


def test_scanned_and_unrolled_layers_drop_the_same_units():
    fields = dict(dropout=0.3, attention_dropout=0.2)
    scanned, unrolled = small.build(**fields), small.build(**fields, scan_layers=False)
    params = small.weights(scanned)
    small.close(_train(scanned, 0, params=params), _train(unrolled, 0, params=params))


def test_dropout_without_a_key_is_an_error():
    model, tokens_BT = small.build(dropout=0.3), small.tokens(3, 5)
    arrays = tokens_BT, tokens_BT, model.init_state(3, jnp.float64)
    for rngs in (None, {}, {"params": jax.random.key(0)}):
        with pytest.raises(ValueError, match="needs rngs={'dropout': key}"):
            model.apply(small.weights(model), *arrays, train=True, rngs=rngs)
    # Without a rate there is nothing to draw.
    small.score(small.build(), tokens_BT, [5], train=True)


def test_log_probs_pass_no_gradient_on():
    model, tokens_BT = small.build(), small.tokens(2, 5)
    _, warm = small.score(model, tokens_BT, [5])

    def later(params, hidden_LBMD):
        state = warm._replace(hidden_LBMD=hidden_LBMD)
        log_probs_BTV, state = model.log_probs(params, tokens_BT, state)
        return log_probs_BTV.sum() * 0 + state.hidden_LBMD.sum(), log_probs_BTV.sum()

    grad = jit(jax.grad(lambda *a: later(*a)[0]))(
        small.weights(model), warm.hidden_LBMD
    )
    assert not any(g.any() for g in jax.tree.leaves(grad))
    grad = jit(jax.grad(lambda *a: later(*a)[1], 1))(
        small.weights(model), warm.hidden_LBMD
    )
    assert not grad.any()


def test_bfloat16_computes_near_float32_and_scores_in_float32():
    exact, low = small.build(dtype="float32"), small.build(dtype="bfloat16")
    params, tokens_BT = small.weights(exact, "float32"), small.tokens(2, 7)

    def score(model):
        state = model.init_state(2)
        return small.score(model, tokens_BT, [5, 2], params=params, state=state)

    (expected, _), (nll_BT, state) = score(exact), score(low)
    assert state.hidden_LBMD.dtype == jnp.bfloat16 and nll_BT.dtype == np.float32
    small.close(nll_BT, expected, tolerance=0.15)
    assert np.abs(nll_BT - expected).max() > 1e-4


def test_init_is_float32_with_the_originals_spreads():
    fields = dict(d_model=64, d_inner=128, cutoffs=(101,), div_val=2, vocab_size=501)
    model = small.build(**fields)
    params = jit(model.init)(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    layers, softmax = params["trunk"]["layers"], params["softmax"]
    expected = [
        (layers["attention"]["qkv"], 0, 0.02),
        (params["embedding"]["table_0"], 0, 0.02),
        (params["embedding"]["projection_1"], 0, 0.01),
        (softmax["cluster_kernel"], 0, 0.02),
        (layers["norm"]["scale"], 1, 0.02),
        (layers["norm"]["bias"], 0, 0),
        (softmax["bias"], 0, 0),
    ]
    for x, mean, deviation in expected:
        x = np.asarray(x)
        assert abs(x.mean() - mean) <= 5 * deviation / x.size**0.5
        assert abs(x.std() - deviation) <= 4 * deviation / x.size**0.5
    # No two layers start alike.
    assert (layers["attention"]["qkv"][0] != layers["attention"]["qkv"][1]).all()


def test_types_2_and_3_take_memory_where_it_is_allowed():
    for fields in (dict(attn_type=2), dict(attn_type=3, table_length=20)):
        model = small.build(**fields, allow_incoherent_positions=True)
        nll_BN, state = small.score(model, small.tokens(2, 12), [5, 7])
        assert np.isfinite(nll_BN).all() and state.length_B.tolist() == [12, 12]
        assert not model.segments_equal_one_pass


@pytest.mark.parametrize("fields", [{}, {"pre_norm": True, "window": 4}])
def test_what_is_hidden_may_be_nan(fields):
    """In memory, padding, or before a reset: neither values nor gradients know."""
    model, random = small.build(**fields), np.random.default_rng(0)
    x_BTD, params = random.normal(size=(3, 7, D)), small.weights(model)["trunk"]
    resets_BT, lengths_B = np.zeros((3, 7), bool), np.array([7, 5, 7])
    resets_BT[[0, 1, 2], [0, 0, 4]] = True
    seen_BT1 = (np.arange(7) < lengths_B[:, None])[..., None]
    seen_BT1[2, :4] = False  # before the reset

    @jit
    def found(x_BTD, state, resets_BT):
        def loss(params, x_BTD):
            options = {"resets_BT": resets_BT, "lengths_B": lengths_B}
            y_BTD, _, _ = model.trunk.apply(params, x_BTD, state, **options)
            return jnp.sin(jnp.where(seen_BT1, y_BTD, 0)).sum(), y_BTD

        grads, y_BTD = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x_BTD)
        return *grads, y_BTD

    state = model.init_state(3, jnp.float64)
    state = state._replace(length_B=state.length_B + 9)
    lost = state._replace(hidden_LBMD=state.hidden_LBMD * jnp.nan)
    _, dx_BTD, y_BTD = found(x_BTD, state, resets_BT)
    nan_BTD = np.where(seen_BT1, x_BTD, np.nan)
    _, lost_dx_BTD, lost_BTD = found(nan_BTD, lost, resets_BT)
    for actual, expected in ((lost_BTD, y_BTD), (lost_dx_BTD, dx_BTD)):
        actual, expected = (np.where(seen_BT1, x, 0) for x in (actual, expected))
        np.testing.assert_allclose(actual, expected, atol=TINY)
    # Where no query is NaN itself, the parameters' gradients are numbers too.
    resets_BT[2, 0] = True
    grads, expected = (found(x_BTD, x, resets_BT)[0] for x in (lost, state))
    for x, y in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        np.testing.assert_allclose(x, y, atol=TINY)
    # And what is seen stays NaN.
    resets_BT[0] = False
    _, _, y_BTD = found(x_BTD, lost, resets_BT)
    assert np.isnan(y_BTD[0, 0]).all() and np.isfinite(y_BTD[1:]).all()


def test_parameters_may_be_arrays_of_numpy():
    """What conversion gives: a gradient in them, not under jit, indexes no numpy."""
    fields = {"cutoffs": (7, 13), "div_val": 2, "d_embed": 16, "vocab_size": 23}
    fields |= {"n_layer": 1, "d_model": 16, "n_head": 2, "memory_length": 4}
    model = models.build(models.TransformerXLConfig(**fields))
    params = trained_run.random_params(model)
    state, x_BTD = model.init_state(2), np.ones((2, 5, 16), np.float32)

    def both(ids_BT):
        def scored(params):
            y_BTD, _, _ = model.trunk.apply(params, x_BTD, state)
            log_p_BTV, _ = model.log_probs(params, ids_BT, state)
            nll_BT, _, _ = model.apply(params, ids_BT, ids_BT, state)
            return nll_BT.sum() + log_p_BTV.sum() + y_BTD.sum()

        return jax.grad(scored)(params)

    found = jax.eval_shape(both, jax.ShapeDtypeStruct((2, 5), "int32"))
    shapes = jax.tree.map(lambda x, y: x.shape == y.shape, found, params)
    assert all(jax.tree.leaves(shapes))
