"""Transformer-XL with gated residuals: GTrXL's program, formulas and promises."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_transformer as small
from golden import check
from small_transformer import D

from xlformer import convert, models, testing
from xlformer.errors import UserError
from xlformer.models import TransformerXLConfig

GOLDEN = pathlib.Path(check.__file__).parent
GATED = {"gate": "gru", "memory_length": 5}


pytestmark = pytest.mark.usefixtures("float64")


def test_keeps_the_contract():
    testing.check_model(small.build(**GATED, dropout=0.3))


@pytest.mark.parametrize("name", ["gtrxl_gate", "gtrxl_model"])
def test_equals_the_program_and_the_papers_form(name):
    result = check.check(GOLDEN / f"{name}.npz")
    assert result.ok, result.problems
    assert result.compared == result.total == {"gate": 10, "model": 74}[name[6:]]


def test_a_program_with_more_layers_than_ours_is_refused():
    with np.load(GOLDEN / "gtrxl_model.npz") as file:
        arrays = dict(file)
    config = {"d_model": 8, "head_dim": 4, "heads": 2, "n_layer": 1, "memory_len": 6}
    kind = check._kind_of(None, set(arrays), config)
    with pytest.raises(UserError, match=r"^params/layers.1.attention.* no counterpart"):
        kind.compare(arrays, config | {"mlp_hidden": 8}, np.float64)


def test_closed_gates_make_the_layers_the_identity():
    model = small.build(**GATED)
    params = small.weights(model)["trunk"]
    layers = dict(params["layers"])
    for name in ("attention_gate", "feed_forward_gate"):
        layers[name] = layers[name] | {"bias": np.full((2, D), 90.0)}
    x_BTD = np.random.default_rng(0).normal(size=(3, 7, D))
    state = model.init_state(3, jnp.float64)
    apply = jax.jit(model.trunk.apply)
    found, after, _ = apply(params | {"layers": layers}, x_BTD, state)
    small.close(found, x_BTD, tolerance=0)
    # So the memory of both layers is the input.
    small.close(after.hidden_LBMD, np.stack([x_BTD[:, -5:]] * 2), tolerance=0)
    assert np.abs(apply(params, x_BTD, state)[0] - x_BTD).max() > 0.1


def test_a_gate_says_where_the_norms_are():
    gated, both = small.build(**GATED), small.build(**GATED, pre_norm=True)
    assert gated.config.norm_first and not small.build().config.norm_first
    tokens_BT, state = small.tokens(2, 7), gated.init_state(2, jnp.float64)
    arrays = small.weights(gated), tokens_BT, tokens_BT, state
    found, expected = (str(jax.make_jaxpr(m.apply)(*arrays)) for m in (gated, both))
    assert found == expected


def test_it_adds_two_gates_and_a_bias_to_each_layer():
    def count(**fields):
        params = jax.eval_shape(small.build(**fields).init, jax.random.key(0))
        return sum(math.prod(x.shape) for x in jax.tree.leaves(params))

    added = 2 * (12 * D * D + 2 * D + D)
    assert count(**GATED) - count(memory_length=5, pre_norm=True) == added


def test_the_matrices_of_both_gates_are_split():
    model = small.build(**GATED)
    params = jax.eval_shape(model.init, jax.random.key(0))
    layers = model.param_axes(params)["trunk"]["layers"]
    for name in ("attention_gate", "feed_forward_gate"):
        assert layers[name] == {
            "new_kernel": (None, "embed", None, "mlp"),
            "residual_kernel": (None, "embed", None, "mlp"),
            "reset_kernel": (None, "embed", "mlp"),
            "bias": (None, None),
        }


def test_the_original_has_no_gates():
    config = small.build(gate="gru").config
    line = "^config.model.gate='gru': the original has none such, it has 'none'$"
    with pytest.raises(UserError, match=line):
        convert.to_original(config, small.weights(small.build(gate="gru")))
    with pytest.raises(UserError, match="gate='lstm' is none of none, gru"):
        TransformerXLConfig(gate="lstm")


def test_it_keeps_and_sums_more_than_an_ungated_model():
    plain, gated = small.build(), small.build(gate="gru")
    assert gated.kept_for_backward() > plain.kept_for_backward()
    assert gated.summed_activations() > plain.summed_activations()
    assert models.tiny({"name": "transformer_xl", "gate": "gru"})["gate"] == "gru"
