"""Muon and Adafactor treat each matrix of a leaf as a parameter of its own."""

import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_runs import (
    SYMBOLS,
    assert_close,
    assert_same,
    bag,
    final_state,
    refusal,
    text_config,
    write_text,
)

from xlformer import config as config_lib
from xlformer import models, runs, sharding
from xlformer.models import sides as sides_lib
from xlformer.models.parameters import abstract_params
from xlformer.models.sides import Sides
from xlformer.runs import resume
from xlformer.train import train
from xlformer.training import by_matrix, optimizers
from xlformer.training.compiling import TrainingStep

RATE = 0.1


def section(name, **fields):
    found = config_lib.default_config().optimizer
    found.update(name=name, clip_norm=0.0, **fields)
    return found


def normal(seed, shape, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(tx, params, steps=3):
    """The parameters after each step; the gradients are the same for any tx."""

    @jax.jit
    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(lambda p, u: p - RATE * u, params, updates), state

    found, state = [params], tx.init(params)
    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: np.cos(3 * p) + 0.1 * i, params)
        moved, state = update(found[-1], state, grads)
        found.append(moved)
    return found[1:], state


# What its matrices are ----------------------------------------------------------------

CONFIGS = (
    "quickstart:debug",
    "wt103_large:debug",
    "lstm_penn:debug",
    "universal_small:debug",
    "vanilla_small:debug",
    "sha_rnn_small:debug",
    "performer_small:debug",
)
# Of those with two axes within a layer, what is no matrix, by the end of its name.
NO_MATRICES = {
    "embedding/table", "embedding/projection", "softmax/table", "softmax/projection",
    "softmax/cluster_kernel", "auxiliary/next_table", "auxiliary/next_bias",
    "auxiliary/second_table", "auxiliary/second_bias", "trunk/u", "trunk/v",
    "trunk/position", "signals/step", "signals/position", "attention/u", "attention/v",
    "lstm/input_bias", "lstm/hidden_bias", "boom/bias", "attention/value_bias",
    "attention/other_gates", "attention/distance", "attention/distance_bias",
    "separable/in_depthwise", "separable/out_depthwise",
}  # fmt: skip


def leaves(config):
    """(end of the name, axes within a layer, Sides or None) of each parameter."""
    model = models.build(config.model, vocab_size=config.model.vocab_size or 300)
    params = abstract_params(model)
    sides = jax.tree.structure(params).flatten_up_to(model.matrices(params))
    for (path, x), found in zip(
        jax.tree_util.tree_leaves_with_path(params), sides, strict=True
    ):
        stacked = sides_lib.is_stacked(path)
        yield sides_lib.end(path), len(x.shape) - stacked, found, stacked, x.shape


def test_every_matrix_of_every_model_is_known():
    """A new parameter of two axes is named here, or is a matrix to its model."""
    seen = set()
    changes = [{}] * len(CONFIGS) + [
        {"attn_type": 1, "table_length": 9},
        {"gate": "gru"},
    ]
    specs = [*CONFIGS, "quickstart:debug", "quickstart:debug"]
    for spec, change in zip(specs, changes, strict=True):
        config = config_lib.load(spec)
        config.model.update(change)
        for name, axes, sides, stacked, shape in leaves(config):
            if axes < 2:
                assert sides is None, name
            elif sides is None:
                assert name in NO_MATRICES, name
            else:
                assert name not in NO_MATRICES
                taken = [*sides.inputs, *sides.outputs]
                assert taken == sorted({*taken}) and taken[0] >= stacked
                assert taken[-1] < len(shape)
                seen.add(name)
    expected = {"attention/qkv", "attention/output", "attention/position"}
    expected |= {f"feed_forward/{x}_kernel" for x in ("in", "out")}
    expected |= {f"lstm/{x}_kernel" for x in ("input", "hidden")} | {"boom/kernel"}
    expected |= {f"attention/{x}_kernel" for x in ("query", "value")}
    for gate in ("attention_gate", "feed_forward_gate"):
        expected |= {f"{gate}/{x}_kernel" for x in ("new", "residual", "reset")}
    assert seen == expected


def test_queries_keys_and_values_are_matrices_of_their_own():
    sides = {name: found for name, _, found, *_ in leaves(config_lib.load(CONFIGS[0]))}
    # [L, D, 3, H, K] and [L, H, K, D].
    assert sides["attention/qkv"] == Sides((1,), (3, 4))
    assert sides["attention/output"] == Sides((1, 2), (3,))
    # Of a model of one's own what has two axes, but no bias.
    params = {
        "table_VV": jnp.ones((5, 5)),
        "layers": {"w": jnp.ones((2, 3, 5)), "in_bias": jnp.ones((2, 3, 5))},
        "gain": jnp.ones((3,)),
    }
    assert models.Model.matrices(None, params) == {
        "table_VV": Sides((0,), (1,)),
        "layers": {"w": Sides((1,), (2,)), "in_bias": None},
        "gain": None,
    }


