"""Learning rates against the originals' formulas; optimizers against optax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xlformer import models
from xlformer.config import default_config
from xlformer.training import optimizers

LR, WARMUP, TOTAL, FLOOR = 0.25, 10, 110, 0.01


def section(**fields):
    config = default_config().optimizer
    with config.ignore_type():
        config.update(fields)
    return config


def rate(schedule, step, scale=1.0, **fields):
    fields = {"warmup_steps": WARMUP, "final_fraction": FLOOR} | fields
    config = section(schedule=schedule, learning_rate=LR, **fields)
    return float(jax.jit(optimizers.learning_rate(config, TOTAL))(step, scale))


@pytest.mark.parametrize("schedule", sorted(optimizers.SCHEDULES))
def test_warm_up_is_linear_from_zero_to_the_peak(schedule):
    peak = LR / math.sqrt(WARMUP) if schedule == "inverse_sqrt" else LR
    assert rate(schedule, 0) == 0
    for step in (1, 3, WARMUP - 1):
        assert rate(schedule, step) == pytest.approx(peak * step / WARMUP)


def test_a_warm_up_that_counts_from_one_is_sha_rnns():
    """lr * min(step, warmup) / warmup with step from 1."""
    for step in (0, 1, 7, WARMUP - 1, WARMUP, 53):
        expected = LR * min(step + 1, WARMUP) / WARMUP
        assert rate("constant", step, warmup_from=1) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", sorted(optimizers.SCHEDULES))
def test_without_a_warm_up_the_first_rate_is_the_whole_one(schedule):
    assert rate(schedule, 0, warmup_steps=0) == pytest.approx(LR)


@pytest.mark.parametrize("step", [WARMUP, 37, TOTAL, TOTAL + 50])
def test_cosine_is_that_of_the_pytorch_original(step):
    """CosineAnnealingLR(max_step, eta_min) over the absolute step."""
    floor = FLOOR * LR
    wave = (1 + math.cos(math.pi * min(step, TOTAL) / TOTAL)) / 2
    assert rate("cosine", step) == pytest.approx(floor + (LR - floor) * wave, rel=1e-5)


@pytest.mark.parametrize("step", [WARMUP, 37, TOTAL, TOTAL + 50])
def test_cosine_after_warmup_is_that_of_the_tensorflow_original(step):
    """tf.train.cosine_decay(lr, step - warmup, total - warmup, alpha)."""
    progress = min(step - WARMUP, TOTAL - WARMUP) / (TOTAL - WARMUP)
    wave = (1 + math.cos(math.pi * progress)) / 2
    expected = LR * ((1 - FLOOR) * wave + FLOOR)
    assert rate("cosine_after_warmup", step) == pytest.approx(expected, rel=1e-5)


def test_the_two_cosines_differ_where_the_warm_up_ends():
    assert rate("cosine_after_warmup", WARMUP) == pytest.approx(LR)
    assert rate("cosine", WARMUP) < 0.99 * LR  # the original's jump
    assert rate("cosine", TOTAL) == pytest.approx(FLOOR * LR)
    assert rate("cosine_after_warmup", TOTAL) == pytest.approx(FLOOR * LR)


def test_inverse_sqrt_is_that_of_the_pytorch_original():
    for step in (1, WARMUP, WARMUP + 1, 100, 10_000):
        multiplier = step**-0.5 if step > WARMUP else step / WARMUP**1.5
        assert rate("inverse_sqrt", step) == pytest.approx(LR * multiplier, rel=1e-5)


def test_only_plateau_heeds_the_scale():
    assert rate("plateau", 50, scale=0.25) == pytest.approx(LR / 4)
    assert rate("plateau", 5, scale=0.5) == pytest.approx(LR / 4)
    assert rate("constant", 50, scale=0.25) == pytest.approx(LR)


def test_plateau_halves_after_patience_plus_one_evaluations_without_improvement():
    update = jax.jit(
        lambda s, x: optimizers.plateau_update(s, x, factor=0.5, patience=1)
    )
    state, scales = optimizers.plateau_init(), []
    for loss in (3.0, 3.0, 3.5, 2.0, 2.5, float("nan"), 1.0):
        state = update(state, loss)
        scales.append(float(state.scale))
    assert scales == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert float(state.best) == 1.0
    first = optimizers.plateau_init()
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(
        lambda x: x.dtype, first
    )


# Optimizers -------------------------------------------------------------------------

N_LAYER = 3


def stacked_tree(seed):
    """Two stacks of layers, the second nested, and leaves outside of them."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    shapes = {
        "embedding": (11, 5),
        "layers": {"kernel": (N_LAYER, 5, 7), "bias": (N_LAYER, 7)},
        "trunk": {"layers": {"scale": (N_LAYER, 5)}, "norm": (5,)},
    }
    # Layers of very different size, so that one norm over the stack would show.
    grow = jnp.array([1e-2, 1.0, 1e2])

    def leaf(path, shape):
        x = jax.random.normal(next(keys), shape)
        if optimizers.is_stacked(path):
            x = x * grow.reshape(-1, *[1] * (len(shape) - 1))
        return x

    return jax.tree_util.tree_map_with_path(
        leaf, shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def unstack(tree):
    """Every layer's leaf on its own, under no key named 'layers'."""
    flat = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="_")
        if optimizers.is_stacked(path):
            flat |= {f"{name}_{i}": x[i] for i in range(N_LAYER)}
        else:
            flat[name] = x
    return flat


