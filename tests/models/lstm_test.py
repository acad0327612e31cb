"""LSTM models: the contract with everything on, what is drawn, what is refused."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlformer import models, sharding, testing
from xlformer.errors import UserError
from xlformer.kernels.dropout import Keys
from xlformer.models import LSTMConfig, lstm
from xlformer.models.parameters import abstract_params

V, B, T = 23, 4, 7
EVERYTHING = LSTMConfig(
    vocab_size=V,
    n_layer=2,
    d_model=8,
    d_hidden=12,
    cutoffs=(7, 13),
    dropout=0.3,
    hidden_dropout=0.2,
    input_dropout=0.2,
    word_dropout=0.3,
    weight_dropout=0.4,
    activation_penalty=2.0,
    temporal_penalty=1.0,
)
RATES = ("dropout", "hidden_dropout", "input_dropout", "word_dropout", "weight_dropout")
TOKENS = np.random.default_rng(0).integers(V, size=(B, T + 1))
IDS = TOKENS[:, :-1], TOKENS[:, 1:]


def build(**fields):
    return models.build(dataclasses.replace(EVERYTHING, **fields))


def only(**fields):
    """A model with one kind of dropout, or with none."""
    penalties = {"activation_penalty": 0.0, "temporal_penalty": 0.0}
    return build(**dict.fromkeys(RATES, 0.0) | penalties | fields)


def weights(model, dtype="float32"):
    """Large ones, without compiling init."""
    random = np.random.default_rng(1)
    shapes = abstract_params(model)
    return jax.tree.map(
        lambda x: (random.normal(size=x.shape) * x.size**-0.25).astype(dtype), shapes
    )


def test_it_keeps_the_contract_with_everything_on():
    testing.check_model(build())


def test_the_last_layer_of_an_untied_model_keeps_its_width():
    model = only(tie_weights=False, n_layer=3)
    assert model.config.widths == (8, 12, 12, 12) and not model.needs_rngs
    assert build(n_layer=3).config.widths == (8, 12, 12, 8)
    assert build(n_layer=1).config.widths == (8, 8)
    shapes = abstract_params(model)
    assert shapes["embedding"]["table"].shape == (V, 8)
    assert shapes["softmax"]["table"].shape == (V, 12)
    assert shapes["softmax"]["cluster_kernel"].shape == (2, 12)
    start = weights(model), model.init_state(B)
    nll_BT, state, _ = jax.jit(model.apply)(start[0], *IDS, start[1])
    log_p_BTV, _ = jax.jit(model.log_probs)(start[0], IDS[0], start[1])
    picked_BT = np.take_along_axis(np.asarray(log_p_BTV), IDS[1][..., None], 2)[..., 0]
    np.testing.assert_allclose(nll_BT, -picked_BT, atol=1e-5)
    assert [h.shape for h in state.h] == [(B, 12)] * 3


@pytest.mark.parametrize("rate", RATES)
def test_each_rate_drops_by_itself(rate):
    model = only(**{rate: 0.5})
    assert model.needs_rngs and not only().needs_rngs
    masks = lstm.draw(
        model.config, Keys(jax.random.key(0), jax.random.split(jax.random.key(1), B))
    )
    drawn = len(jax.tree.leaves(masks))
    assert drawn == {"word_dropout": 0, "weight_dropout": 2}.get(rate, 1)


def test_masks_of_rows_follow_their_keys_and_those_of_weights_the_shared_one():
    rows_B = jax.random.split(jax.random.key(1), B)
    masks = lstm.draw(build().config, Keys(jax.random.key(0), rows_B))
    other = lstm.draw(build().config, Keys(jax.random.key(2), rows_B[::-1]))
    for name in ("input_BD", "output_BN"):
        mask = getattr(masks, name)
        assert (mask[::-1] == getattr(other, name)).all() and (mask[0] != mask[1]).any()
    assert (masks.hidden[0][::-1] == other.hidden[0]).all()
    assert (masks.weight[0] != other.weight[0]).any()
    assert [x.shape for x in masks.weight] == [(12, 4, 12), (8, 4, 8)]


def test_word_dropout_zeroes_all_occurrences_on_the_input_side_alone():
    model = only(word_dropout=0.5, cutoffs=(), d_hidden=8)
    untied = models.build(dataclasses.replace(model.config, tie_weights=False))
    params, state = weights(model), model.init_state(B)
    train = jax.jit(lambda *arrays, rngs: model.apply(*arrays, train=True, rngs=rngs))
    score = jax.jit(untied.apply)
    # One word everywhere, so that a step of training is scoring with an embedding that
    # is doubled, or 0, and the softmax's as it was.
    inputs_BT, table = np.full((B, T), 3), params["embedding"]
    params |= {"softmax": params["softmax"] | table}
    expected = [
        score(
            params | {"embedding": {"table": table["table"] * factor}},
            inputs_BT,
            IDS[1],
            state,
        )[0]
        for factor in (0, 2)
    ]
    params["softmax"] = {"bias": params["softmax"]["bias"]}
    found = set()
    for seed in range(6):
        rngs = {"dropout": jax.random.key(seed)}
        nll_BT, *_ = train(params, inputs_BT, IDS[1], state, rngs=rngs)
        close = [np.allclose(nll_BT, x, atol=1e-5) for x in expected]
        assert sum(close) == 1
        found.add(close.index(True))
    assert found == {0, 1}


def test_penalties_are_in_the_loss_of_training_alone():
    model = only(activation_penalty=2.0, temporal_penalty=3.0)
    arrays = weights(model), *IDS, model.init_state(B)
    *_, aux = jax.jit(model.apply)(*arrays)
    assert aux.loss == 0 and aux.metrics == {}
    *_, aux = jax.jit(functools.partial(model.apply, train=True))(*arrays)
    ar, tar = aux.metrics["lstm/ar"], aux.metrics["lstm/tar"]
    assert ar > 0 and tar > 0 and aux.loss == pytest.approx(2 * ar + 3 * tar)
    *_, aux = jax.eval_shape(functools.partial(only().apply, train=True), *arrays)
    assert aux.metrics == {}


def test_cells_are_kept_in_float32_at_least():
    model = only(dtype="bfloat16")
    state = model.init_state(B)
    nll_BT, after, _ = jax.eval_shape(model.apply, weights(model), *IDS, state)
    for found in (state, after):
        assert {x.dtype for x in found.h} == {jnp.dtype("bfloat16")}
        assert {x.dtype for x in found.c} == {jnp.dtype("float32")}
    assert nll_BT.dtype == np.float32


def test_init_is_that_of_the_original():
    model = only(d_model=30, d_hidden=49, vocab_size=101)
    params = jax.jit(model.init)(jax.random.key(0))
    first, last = params["trunk"]["lstm_0"], params["trunk"]["lstm_1"]
    for x, limit in (
        (params["embedding"]["table"], 0.1),
        (first["input_kernel"], 1 / 7),
        (first["hidden_kernel"], 1 / 7),
        (first["hidden_bias"], 1 / 7),
        (last["input_kernel"], 30**-0.5),
    ):
        assert 0.9 * limit < np.abs(x).max() <= limit and abs(x.mean()) < limit / 5
        assert x.dtype == np.float32
    for name in ("bias", "cluster_kernel", "cluster_bias"):
        assert not params["softmax"][name].any()


COMPUTATION = re.compile(r"^%?([\w.\-]+) \(.*?\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
BODY = re.compile(r"body=%?([\w.\-]+)")
SENT = re.compile(r"f64\[([\d,]*)\]\S* (?:all-|reduce-scatter|collective-)")


def test_a_mesh_gives_one_devices_numbers_and_no_weights_cross_it_in_the_loop():
    rngs = {
        "dropout": jax.random.key(2),
        "rows": jax.random.split(jax.random.key(3), B),
    }
    model = build()
    with jax.enable_x64(True):
        params = weights(model, "float64")
        state = model.init_state(B, jnp.float64)

        @jax.jit
        def gradient(params, state, inputs_BT, targets_BT, rows):
            def loss(params):
                options = dict(train=True, rngs={**rngs, "rows": rows})
                nll_BT, after, aux = model.apply(
                    params, inputs_BT, targets_BT, state, **options
                )
                return nll_BT.mean() + aux.loss, (nll_BT, after, aux)

            return jax.value_and_grad(loss, has_aux=True)(params)

        arrays = params, state, *IDS, rngs["rows"]
        expected = gradient(*arrays)
        mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
        placed = sharding.parameters(mesh, params, model.param_axes(params))
        split = sharding.model_state(mesh, state, model.state_axes())
        batch = dict(zip("xyk", arrays[2:], strict=True))
        rows = sharding.Rows(mesh, B).shardings(batch)
        arrays = jax.device_put(
            arrays, (placed, split, rows["x"], rows["y"], rows["k"])
        )
        with jax.set_mesh(mesh):
            compiled = gradient.lower(*arrays).compile()
            found = compiled(*arrays)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)
    text = compiled.as_text()
    computations = dict(COMPUTATION.findall(text))
    bodies = {name: computations[name] for name in BODY.findall(text)}
    sent = sorted(shape for body in bodies.values() for shape in SENT.findall(body))
    # A step gathers the outputs of each layer forward, and backward it sums their
    # gradients: [B, N] numbers of the one row that a device has.
    assert sent == ["1,12", "1,12", "1,8", "1,8"]


def test_units_that_tensor_does_not_divide_are_refused():
    mesh = types.SimpleNamespace(shape={"tensor": 3})
    build(d_model=9, d_hidden=12).check_mesh(mesh)
    line = "config.model.d_hidden=11 is not divisible by config.mesh.tensor=3"
    with pytest.raises(UserError, match=line):
        build(d_model=9, d_hidden=11).check_mesh(mesh)
    with pytest.raises(UserError, match="config.model.d_model=8 is not divisible"):
        build().check_mesh(mesh)
    # Untied it is the width of no layer's units; nor is d_hidden in a single tied one.
    build(tie_weights=False).check_mesh(mesh)
    build(n_layer=1, d_model=9, d_hidden=11).check_mesh(mesh)


def test_flops_are_those_of_the_products():
    counted = build(cutoffs=()).flops(batch_size=2, segment_length=5)
    layers = 4 * 12 * (8 + 12) + 4 * 8 * (12 + 8)
    assert counted.forward == 2 * 10 * (layers + 8 * V)
    assert counted.training == 3 * counted.forward
    assert build().kept_for_backward() == 8 + 6 * 12 + 12 + 6 * 8 + 8 * 12
    assert build().summed_activations() == 2 * (12 + 8) + 8 + 12
    assert build().to_save_memory() == {}


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"d_hidden": 0}, "config.model.d_hidden=0 must be at least 1"),
        ({"word_dropout": 1.0}, "config.model.word_dropout=1.0 must be at least 0"),
        ({"temporal_penalty": -1.0}, "config.model.temporal_penalty=-1.0 must be"),
        ({"tie_weights": 1}, "config.model.tie_weights=1 is not of type bool"),
        ({"cutoffs": [7, 7]}, "config.model.cutoffs=.7, 7. must ascend"),
        ({"cutoffs": [29]}, "config.model.cutoffs=.29,. reach beyond the vocabulary"),
    ],
)
def test_an_impossible_config_is_refused(fields, line):
    with pytest.raises(UserError, match=line):
        build(**fields)