# One leaf or many ---------------------------------------------------------------------

# Above and below the least size that Adafactor makes factors of.
D, H, K, F = 131, 2, 67, 137


def stacked():
    """Three layers as the models have them, of very different size."""
    shapes = {
        "attention": {"qkv": (D, 3, H, K), "output": (H, K, D), "u": (H, K)},
        "feed_forward": {"in_kernel": (D, F), "in_bias": (F,)},
    }
    grow = np.array([1e-2, 1.0, 1e2], np.float32)
    seeds = itertools.count()

    def leaf(shape):
        layers = normal(next(seeds), (3, *shape))
        return layers * grow.reshape(-1, *[1] * len(shape))

    layers = jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return {"layers": layers}


def cut(tree):
    """Every matrix as a leaf of two axes, and every vector of a layer as one of one."""
    found, layers = {}, tree["layers"]
    for i in range(3):
        for c in range(3):
            found[f"qkv_{i}_{c}"] = layers["attention"]["qkv"][i, :, c].reshape(D, -1)
        found[f"output_{i}"] = layers["attention"]["output"][i].reshape(-1, D)
        found[f"u_{i}_bias"] = layers["attention"]["u"][i]
        found[f"in_{i}"] = layers["feed_forward"]["in_kernel"][i]
        found[f"in_{i}_bias"] = layers["feed_forward"]["in_bias"][i]
    return found


def of_layers(params):
    return models.MODELS["transformer_xl"].matrices(None, params)


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_matrices_of_a_stack_are_updated_as_if_each_was_alone(name):
    params = stacked()
    together, _ = run(optimizers.build(section(name), of_layers), params)
    alone, _ = run(optimizers.build(section(name)), cut(params))
    for a, b in zip(together, alone, strict=True):
        a = cut(a)
        for key, expected in b.items():
            moved = np.abs(expected - cut(params)[key]).max()
            np.testing.assert_allclose(
                a[key], expected, rtol=3e-7, atol=1e-4 * moved, err_msg=key
            )


def test_optax_gives_stacked_matrices_to_adam():
    """What the test above would find, had muon no matrices of its own."""
    params = {"layers": {"w": normal(0, (2, 5, 7))}}
    (found,), _ = run(optax.contrib.muon(-1.0, nesterov=False), params, 1)
    (adam,), _ = run(optax.adam(-1.0), params, 1)
    (muon,), _ = run(optimizers.build(section("muon")), params, 1)
    assert_close(found, adam)
    assert not np.allclose(muon["layers"]["w"], adam["layers"]["w"], atol=1e-3)


# Muon ---------------------------------------------------------------------------------