def run(tx, params):
    """Three updates with rate 0.1, the same gradients for whatever tx does to them."""

    @jax.jit
    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), state

    first, state = params, tx.init(params)
    for i in range(3):
        grads = jax.tree.map(lambda p, i=i: np.cos(3 * p) + i, first)
        params, state = update(params, state, grads)
    return params


def assert_same(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, 1e-6), a, b)


@pytest.mark.parametrize("name", ["adam", "adamw", "lamb", "lamb_sha_rnn", "sgd"])
def test_a_stack_is_updated_as_its_layers_one_by_one(name):
    decay = {} if name in ("adam", "sgd") else {"weight_decay": 0.1}
    tx = optimizers.build(section(name=name, clip_norm=0.25, **decay))
    params = stacked_tree(0)
    assert_same(unstack(run(tx, params)), run(tx, unstack(params)))


def test_lamb_of_optax_is_wrong_on_a_stack_and_right_on_single_layers():
    """The reference; and the proof that the test above can fail."""
    tx = optimizers.build(section(name="lamb", clip_norm=0.0))
    reference = optax.chain(optax.lamb(1.0, eps=1e-8), optax.scale(-1.0))
    params = stacked_tree(1)
    assert_same(run(tx, unstack(params)), run(reference, unstack(params)))
    with pytest.raises(AssertionError):
        assert_same(unstack(run(reference, params)), run(reference, unstack(params)))


def test_adam_is_that_of_optax():
    tx = optimizers.build(section(name="adam", clip_norm=0.0, b2=0.98, epsilon=1e-6))
    reference = optax.chain(optax.adam(1.0, b2=0.98, eps=1e-6), optax.scale(-1.0))
    assert_same(run(tx, stacked_tree(2)), run(reference, stacked_tree(2)), rtol=1e-7)


def test_sgd_and_its_momentum_are_those_of_optax():
    for momentum in (0.0, 0.9):
        tx = optimizers.build(section(name="sgd", clip_norm=0.0, momentum=momentum))
        reference = optax.chain(optax.sgd(1.0, momentum=momentum), optax.scale(-1.0))
        assert_same(run(tx, stacked_tree(3)), run(reference, stacked_tree(3)))


