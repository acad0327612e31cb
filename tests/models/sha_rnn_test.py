"""SHA-RNN: the contract, the program's numbers, what it carries, what is refused."""

import dataclasses
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import check

from xlformer import config as config_lib
from xlformer import models, scoring, testing
from xlformer.errors import UserError
from xlformer.models import SHARNNConfig, sha_rnn
from xlformer.models.parameters import abstract_params

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
V, B, T = 23, 3, 5
EVERYTHING = SHARNNConfig(
    vocab_size=V,
    n_layer=1,
    d_model=8,
    d_inner=16,
    attention="all",
    memory_length=29,
    dropout=0.3,
    hidden_dropout=0.2,
    input_dropout=0.2,
)
RATES = ("dropout", "hidden_dropout", "input_dropout")
TOKENS = np.random.default_rng(0).integers(V, size=(B, T + 1))
IDS = TOKENS[:, :-1], TOKENS[:, 1:]


def build(**fields):
    return models.build(dataclasses.replace(EVERYTHING, **fields))


def only(**fields):
    """A model of three blocks with one kind of dropout, or with none."""
    three = {"n_layer": 3, "attention": "second_last"}
    return build(**dict.fromkeys(RATES, 0.0) | three | fields)


def weights(model):
    """Large ones, without compiling init."""
    random = np.random.default_rng(1)
    shapes = abstract_params(model)
    return jax.tree.map(lambda x: random.normal(size=x.shape) * x.size**-0.25, shapes)


def count(model):
    shapes = abstract_params(model)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_it_keeps_the_contract_with_everything_on():
    testing.check_model(build())


def test_it_has_the_programs_numbers_and_gradients():
    result = check.check(GOLDEN / "sha_rnn.npz")
    assert result.ok, result
    assert result.compared == result.total == 83


def test_without_attention_there_is_no_memory():
    model = only(attention="none", memory_length=0)
    state = model.init_state(B)
    assert state.memory == () and len(jax.tree.leaves(state)) == 2 * 3
    assert model.state_axes().memory == ()
    _, after, _ = jax.eval_shape(model.apply, weights(model), *IDS, state)
    assert after.memory == ()
    line = "memory_length=5 with config.model.attention='none'"
    with pytest.raises(UserError, match=line):
        model.for_reading(memory_length=5)
    assert model.for_reading(memory_length=-1) == model


def test_a_memory_of_another_length_is_read():
    model = only().for_reading(memory_length=7)
    assert model.init_state(B).memory.rows[0].shape == (B, 7, 8)
    assert model.card()["memory_length"] == 7 and model.memory_length is None
    assert model.card()["attention"] == "second_last"


def test_gates_begin_at_a_half_and_norms_at_one():
    params = jax.jit(only().init)(jax.random.key(0))
    block = params["trunk"]["block_1"]
    attention = block["attention"]
    for name in ("query_gate", "key_gate", "value_gate"):
        assert (jax.nn.sigmoid(attention[name]) == 0.5).all()
    assert (block["memory_scale"] == 1).all() and (attention["norm_scale"] == 1).all()
    for x in (params["embedding"]["table"], block["boom"]["kernel"]):
        assert np.std(x) == pytest.approx(0.1 * 8**-0.5, rel=0.2)
    assert "attention" not in params["trunk"]["block_0"]


def test_generation_reads_in_parts_what_it_reads_one_by_one():
    model = only(memory_length=5, n_layer=2).for_generation()
    assert (model.config.window, model.longest_segment) == (4, 64)
    assert model.for_generation() == model
    # A window of one's own, too, leaves room for a part of a prompt.
    own = only(memory_length=7, window=3).for_generation()
    assert (own.config.window, own.longest_segment) == (3, 64)
    tiny = build(memory_length=80, window=50).config.tiny()
    assert (tiny.memory_length, tiny.window) == (29, 4)
    with jax.enable_x64(True):
        params, ids_BN = weights(model), np.tile(IDS[0], 3)
        run = jax.jit(model.log_probs)

        def last(sizes):
            state, start = model.init_state(B, jnp.float64), 0
            for size in sizes:
                found, state = run(params, ids_BN[:, start : start + size], state)
                start += size
            return found[:, -1]

        np.testing.assert_allclose(last([8, 5]), last([1] * 13), atol=1e-13)
    none = only(attention="none", memory_length=0)
    assert none.for_generation() is none and none.longest_segment is None


