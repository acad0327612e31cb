"""Layers recomputed in the backward pass: equal numbers, less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trained_run
from jax import jit

from xlformer import models

V, B, T = 23, 2, 32
TOKENS_BT = np.random.default_rng(1).integers(V, size=(B, T))


def build(**fields):
    fields = (
        dict(n_layer=6, n_head=2, d_model=64, d_inner=64, scan_layers=True) | fields
    )
    config = models.TransformerXLConfig(vocab_size=V, memory_length=T, **fields)
    return models.build(config)


def gradient(model):
    """(params, state) -> gradients, with dropout."""

    def loss(params, state):
        rngs = {"dropout": jax.random.key(0)}
        options = dict(train=True, rngs=rngs)
        return model.apply(params, TOKENS_BT, TOKENS_BT, state, **options)[0].mean()

    return jax.value_and_grad(loss)


@pytest.mark.parametrize("remat", ["attention", "full"])
def test_recomputed_layers_have_the_same_gradients(remat):
    fields = dict(n_layer=2, d_model=8, d_inner=11, dropout=0.3, attention_dropout=0.2)
    with jax.enable_x64(True):
        plain, recomputed = build(**fields), build(remat=remat, **fields)
        params = jax.tree.map(jnp.float64, trained_run.random_params(plain))
        state = plain.init_state(B, jnp.float64)
        arrays = params, state._replace(length_B=state.length_B + 9)
        found, expected = (jit(gradient(m))(*arrays) for m in (recomputed, plain))
        assert "remat" in str(jax.make_jaxpr(gradient(recomputed))(*arrays))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert y.any()
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-9)


def test_memory_is_what_the_layers_keep():
    """full < attention < none, by the outputs and by the scores of attention."""

    def temporaries(remat):
        model = build(remat=remat)
        params = jax.eval_shape(model.init, jax.random.key(0))
        state = jax.eval_shape(lambda: model.init_state(B))
        compiled = jax.jit(gradient(model)).lower(params, state).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    full, attention, none = map(temporaries, ("full", "attention", "none"))
    outputs, scores = 6 * B * T * 64 * 4, 6 * B * 2 * T * 2 * T * 4
    assert 0.8 * outputs < attention - full < 1.5 * outputs
    assert none - attention > 0.8 * scores