def test_what_decays():
    """Of each of Transformer-XL's parameters; u, v and distance_bias are matrices."""
    spared = {"u", "v", "distance_bias", "bias", "scale", "in_bias", "out_bias"}
    decayed = {True: set(), False: set()}
    for options in (
        {},
        {"untie_r": True, "cutoffs": (3, 5), "div_val": 2},
        {"attn_type": 1, "table_length": 9},
    ):
        fields = {"vocab_size": 9, "n_layer": 2, "d_model": 8, "n_head": 2}
        model = models.build(models.TransformerXLConfig(**fields | options))
        params = jax.eval_shape(model.init, jax.random.key(0))
        for path, x in jax.tree_util.tree_leaves_with_path(
            optimizers.decay_mask(params)
        ):
            decayed[x].add(jax.tree_util.keystr(path[-1:], simple=True))
    assert decayed[False] == spared | {"cluster_bias"}
    assert not decayed[True] & decayed[False] and {"qkv", "table"} < decayed[True]
    # A matrix of another model that has such a name is a weight.
    assert optimizers.decay_mask({"cell": {"u": jnp.ones((2, 2))}})["cell"]["u"]
    gates = {"query_gate": jnp.ones(2), "other_gates": jnp.ones((3, 2))}
    assert optimizers.decay_mask({"attention": gates}) == {
        "attention": {"query_gate": False, "other_gates": False}
    }
    # In a list of layers none has an axis of layers.
    layers = [{"kernel": jnp.ones((3, 2)), "scale": jnp.ones(2)}]
    assert optimizers.decay_mask({"layers": layers}) == {
        "layers": [{"kernel": True, "scale": False}]
    }


def test_weight_decay_is_decoupled_and_spares_biases_and_norms():
    params = stacked_tree(4)
    tx = optimizers.build(section(name="adamw", weight_decay=0.5, clip_norm=0.25))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    half = jax.tree.map(lambda p: 0.5 * p, params)
    assert_same(updates["embedding"], half["embedding"])
    assert_same(updates["layers"]["kernel"], half["layers"]["kernel"])
    assert not updates["layers"]["bias"].any()  # [L, 7]: a vector in each layer
    assert not updates["trunk"]["layers"]["scale"].any()
    assert not updates["trunk"]["norm"].any()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_after_clipping_the_global_norm_is_at_most_the_clip(size):
    tx = optimizers.build(section(name="sgd", clip_norm=0.25))
    grads = jax.tree.map(lambda x: size * x, stacked_tree(5))
    updates, _ = tx.update(grads, tx.init(grads))
    norm = float(optax.tree.norm(updates))
    assert norm <= 0.25 * (1 + 1e-6)
    if float(optax.tree.norm(grads)) < 0.25:
        assert_same(updates, grads)
    else:
        assert norm == pytest.approx(0.25, rel=1e-5)


def test_sha_rnns_lamb_by_hand():
    """Uncorrected moments; |p| counts as at most 10; the ratio is at least 0.25."""
    fields = {"epsilon": 1e-6, "weight_decay": 0.01, "clip_norm": 0.0}
    tx = optimizers.build(section(name="lamb_sha_rnn", **fields))
    params = {"large": jnp.full(4, 50.0), "small": jnp.full(4, 1e-3)}
    grads = {"large": jnp.full(4, 3.0), "small": jnp.full(4, 3.0)}
    updates, _ = tx.update(grads, tx.init(params), params)
    adam = 0.1 * 3 / (math.sqrt(0.001 * 9) + 1e-6)
    large, small = adam + 0.01 * 50, adam + 0.01 * 1e-3
    np.testing.assert_allclose(
        updates["large"], large * 10 / (2 * large) * np.ones(4), rtol=1e-5
    )
    np.testing.assert_allclose(updates["small"], 0.25 * small * np.ones(4), rtol=1e-5)
    # Without the floor |p|, 2e-3, is what is left of it.
    tx = optimizers.build(section(name="lamb_sha_rnn", min_trust=0.0, **fields))
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["small"], 1e-3 * np.ones(4), rtol=1e-5)


def test_a_layer_of_zeros_gets_the_plain_update():
    tx = optimizers.build(section(name="lamb", clip_norm=0.0))
    params = {"layers": {"w": jnp.zeros((2, 3, 3))}}
    grads = {"layers": {"w": jnp.ones((2, 3, 3))}}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["layers"]["w"], 1.0, rtol=1e-5)
