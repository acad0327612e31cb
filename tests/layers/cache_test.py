"""The cached state: what it saves, where it lies, and what it refuses.

That it scores as the plain state does is in the contract (testing.check_model).
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trained_run
from jax import jit

from xlformer import config as config_lib
from xlformer import models, scoring, sharding

V, B, T, M = 23, 4, 5, 7
TOKENS = np.random.default_rng(5).integers(0, V, 131).astype(np.uint8)
ATTENTION = {
    "relative": {},
    "learned, pre-norm": {"attn_type": 1, "table_length": 9, "pre_norm": True},
    "absolute": {"attn_type": 2, "allow_incoherent_positions": True},
    "rotary": {"positions": "rotary"},
}


@functools.cache
def build(name="relative", **fields):
    config = dict(n_layer=2, n_head=2, d_model=8, d_inner=11, memory_length=M)
    config |= dict(vocab_size=V, scan_layers=True, dtype="float32") | ATTENTION[name]
    model = models.build(models.TransformerXLConfig(**config | fields))
    return model, trained_run.random_params(model)


def warm(model, params):
    """A state whose rows are filled differently."""
    ids_BT = np.arange(B * T).reshape(B, T) % V
    state = model.init_state(B)
    for lengths_B in ([5, 3, 0, 5], [5, 1, 1, 5]):
        state = jit(model.apply)(
            params, ids_BT, ids_BT, state, lengths_B=np.array(lengths_B)
        )[1]
    return state


# What it saves ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "segment_length", "memory_length", "fewer"),
    [("enwik8_base", 80, 2100, 4.1), ("enwik8_large", 128, 3800, 5.1),
     ("wt103_base", 64, 640, 2.5)],
)  # fmt: skip
def test_operations_of_a_layer_at_the_published_settings(
    name, segment_length, memory_length, fewer
):
    """One row, same_length; the compiler counts the body of the loop once."""
    config = config_lib.load(name).model
    config.update(memory_length=memory_length, same_length=True)
    config.update(cutoffs=(), div_val=1, tie_projections=(), scan_layers=True)
    model = models.build(config, vocab_size=2)
    params = jax.eval_shape(model.init, jax.random.key(0))
    to_cache = functools.partial(model.to_cache, segment_length=segment_length)
    plain = jax.eval_shape(lambda: model.init_state(1))
    cached = jax.eval_shape(to_cache, params, plain)
    ids_BT = jax.ShapeDtypeStruct((1, segment_length), jnp.int32)

    def operations(state):
        lowered = jax.jit(model.apply).lower(params, ids_BT, ids_BT, state)
        return lowered.compile().cost_analysis()["flops"]

    assert operations(plain) / operations(cached) > fewer


def test_a_token_writes_one_slot_and_moves_none():
    model, params = build()
    ring = model.to_cache(params, warm(model, params), segment_length=1)
    step = jit(model.apply)
    for expected in (7, 0, 1):  # of M + 1 slots
        ids_B1 = np.full((B, 1), 3)
        _, after, _ = step(params, ids_B1, ids_B1, ring)
        for old, new in zip(ring[:2], after[:2], strict=True):
            changed_N = np.any(np.asarray(old != new), axis=(0, 1, 2, 4))
            assert np.flatnonzero(changed_N).tolist() == [expected]
        assert after.newest == expected
        np.testing.assert_array_equal(after.r_LCHK, ring.r_LCHK)
        ring = after


def test_no_array_of_the_slots_is_copied_for_a_token():
    """In the compiled loop over tokens: written in place, read layer by layer."""
    model, params = build(memory_length=10, n_layer=3)
    ring = model.to_cache(params, model.init_state(B), segment_length=1)

    def generate(params, ring):
        def one(ring, _):
            ids_B1 = jnp.zeros((B, 1), jnp.int32)
            return model.apply(params, ids_B1, ids_B1, ring)[1], None

        return jax.lax.scan(one, ring, length=16)[0]

    text = jax.jit(generate, donate_argnums=1).lower(params, ring).compile().as_text()
    slots = "f32[3,4,2,11,4]"
    made = re.findall(rf"= {re.escape(slots)}\S* ([\w-]+)\(", text)
    assert "dynamic-update-slice" in made and "copy" not in made, made


# What it gives ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in ATTENTION), ("relative", "bfloat16")],
)
def test_scores_as_the_plain_state_in_low_precision(name, dtype):
    model, params = build(name, dtype=dtype)
    score = jit(model.apply)
    for longest in (T, 1):
        plain = warm(model, params)
        cached = model.to_cache(params, plain, segment_length=longest)
        for start in range(0, 4 * T, longest):
            ids_BT = np.tile(TOKENS[start : start + longest], (B, 1))
            nll_BT, plain, _ = score(params, ids_BT, ids_BT, plain)
            found_BT, cached, _ = score(params, ids_BT, ids_BT, cached)
            # Rounded once more between bfloat16 layers where the compiler fuses less.
            tolerance = 1e-4 if dtype == "float32" else 0.3
            np.testing.assert_allclose(found_BT, nll_BT, atol=tolerance, rtol=0)
        assert cached.length_B.tolist() == plain.length_B.tolist()


@pytest.mark.parametrize(
    ("name", "segment_length"), [("relative", 1), ("learned, pre-norm", T)]
)
def test_any_mesh_gives_the_score_of_one_device(name, segment_length):
    model, params = build(name)
    plan = scoring.cut_rows(
        len(TOKENS),
        batch_size=B,
        segment_length=segment_length,
        memory_length=M,
        n_layer=2,
    )

    def nats(sizes):
        mesh, fsdp = sharding.make_mesh(sizes), sizes.get("fsdp", 1)
        placed = sharding.parameters(mesh, params, model.param_axes(params))
        evaluator = scoring.Evaluator(
            model, batch_size=B, segment_length=segment_length, mesh=mesh
        )
        state = evaluator._init_state(params)
        split = state[0].sharding.shard_shape(state[0].shape)
        shape = 2, B // (sizes["data"] * fsdp), 2 // sizes["tensor"]
        assert split[:3] == shape
        return evaluator.score(jax.device_put(params, placed), TOKENS, plan).nats

    expected = nats({"data": 1, "tensor": 1})
    found = nats({"data": 2, "fsdp": 2, "tensor": 2})
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_trunk_takes_it():
    model, params = build()
    state, x_BTD = warm(model, params), jnp.ones((B, T, 8))
    expected, _, _ = model.trunk.apply(params, x_BTD, state)
    for tree in (params, params["trunk"]):
        cached = model.to_cache(tree, state, segment_length=T)
        y_BTD, _, _ = model.trunk.apply(tree, x_BTD, cached)
        np.testing.assert_allclose(y_BTD, expected, atol=1e-4)


def test_what_a_reset_hides_may_be_nan():
    """In the segment's own part and in the slots, which later queries do not see."""
    model, params = build()
    x_BTD = np.random.default_rng(7).normal(size=(B, T, 8)).astype(np.float32)
    nan_BTD, resets_BT = x_BTD.copy(), np.zeros((2, B, T), bool)
    nan_BTD[0, :3], resets_BT[0, 0, 3] = np.nan, True
    nan_BTD[1, 4], resets_BT[1, 1, 2] = np.nan, True
    run = jit(lambda x, state, r: model.trunk.apply(params, x, state, resets_BT=r)[:2])
    plain = model.init_state(B)
    cached = model.to_cache(params, plain, segment_length=T)
    lost = np.zeros((2, B, T), bool)
    lost[0, 0, :3] = lost[0, 1, 4] = lost[1, 1, :2] = True
    for k, part_BTD in enumerate((nan_BTD, x_BTD)):
        expected, plain = run(part_BTD, plain, resets_BT[k])
        found, cached = run(part_BTD, cached, resets_BT[k])
        np.testing.assert_array_equal(np.isnan(found).any(axis=-1), lost[k])
        np.testing.assert_allclose(found, expected, atol=1e-4)