def newton_schulz(x):
    """Jordan's polynomial, in float64; x is wide."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(5, 11), (11, 5)])
def test_muon_steps_along_a_momentum_whose_singular_values_are_near_one(shape):
    """Against the formulas of Jordan et al. and Liu et al., written out."""
    params, beta = {"w": normal(1, shape)}, 0.95
    (first, second), _ = run(optimizers.build(section("muon")), params, 2)
    momentum, expected = np.zeros(shape), params["w"].astype(np.float64)
    for i, found in enumerate((first, second)):
        grad = np.cos(3 * params["w"].astype(np.float64)) + 0.1 * i
        momentum = beta * momentum + (1 - beta) * grad
        # Both are corrected for their start at zero, the momentum for one step more.
        ahead = beta * momentum / (1 - beta ** (i + 2))
        ahead = ahead + (1 - beta) * grad / (1 - beta ** (i + 1))
        flat = newton_schulz(ahead if shape[0] < shape[1] else ahead.T)
        update = flat if shape[0] < shape[1] else flat.T
        expected = expected - RATE * 0.2 * np.sqrt(max(shape)) * update
        np.testing.assert_allclose(found["w"], expected, atol=1e-5)
        values = np.linalg.svd(update, compute_uv=False)
        assert 0.6 < values.min() and values.max() < 1.3


def test_muon_leaves_what_is_no_matrix_to_adam():
    config = config_lib.load("quickstart:debug")
    model = models.build(config.model, vocab_size=13)
    rng = np.random.default_rng(5)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract_params(model)
    )
    fields = {"b1": 0.8, "b2": 0.98, "epsilon": 1e-6}
    muon = optimizers.build(section("muon", **fields), model.matrices)
    (found,), state = run(muon, params, 1)
    (adam,), _ = run(optimizers.build(section("adam", **fields)), params, 1)
    same = jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-6), found, adam)
    sides = jax.tree.structure(params).flatten_up_to(model.matrices(params))
    assert jax.tree.leaves(same) == [x is None for x in sides] and not all(sides)
    # One momentum of each matrix, and two of all else.
    sizes = zip(jax.tree.leaves(params), sides, strict=True)
    numbers = sum(x.size * (2 - bool(s)) for x, s in sizes)
    assert sum(x.size for x in jax.tree.leaves(state) if x.size > 3) == numbers


# Adafactor ----------------------------------------------------------------------------


def test_adafactor_is_that_of_optax_for_matrices_and_vectors():
    params = {"w": normal(2, (D, F), 3.0), "b": normal(3, (F,)), "small": np.eye(3, 5)}
    params["small"] = params["small"].astype(np.float32)
    reference = optax.chain(optax.adafactor(1.0), optax.scale(-1.0))
    found, _ = run(optimizers.build(section("adafactor")), params)
    expected, _ = run(reference, params)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, atol=2e-6)


def test_adafactor_keeps_a_row_and_a_column_of_each_matrix():
    params = stacked()
    state = jax.eval_shape(by_matrix.scale_by_adafactor(of_layers).init, params)
    numbers = {
        path: sum(x.size for x in jax.tree.leaves(part))
        for path, part in (
            ("qkv", state.v["layers"]["attention"]["qkv"]),
            ("output", state.v["layers"]["attention"]["output"]),
            ("u", state.v["layers"]["attention"]["u"]),
            ("in_kernel", state.v["layers"]["feed_forward"]["in_kernel"]),
            ("in_bias", state.v["layers"]["feed_forward"]["in_bias"]),
        )
    }
    assert numbers == {
        "qkv": 3 * 3 * (D + H * K),
        "output": 3 * (H * K + D),
        "u": 3 * H * K,
        "in_kernel": 3 * (D + F),
        "in_bias": 3 * F,
    }
    # Of a table [V, E] too. A side that is short makes factors of nothing.
    tables = {"table": jnp.ones((1009, 131)), "thin": jnp.ones((1009, 127))}
    found = jax.eval_shape(by_matrix.scale_by_adafactor(of_layers).init, tables).v
    assert sum(x.size for x in found["table"]) == 1009 + 131
    assert found["thin"].shape == (1009, 127)


# On a mesh, and in a run --------------------------------------------------------------


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_a_mesh_gives_the_same_as_one_device(name):
    config = config_lib.load("quickstart:debug")
    config.model.update(d_model=128, n_head=2, d_head=64, d_inner=256)
    config.optimizer = section(name, weight_decay=0.1)
    model = models.build(config.model, vocab_size=13)
    rng = np.random.default_rng(6)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract_params(model)
    )
    grads = jax.tree.map(lambda x: np.cos(3 * x), params)
    tx = optimizers.build(config.optimizer, model.matrices)

    def two(params, grads):
        def one(state, _):
            return tx.update(grads, state, params)[::-1]

        state, updates = jax.lax.scan(one, tx.init(params), length=2)
        return jax.tree.map(lambda x: x[-1], updates), state

    expected = jax.jit(two)(params, grads)
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2})
    placed = TrainingStep(config, model, mesh).placed
    where = placed.params
    found = jax.jit(
        two, in_shardings=(where, where), out_shardings=(where, placed.opt_state)
    )(params, grads)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # What has the shape of a parameter lies where that does.
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(found[1]))


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_a_killed_run_goes_on_to_the_same_bits(name, tmp_path):
    text = write_text(tmp_path / "text.txt")
    config, model = text_config(text, steps=8, eval_every=8), bag(vocab_size=SYMBOLS)
    config.train.save_every = 4
    config.optimizer.name = name
    config.data.directory = str(tmp_path / "prepared")
    train(config, tmp_path / "whole", model=model)
    expected = final_state(tmp_path / "whole", config, model)[1]
    killed = shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(killed / runs.CHECKPOINTS / "8")
    train(config, killed, model=model)
    assert_same(final_state(killed, config, model)[1], expected)
    other = config.copy_and_resolve_references()
    other.optimizer.name = "adam"
    line = refusal(train, other, killed, model=model)
    assert f"was trained with config.optimizer.name='{name}', now it is 'adam'" in line
    assert resume.differences(config, other)


def test_quickstart_has_variants_that_use_them():
    for name in ("muon", "adafactor"):
        found = config_lib.load(f"quickstart:optimizer={name},debug").optimizer
        assert found.name == name and found.learning_rate > 4e-3
    found = config_lib.load("quickstart:tail=0.25")
    assert found.train.tail_average == 0.25 and found.optimizer.schedule == "constant"
