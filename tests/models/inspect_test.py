"""What models tell of their insides, against loops and against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trained_run
import training_runs

from xlformer import models
from xlformer.kernels import watching

B, T, M = 2, 5, 11
XL = {
    "n_layer": 2,
    "d_model": 14,
    "n_head": 2,
    "d_head": 7,
    "d_inner": 17,
    "memory_length": M,
    "scan_layers": True,
    "remat": "full",
    "gate": "gru",
    "init_std": 0.3,
}
SHA = {"n_layer": 2, "d_model": 14, "d_inner": 28, "memory_length": M + T}
ACT = {
    "act_max_steps": 3,
    "d_model": 14,
    "n_head": 2,
    "d_inner": 17,
    "memory_length": 0,
    "context_length": T,
    "positions": "sinusoid",
    "act": "accumulate",
    "scan_layers": True,
}
SOFTMAX = {
    "n_layer": 1,
    "d_model": 14,
    "n_head": 2,
    "d_inner": 17,
    "context_length": T,
    "d_head": 8,
    "mechanism": "softmax",
}


def build(name, fields):
    config = models.default_config(name, **fields)
    return models.build(config, vocab_size=13)


@functools.cache
def compiled(model, also_apply):
    """(params, ids_BT, state) -> inside, the state after it, what `apply` gives."""

    @jax.jit
    def look(params, ids_BT, state):
        inside, after = model.inspect(params, ids_BT, state)
        applied = model.apply(params, ids_BT, ids_BT, state) if also_apply else None
        return inside, after, applied

    return look


@functools.cache
def fresh(model):
    return jax.jit(model.init)(jax.random.key(1))


def even(params):
    """The same without any preference of what is attended."""

    def one(path, leaf):
        at = jax.tree_util.keystr(path, simple=True, separator="/")
        inside = "attention/" in at or at.split("/")[-1] in ("u", "v")
        return np.zeros_like(leaf) if inside else leaf

    return jax.tree_util.tree_map_with_path(one, params)


@pytest.mark.parametrize("causal", [True, False])
def test_weights_are_collected_by_distance(causal):
    rng, H, S = np.random.default_rng(0), 3, 8
    distance_TS = watching.pairs(T, S)
    mask = rng.random((B, 1, T, S)) < 0.7
    mask &= (distance_TS >= 0) | (not causal)
    p_BHTS = rng.random((B, H, T, S))
    weight_HS, seen_S = np.zeros((H, S)), np.zeros(S)
    for b, t, s in zip(*np.nonzero(mask[:, 0]), strict=True):
        weight_HS[:, abs(t + S - T - s)] += p_BHTS[b, :, t, s]
        seen_S[abs(t + S - T - s)] += 1
    found = watching.by_distance(jnp.asarray(p_BHTS), mask, distance_TS)
    np.testing.assert_allclose(found.weight_HS, weight_HS, rtol=1e-6)
    np.testing.assert_array_equal(found.seen_S, seen_S)


@pytest.mark.parametrize(
    ("name", "fields", "segments", "layers"),
    [
        ("transformer_xl", XL, 2, ["layer 1", "layer 2"]),
        ("sha_rnn", SHA, 2, ["block 1"]),
        ("performer", SOFTMAX, 1, ["layer 1"]),
    ],
)
def test_attention_without_preference_is_even(name, fields, segments, layers):
    model = build(name, fields)
    params = even(fresh(model))
    ids_BT = np.random.default_rng(2).integers(13, size=(B, T))
    state = model.init_state(B)
    for k in range(segments):
        inside, state, _ = compiled(model, False)(params, ids_BT, state)
        # Query t sees what came before the segment, what it holds up to it, itself.
        sees_T = k * T + 1 + np.arange(T)
        weight = [B * (1 / sees_T[sees_T > d]).sum() for d in range(segments * T)]
        seen = [B * (sees_T > d).sum() for d in range(segments * T)]
        assert list(inside.attention) == layers
        for one in inside.attention.values():
            H, S = one.weight_HS.shape
            want_S = np.pad(np.array(weight), (0, max(0, S - segments * T)))[:S]
            want_HS = np.broadcast_to(want_S, (H, S))
            np.testing.assert_allclose(one.weight_HS, want_HS, rtol=1e-5)
            np.testing.assert_array_equal(one.seen_S[: len(seen)], seen[:S])
    assert not inside.halting


def test_nothing_is_seen_before_a_reset():
    model = build("performer", SOFTMAX)
    params = even(trained_run.random_params(model))
    ids_BT = jnp.zeros((B, T), jnp.int32)
    resets_BT = jnp.broadcast_to(jnp.arange(T) == 2, (B, T))
    look = jax.jit(lambda *arrays: model.inspect(*arrays, resets_BT=resets_BT)[0])
    (found,) = look(params, ids_BT, model.init_state(B)).attention.values()
    np.testing.assert_array_equal(found.seen_S, B * np.array([5, 3, 1, 0, 0]))
    # Queries see 1, 2, 1, 2 and 3 tokens.
    weight_S = B * np.array([2 + 2 / 2 + 1 / 3, 2 / 2 + 1 / 3, 1 / 3, 0, 0])
    np.testing.assert_allclose(found.weight_HS, [weight_S] * 2, rtol=1e-5)


def test_weights_of_each_query_sum_to_one_and_gates_are_those_of_the_layers():
    model = build("transformer_xl", XL)
    params = fresh(model)
    ids_BT = np.random.default_rng(2).integers(13, size=(B, T))
    inside, _, _ = compiled(model, False)(params, ids_BT, model.init_state(B))
    for one in inside.attention.values():
        np.testing.assert_allclose(one.weight_HS.sum(1), B * T, rtol=1e-5)
        assert np.ptp(one.weight_HS, axis=0).max() > 0.01
    names = [
        f"layer {n}, {k}_gate" for n in (1, 2) for k in ("attention", "feed_forward")
    ]
    assert list(inside.gates) == names
    for one in inside.gates.values():
        np.testing.assert_allclose(one.units_E.mean(), one.mean, rtol=1e-5)
        assert 0 < one.mean < 0.5  # They begin near the identity, sigmoid(-2).
    assert not np.allclose(*(inside.gates[n].mean for n in names[::2]))


def test_the_steps_of_positions_are_those_that_are_logged():
    model = build("universal", ACT)
    params = fresh(model)
    ids_BT = np.random.default_rng(2).integers(13, size=(B, T))
    # So that positions differ in where they halt.
    kernel = np.float32(3.0 * np.random.default_rng(3).normal(size=14))
    trunk = {
        **params["trunk"],
        "halting_kernel": kernel,
        "halting_bias": np.float32(-1),
    }
    params = {**params, "trunk": trunk}
    found = compiled(model, True)(params, ids_BT, model.init_state(B))
    inside, after, (_, again, aux) = found
    jax.tree.map(np.testing.assert_array_equal, after, again)
    assert list(inside.halting) == list(inside.attention)
    assert list(inside.halting)[0] == "step 1"
    running = np.stack([one.running_BT for one in inside.halting.values()])
    assert running[0].all() and 0 < running[-1].sum() < B * T
    updates = running.sum(0).mean()
    np.testing.assert_allclose(updates, aux.metrics["ponder/updates"], rtol=1e-6)


def test_a_model_of_ones_own_tells_nothing():
    model = training_runs.bag()
    ids_BT = jnp.zeros((B, T), jnp.int32)
    assert model.inspect(None, ids_BT, model.init_state(B)) is None