# What it refuses ----------------------------------------------------------------------


def test_refuses_what_it_cannot_do():
    model, params = build(dropout=0.1)
    state, ids_BT = model.init_state(B), np.zeros((B, T), int)
    segments = model.to_cache(params, state, segment_length=T - 1)
    tokens = model.to_cache(params, state, segment_length=1)
    rngs = {"dropout": jax.random.key(0)}
    for cached, length, options, message in (
        (segments, T, {}, r"a segment of 5 inputs.*segment_length=4\)"),
        (tokens, 2, {}, r"a segment of 2 inputs.*segment_length=1\)"),
        (tokens, 1, {"lengths_B": 1}, "its rows advance together"),
        (segments, 2, {"train": True, "rngs": rngs}, "train=True needs the state"),
    ):
        arrays = params, ids_BT[:, :length], ids_BT[:, :length], cached
        with pytest.raises(ValueError, match=message):
            model.apply(*arrays, **options)


def test_extended_context_and_no_memory_have_no_ring():
    for fields in ({"extended_length": 2}, {"memory_length": 0}):
        model, params = build(**fields)
        cached = model.to_cache(params, model.init_state(B), segment_length=1)
        assert not hasattr(cached, "newest")
        axes = model.cache_axes(segment_length=1)
        assert type(axes) is type(cached)