def test_collapsed_it_is_smaller_and_the_same():
    for attention in ("second_last", "all"):
        model = only(attention=attention, n_layer=2)
        with jax.enable_x64(True):
            params = weights(model)
            config, smaller = sha_rnn.collapse(model.config, params)
            collapsed = models.build(config)
            shapes = jax.eval_shape(collapsed.init, jax.random.key(0))
            assert jax.tree.map(np.shape, smaller) == jax.tree.map(np.shape, shapes)
            blocks = len(config.attending)
            assert count(model) - count(collapsed) == blocks * 2 * 8 * (8 + 1)
            state = model.init_state(B, jnp.float64)
            expected, _ = jax.jit(model.log_probs)(params, IDS[0], state)
            found, _ = jax.jit(collapsed.log_probs)(smaller, IDS[0], state)
            np.testing.assert_allclose(found, expected, atol=1e-13)
            assert sha_rnn.collapse(config, smaller) == (config, smaller)


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"attention": "none", "memory_length": 0}, 50_640_077),
        ({}, 53_798_093),
        ({"collapsed": True}, 51_698_893),
        ({"attention": "all"}, 63_272_141),
        ({"attention": "all", "collapsed": True}, 54_875_341),
    ],
)
def test_counts_are_the_programs(fields, parameters):
    assert count(models.build(SHARNNConfig(**fields), vocab_size=205)) == parameters


@pytest.mark.parametrize("rate", RATES)
def test_each_rate_drops_by_itself(rate):
    model = only(**{rate: 0.5})
    assert model.needs_rngs and not only().needs_rngs


def test_flops_are_those_of_the_products():
    counted = only().flops(batch_size=2, segment_length=T)
    assert counted.blocks == 2 * 10 * 3 * (8 * 8 * 8 + 8 * 16)
    assert counted.queries == 2 * 10 * 8 * 8 + 2 * 2 * 8 * 8
    # Each query sees itself and those before it, and 24 slots.
    assert counted.own == 2 * 2 * 2 * 8 * (1 + 2 + 3 + 4 + 5)
    assert counted.memory == 2 * 2 * 2 * 8 * 5 * 24
    assert counted.vocabulary == 2 * 10 * 8 * V
    assert counted.training == 3 * counted.forward - counted.memory
    none = only(attention="none", memory_length=0)
    none = none.flops(batch_size=2, segment_length=T)
    assert none.queries == none.own == none.memory == 0


def test_a_segment_longer_than_the_memory_is_refused():
    model = only(memory_length=4)
    line = "a segment of 5 tokens, but config.model.memory_length=4"
    with pytest.raises(UserError, match=line):
        jax.eval_shape(model.apply, weights(model), *IDS, model.init_state(B))


def test_a_last_segment_is_scored_without_its_padding():
    """Three tokens of five hide three old ones of the seven places, not five."""
    model, tokens = only(n_layer=1, attention="all", memory_length=7), TOKENS.ravel()
    params, apply = jax.tree.map(np.float32, weights(model)), jax.jit(model.apply)
    state, nats, ends = model.init_state(1), 0.0, (*range(0, 14, T), 13)
    for start, stop in zip(ends, ends[1:], strict=False):
        part = tokens[None, start : stop + 1]
        nll_BT, state, _ = apply(params, part[:, :-1], part[:, 1:], state)
        nats += float(nll_BT.sum())
    plan = scoring.cut_rows_for(model, 14, batch_size=1, segment_length=T)
    score = scoring.Evaluator.of(model, plan, None).score(params, tokens[:14], plan)
    assert score.nats == pytest.approx(nats, rel=1e-6)
    assert not only(window=2).positions_from_end  # None of these is hidden by padding.
    without = build(attention="none", memory_length=0)
    assert model.positions_from_end and not without.positions_from_end


def test_validation_reads_segments_that_its_own_memory_holds():
    config = config_lib.load("sha_rnn_small:debug").unlock()
    config.eval.update(memory_length=4, segment_length=5)
    line = "config.eval.segment_length=5 is more than the 4 tokens that SHARNN takes"
    with pytest.raises(UserError, match=line):
        config_lib.check(config)
    config.eval.update(memory_length=31, segment_length=31)  # 29 in training
    config_lib.check(config)


def test_units_that_tensor_does_not_divide_are_refused():
    line = "config.model.d_model=8 is not divisible by config.mesh.tensor=3"
    with pytest.raises(UserError, match=line):
        build().check_mesh(types.SimpleNamespace(shape={"tensor": 3}))


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"d_inner": 12},
            "config.model.d_inner=12 is no multiple of config.model.d_mo",
        ),
        ({"attention": "second_last"}, "n_layer=1: there is no such block"),
        ({"attention": "some"}, "config.model.attention='some' is none of"),
        ({"window": 29}, "config.model.window=29 with config.model.memory_length=29"),
        ({"memory_length": 0}, "memory_length=0 with config.model.attention='all'"),
        (
            {"attention": "none", "memory_length": 0, "collapsed": True},
            "collapsed=True with config.model.attention='none'",
        ),
    ],
)
def test_an_impossible_config_is_refused(fields, line):
    with pytest.raises(UserError, match=line):
        build(**fields)
