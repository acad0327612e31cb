"""The Universal Transformer: the contract of two forms, and what its paper claims."""

import functools
import math
import pathlib

import halting_steps
import jax
import numpy as np
import pytest
from golden import check

from xlformer import models, testing
from xlformer.errors import UserError
from xlformer.fields import REFUSED
from xlformer.models import TransformerXLConfig, UniversalConfig

V, D, B, T = 19, 8, 3, 7
FIELDS = dict(vocab_size=V, n_step=2, d_model=D, n_head=2, d_inner=11, dropout=0.0)
FIELDS |= dict(scan_layers=True)
GOLDEN = pathlib.Path(check.__file__).parent


pytestmark = pytest.mark.usefixtures("float64")


def build(**fields):
    return models.build(UniversalConfig(**FIELDS | fields))


@functools.cache
def weights(model):
    """Weights as large as those of testing.check_model, without compiling init."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: random.normal(size=x.shape) * x.size**-0.25, shapes)


@functools.cache
def trunk(model):
    return jax.jit(functools.partial(model.trunk.apply, weights(model)))


def vectors(T=T):
    return np.random.default_rng(T).normal(size=(B, T, D))


CONTRACT = {
    "memory": dict(
        n_layer=2,
        memory_length=3,
        positions="relative",
        transition="sepconv",
        dropout=0.3,
    ),
    "act": dict(
        act="accumulate", act_max_steps=3, positions="learned", table_length=30
    ),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_keeps_the_contract(name):
    testing.check_model(build(**CONTRACT[name]))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("ut_*.npz")), ids=lambda p: p.stem)
def test_equals_tensor2tensor(path):
    result = check.check(path)
    assert result.ok and result.values < 1e-13 and result.gradients < 1e-13


# The paper, by hand.


def norm(x, params):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * params["scale"] + params["bias"]


def attention(x_BTD, params):
    qkv = np.einsum("BTD,DCHK->CBHTK", x_BTD, params["qkv"])
    scores = np.einsum("BHTK,BHSK->BHTS", qkv[0], qkv[1]) * (D // 2) ** -0.5
    p = np.exp(np.where(np.tri(x_BTD.shape[1], dtype=bool), scores, -np.inf))
    y = np.einsum("BHTS,BHSK->BTHK", p / p.sum(-1, keepdims=True), qkv[2])
    return np.einsum("BTHK,HKD->BTD", y, params["output"])


def paper_layer(x_BTD, layers):
    """A = LN(x + MHA(x)); LN(A + Transition(A)): section 2.1."""
    one = jax.tree.map(lambda x: np.asarray(x)[0], layers)
    a_BTD = norm(x_BTD + attention(x_BTD, one["attention"]), one["attention_norm"])
    network = one["feed_forward"]
    h_BTF = np.maximum(a_BTD @ network["in_kernel"] + network["in_bias"], 0)
    y_BTD = h_BTF @ network["out_kernel"] + network["out_bias"]
    return norm(a_BTD + y_BTD, one["norm"])


def signal(count):
    rates = 10000.0 ** (-np.arange(D // 2) / (D // 2 - 1))
    angles = np.arange(count)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], -1)


@pytest.mark.parametrize("n_step", [1, 3])
def test_is_the_papers_layer_applied_so_often(n_step):
    model = build(n_step=n_step, step_signal="sinusoid", pre_norm=False)
    layers, x_BTD = weights(model)["trunk"]["layers"], vectors()
    found_BTD, *_ = trunk(model)(x_BTD, model.init_state(B))
    for n in range(n_step):
        x_BTD = paper_layer(x_BTD + signal(T) + signal(n_step)[n], layers)
    np.testing.assert_allclose(found_BTD, x_BTD, 0, 1e-12)


@pytest.mark.parametrize("copy", [False, True], ids=["go on", "copied"])
def test_halted_positions(copy):
    """They stop counting; copied, they are bit for bit what others go on seeing."""
    fields = dict(act="accumulate", act_max_steps=4, step_signal="none")
    model = build(**fields, pre_norm=False, copy_halted=copy)
    params, s_BTD = weights(model)["trunk"], vectors()
    found_BTD, *_ = trunk(model)(s_BTD, model.init_state(B))
    h_BT, y_BTD, steps_BT = np.zeros((B, T)), 0, np.zeros((B, T))
    for n in range(4):
        in_BTD = s_BTD + signal(T)
        if copy:
            in_BTD = np.where(h_BT[..., None] == 1, s_BTD, in_BTD)
        logits_BT = in_BTD @ params["halting_kernel"] + params["halting_bias"]
        p_BT = 1 / (1 + np.exp(-logits_BT))
        after_BTD = paper_layer(in_BTD, params["layers"])
        if copy:
            after_BTD = np.where(h_BT[..., None] == 1, s_BTD, after_BTD)
        steps_BT += h_BT < 1
        ends_BT = (h_BT + p_BT > 0.99) | (n == 3)
        w_BT = np.where(h_BT == 1, 0, np.where(ends_BT, 1 - h_BT, p_BT))
        y_BTD += w_BT[..., None] * after_BTD
        h_BT, s_BTD = np.where(ends_BT, 1, h_BT + w_BT), after_BTD
    assert len(np.unique(steps_BT)) > 2
    np.testing.assert_allclose(found_BTD, y_BTD, 0, 1e-12)
    given = params, vectors(), model.init_state(B)
    updates_BT, rest_BT = halting_steps.of_tokens(model, *given)
    np.testing.assert_array_equal(updates_BT, steps_BT)
    assert ((rest_BT > 0) & (rest_BT <= 1)).all()


def test_steps_and_remainders_are_what_the_loss_is_made_of():
    model, lengths_B = build(act="convex", act_loss_weight=0.5), np.array([T, 3, 0])
    given = vectors(), model.init_state(B)
    *_, aux = trunk(model)(*given, lengths_B=lengths_B)
    found = halting_steps.of_tokens(model, weights(model), *given, lengths_B)
    # Means of a row's tokens, then of rows; one without tokens has none.
    means = [np.mean([x_BT[0].mean(), x_BT[1, :3].mean(), 0]) for x_BT in found]
    np.testing.assert_allclose(aux.metrics["ponder/updates"], means[0])
    np.testing.assert_allclose(aux.metrics["ponder/remainder"], means[1])
    np.testing.assert_allclose(aux.loss, 0.5 * sum(means))


# Sizes, positions, what looks ahead.


def test_steps_cost_no_parameters():
    def count(**fields):
        model = build(step_signal="sinusoid", **fields)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))

    assert count(n_step=2) == count(n_step=9)
    assert count(act="convex") == count(act="convex", n_step=9) == count() + D + 1


def test_costs_as_many_layers_as_it_has_steps():
    other = dict(n_layer=3, d_model=D, n_head=2, d_inner=11, memory_length=5)
    other = models.build(TransformerXLConfig(vocab_size=V, **other))
    model = build(n_step=3, memory_length=5, positions="relative")
    sizes = dict(batch_size=B, segment_length=T)
    assert model.flops(**sizes).forward == other.flops(**sizes).forward
    assert model.flops(**sizes).training == other.flops(**sizes).training
    ponders = build(n_step=3, act="convex").flops(**sizes)
    fixed = build(n_step=6).flops(**sizes)
    assert ponders.halting == 2 * 6 * B * T * D
    assert ponders.forward == fixed.forward + ponders.halting


def test_absolute_positions_count_on_from_the_last_reset():
    model = build(n_step=1, memory_length=5, positions="learned", table_length=9)
    x_BTD, resets_BT = vectors(8), np.zeros((B, 8), bool)
    resets_BT[1, 5] = True
    whole_BTD, *_ = trunk(model)(x_BTD, model.init_state(B), resets_BT=resets_BT)
    state, parts = model.init_state(B), []
    for here in (slice(0, 4), slice(4, 8)):
        options = dict(resets_BT=resets_BT[:, here])
        y_BTD, state, _ = trunk(model)(x_BTD[:, here], state, **options)
        parts.append(y_BTD)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole_BTD, 0, 1e-12)
    assert state.position_B.tolist() == [8, 3, 8]
    fresh_BTD, *_ = trunk(model)(np.roll(x_BTD, -5, 1), model.init_state(B))
    np.testing.assert_allclose(fresh_BTD[1, :3], whole_BTD[1, 5:], 0, 1e-12)


def test_learned_positions_end_with_their_table():
    model = build(n_step=1, positions="learned", table_length=T - 1)
    with pytest.raises(UserError, match=f"segment of {T} tokens.*table_length={T - 1}"):
        trunk(model)(vectors(), model.init_state(B))
    # What a config is checked by, before its data are prepared.
    assert model.longest_segment == T - 1 and build().longest_segment is None


def test_global_halting_looks_ahead_but_not_into_padding():
    fields = dict(act="global", causal=False, transition="sepconv")
    model = build(**fields, n_step=1, positions="relative")
    x_BTD, lengths_B = vectors(), np.array([T, 4, 1])
    found_BTD, _, aux = trunk(model)(x_BTD, model.init_state(B), lengths_B=lengths_B)
    other_BTD = np.where(np.arange(T)[None, :, None] < 4, x_BTD, 7.0)
    other_BTD, *_ = trunk(model)(other_BTD, model.init_state(B), lengths_B=lengths_B)
    assert (other_BTD[0, :4] != found_BTD[0, :4]).any()
    np.testing.assert_array_equal(other_BTD[1, :4], found_BTD[1, :4])
    alone_BTD, *_ = trunk(model)(x_BTD[1:2, :4], model.init_state(1))
    np.testing.assert_allclose(found_BTD[1, :4], alone_BTD[0], 0, 1e-12)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (dict(act="convex", memory_length=5), "memory per step with a changing depth"),
        (dict(act="global"), "act='global' with config.model.causal=True"),
        (dict(causal=False, memory_length=5), "causal=False with .*memory_length=5"),
        (dict(positions="learned"), "positions='learned' with .*table_length=0"),
        (dict(table_length=5), "positions='sinusoid' with .*table_length=5"),
        (dict(copy_halted=True), "copy_halted=True with .*act='none'"),
        (dict(act_epsilon=0.2), "act_epsilon=0.2 with .*act='none'"),
        (dict(force_halt_last=False), "force_halt_last=False with .*act='none'"),
        (dict(n_head=3), "n_head=3 does not divide config.model.d_model=8"),
        (dict(act="acumulate"), "did you mean 'accumulate'"),
        (dict(n_step="6"), "n_step='6' is not of type int"),
    ],
)
def test_refuses_in_one_line(fields, line):
    with pytest.raises(UserError, match=line):
        build(**fields)


def test_a_memory_that_is_asked_for_is_named_as_it_was_asked_for():
    line = "^memory_length=5: config.model.act='convex' with .* set memory_length=0$"
    with pytest.raises(UserError, match=line):
        build(act="convex").for_reading(memory_length=5)


def test_another_number_of_steps_is_another_model():
    assert models.rules("universal")["n_step"].resume == REFUSED


def test_every_token_of_a_text_sees_as_much():
    """With a memory, by a window; a model that looks ahead continues nothing."""
    model = build(memory_length=5, positions="relative")
    assert model.for_generation().config.window == 5
    assert build(memory_length=5, window=2).for_generation().config.window == 2
    with pytest.raises(UserError, match="causal=False"):
        build(causal=False).for_generation()


def test_axes_are_named_for_all_parameters():
    for fields in (dict(transition="sepconv", positions="relative"), dict(n_layer=2)):
        model = build(**fields)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        axes = model.param_axes(shapes)["trunk"]
        jax.tree.map(lambda x, names: assert_fits(x, names), shapes["trunk"], axes)
        layers = axes["layers"]
        network = layers["separable" if "transition" in fields else "feed_forward"]
        assert network["in_kernel"] == (None, "embed", "mlp")
        assert layers["attention"]["qkv"] == (None, "embed", None, "heads", None)
        assert axes["signals"]["step"] == (None, "embed")


def assert_fits(leaf, names):
    assert len(names) == len(leaf.shape)
