"""The Performer: the contract, what its estimate comes to, and its rivals."""

import functools

import jax
import numpy as np
import pytest

from xlformer import models, testing
from xlformer.errors import UserError
from xlformer.kernels import linear_attention, published
from xlformer.layers import favor, lsh
from xlformer.models import PerformerConfig

V, D, B, T = 19, 8, 3, 7
FIELDS = dict(vocab_size=V, n_layer=2, d_model=D, n_head=2, d_inner=11, dropout=0.0)
FIELDS |= dict(scan_layers=True, context_length=T)
# A QR decomposition in each program doubles the time to compile: all_models_test.py has
# orthogonal rows, and one test below.
FAVOR = dict(n_features=5, redraw_interval=7, orthogonal=False)
OTHERS = {
    "softmax": {},
    "lsh": dict(chunk=2, buckets=4, rounds=1),
    "identity": {},
    "linformer": dict(causal=False, projection_length=T),
}


def build(mechanism="favor", **fields):
    known = FAVOR if mechanism == "favor" else OTHERS[mechanism]
    fields = {**FIELDS, **known, **fields}
    return models.build(PerformerConfig(mechanism=mechanism, **fields))


@functools.cache
def weights(model, scale=1.0):
    """Weights as large as those of testing.check_model, without compiling init."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(
        lambda x: scale * random.normal(size=x.shape) * x.size**-0.25, shapes
    )


@functools.cache
def trunk(model):
    """(params, x_BTD, state, **options) -> y_BTD, the new state."""
    return jax.jit(lambda *args, **options: model.trunk.apply(*args, **options)[:2])


def vectors(T=T):
    return np.random.default_rng(T).normal(size=(B, T, D))


def run(model, x_BTD, state=None, params=None, **options):
    state = model.init_state(len(x_BTD), float) if state is None else state
    params = weights(model) if params is None else params
    return trunk(model)(params, x_BTD, state, **options)


CONTRACT = {
    "sums": build(dropout=0.3),
    "window": build(
        "softmax",
        positions="learned",
        context_length=31,
        extended_length=3,
        attention_dropout=0.3,
    ),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_keeps_the_contract(name):
    testing.check_model(CONTRACT[name])


# FAVOR.


def test_many_features_come_to_softmax(float64):
    """The error is that of a mean: of 64 times as many features, an eighth."""
    x_BTD, params = vectors(), weights(build("softmax"))
    exact_BTD, _ = run(build("softmax"), x_BTD, params=params)
    alone_BTD, _ = run(build("identity"), x_BTD, params=params)
    exact_BTD, alone_BTD = map(np.asarray, (exact_BTD, alone_BTD))
    errors = []
    for m in (16, 1024):
        steps = 7 * np.arange(5, dtype=np.int32)
        draws = [
            run(build(n_features=m, orthogonal=True), x_BTD, params=params, step=s)
            for s in steps
        ]
        errors += [np.mean([np.square(y_BTD - exact_BTD) for y_BTD, _ in draws]) ** 0.5]
    seen = np.mean((exact_BTD - alone_BTD) ** 2) ** 0.5
    assert errors[1] < 0.02 * seen and 4 < errors[0] / errors[1] < 16


def test_a_row_whose_sums_are_of_another_draw_begins_anew(float64):
    model, x_BTD = build(), vectors()
    _, state = run(model, x_BTD, step=np.int32(6))
    assert state.draw_B.tolist() == [0] * B and state.position_B.tolist() == [T] * B
    # Row 0 has met the new draw already: it carries on.
    _, other = run(model, x_BTD, step=np.int32(7))
    mixed = jax.tree.map(
        lambda x, y, names: np.where(
            np.arange(B).reshape([-1 if n == "batch" else 1 for n in names]) == 0, y, x
        ),
        state,
        other,
        model.state_axes(),
    )
    y_BTD, after = run(model, x_BTD, mixed, step=np.int32(13))
    fresh_BTD, fresh = run(model, x_BTD, step=np.int32(13))
    on_BTD, on = run(model, x_BTD, other, step=np.int32(13))
    np.testing.assert_array_equal(y_BTD[1:], fresh_BTD[1:])
    np.testing.assert_array_equal(y_BTD[0], on_BTD[0])
    assert (on_BTD != fresh_BTD).any()
    assert after.draw_B.tolist() == [1] * B
    assert after.position_B.tolist() == [2 * T, T, T]
    rows = [x.keys_BHM[:, 1:] for x in (after.sums, fresh.sums)]
    np.testing.assert_array_equal(*rows)
    np.testing.assert_array_equal(after.sums.keys_BHM[:, 0], on.sums.keys_BHM[:, 0])


def test_a_row_without_a_token_keeps_the_draw_of_its_sums(float64):
    """Else the next call took sums of the old draw for those of the new one."""
    model, x_BTD = build(), vectors()
    _, state = run(model, x_BTD, step=np.int32(6))
    _, after = run(model, x_BTD, state, step=np.int32(7), lengths_B=np.array([0, T, 2]))
    assert after.draw_B.tolist() == [0, 1, 1]
    assert after.position_B.tolist() == [T, T, 2]
    y_BTD, _ = run(model, x_BTD, after, step=np.int32(7))
    fresh_BTD, _ = run(model, x_BTD, step=np.int32(7))
    np.testing.assert_array_equal(y_BTD[0], fresh_BTD[0])


def test_a_step_has_the_projections_of_its_interval(float64):
    model, x_BTD = build(), vectors()
    none_BTD, zero_BTD, six_BTD, seven_BTD = (
        run(model, x_BTD, step=None if step is None else np.int32(step))[0]
        for step in (None, 0, 6, 7)
    )
    np.testing.assert_array_equal(none_BTD, six_BTD)
    np.testing.assert_array_equal(zero_BTD, six_BTD)
    assert np.abs(seven_BTD - six_BTD).max() > 1e-3
    never = build(redraw_interval=0)
    np.testing.assert_array_equal(run(never, x_BTD, step=np.int32(7))[0], six_BTD)
    # Each layer has its own; reading keeps them beside the state.
    state = model.to_cache(weights(model), model.init_state(B, float))
    cached_BTD, kept = run(model, x_BTD, state, step=np.int32(7))
    np.testing.assert_allclose(cached_BTD, seven_BTD, 0, 1e-12)
    options = dict(features_name="positive", m=5, K=4, orthogonal=False)
    for layer, w_MK in enumerate(kept.w_LMK):
        expected_MK = favor.projection(0, layer, 1, **options)
        np.testing.assert_allclose(w_MK, expected_MK, 1e-6)
    later_BTD, _ = run(model, x_BTD, kept, step=np.int32(14))
    expected_BTD, _ = run(model, x_BTD, step=np.int32(14))
    np.testing.assert_allclose(later_BTD, expected_BTD, 0, 1e-12)


def test_positions_count_on_from_the_last_reset(float64):
    """Also far from the beginning, where float32 loses the angle of a plain product."""
    model, x_BTD = build(), vectors()
    resets_BT = np.zeros((B, T), bool)
    resets_BT[1, 5] = resets_BT[2, 6] = True
    options = dict(resets_BT=resets_BT, lengths_B=np.array([T, T, 6]))
    _, state = run(model, x_BTD, **options)
    assert state.position_B.tolist() == [T, 2, 6]  # that of row 2 lies in its padding
    far = state._replace(position_B=np.full(B, 200_000_017, np.int32))
    y_BTD, after = run(model, x_BTD, far)
    assert after.position_B.tolist() == [200_000_017 + T] * B
    params, low = jax.tree.map(
        lambda x: np.asarray(x, np.float32) if x.dtype == float else x,
        (weights(model), far),
    )
    with jax.enable_x64(False):
        found_BTD, _ = run(model, x_BTD.astype(np.float32), low, params=params)
    np.testing.assert_allclose(found_BTD, y_BTD, 0, 1e-3)
    near = state._replace(position_B=np.zeros(B, np.int32))
    assert np.abs(run(model, x_BTD, near)[0] - y_BTD).max() > 5e-3


def test_what_is_not_finite_spoils_those_who_see_it(float64):
    model, x_BTD = build(), vectors()
    resets_BT = np.zeros((B, T), bool)
    resets_BT[1, 5] = resets_BT[0, 6] = True  # that of row 0 lies in its padding
    options = dict(resets_BT=resets_BT, lengths_B=np.array([6, T, T]))
    clean_BTD, state = run(model, x_BTD, **options)
    x_BTD[:2, 3, 1] = np.nan
    y_BTD, after = run(model, x_BTD, **options)
    bad_BT = np.zeros((B, T), bool)
    bad_BT[0, 3:6] = bad_BT[1, 3:5] = True
    np.testing.assert_array_equal(np.isnan(y_BTD).any(2)[:, :6], bad_BT[:, :6])
    bad_BT[0, 6] = True
    np.testing.assert_allclose(y_BTD[~bad_BT], clean_BTD[~bad_BT], 0, 1e-12)
    next_BTD, again_BTD = (run(model, vectors(), x)[0] for x in (after, state))
    assert np.isnan(next_BTD[0]).all()
    np.testing.assert_allclose(next_BTD[1:], again_BTD[1:], 0, 1e-12)


# The others.


def test_parameters_are_the_same_but_for_linformers():
    shapes = {
        name: jax.eval_shape(build(name).init, jax.random.key(0))
        for name in ("favor", *OTHERS)
    }
    linformer = shapes.pop("linformer")
    assert all(x == shapes["favor"] for x in shapes.values())
    own = [linformer["trunk"]["layers"].pop(f"length_{x}") for x in ("keys", "values")]
    assert linformer == shapes["favor"] and [x.shape for x in own] == [(2, T, T)] * 2


def test_identity_sees_one_token(float64):
    model, x_BTD = build("identity"), vectors()
    y_BTD, _ = run(model, x_BTD)
    np.testing.assert_array_equal(run(model, x_BTD[:, ::-1])[0][:, ::-1], y_BTD)
    x_BTD[:, 3] = np.nan
    found_BTD, _ = run(model, x_BTD)
    assert np.isnan(found_BTD).any(2).tolist() == [[t == 3 for t in range(T)]] * B


def test_linformer_with_nothing_left_out_is_softmax(float64):
    softmax, model = build("softmax", causal=False), build("linformer")
    params, lengths_B = weights(softmax), np.array([T, 4, 1])
    layers = params["trunk"]["layers"]
    eye_LNP = np.broadcast_to(np.eye(T), (2, T, T))
    own = dict(length_keys=eye_LNP, length_values=eye_LNP)
    params = {"trunk": {**params["trunk"], "layers": {**layers, **own}}}
    expected_BTD, _ = run(softmax, vectors(), lengths_B=lengths_B)
    # A row of E that is 0 adds a key of zeros, so only whole rows are comparable.
    found_BTD, _ = run(model, vectors(), params=params, lengths_B=lengths_B)
    np.testing.assert_allclose(found_BTD[0], expected_BTD[0], 0, 1e-12)
    whole_BTD, _ = run(softmax, vectors())
    alone_BTD, _ = run(softmax, vectors()[1:2, :4])
    np.testing.assert_allclose(expected_BTD[0], whole_BTD[0], 0, 1e-12)
    np.testing.assert_allclose(expected_BTD[1, :4], alone_BTD[0], 0, 1e-12)


def test_hashes_are_of_the_step_and_equal_for_all_rows(float64):
    model, x_BTD = build("lsh"), np.repeat(vectors()[:1], B, 0)
    outputs = [run(model, x_BTD, step=np.int32(step)) for step in (0, 0, 1)]
    (y_BTD, state), (again_BTD, _), (other_BTD, after) = outputs
    np.testing.assert_array_equal(y_BTD, again_BTD)
    np.testing.assert_allclose(y_BTD, y_BTD[:1].repeat(B, 0), 0, 1e-12)
    assert np.abs(y_BTD - other_BTD).max() > 1e-3
    np.testing.assert_array_equal(state.words_BW, after.words_BW)
    assert not model.resets_in_segment and model.positions_from_end
    # Where all tokens are in one chunk nothing is hashed, and later ones do not matter.
    model = build("lsh", chunk=T)
    whole_BTD, _ = run(model, vectors())
    x_BTD = vectors()
    x_BTD[:, 5:] += 1
    np.testing.assert_array_equal(run(model, x_BTD)[0][:, :5], whole_BTD[:, :5])


@pytest.mark.parametrize(
    ("mechanism", "fields", "where", "found"),
    [
        ("lsh", dict(scaling="unit_scaled"), 3, dict(scaling="unit_scaled", after=0)),
        ("lsh", dict(causal=False, chunk=3), 3, dict(chunk_length=3, after=1)),
        (
            "lsh",
            dict(same_bucket_only=True, discount_duplicates=True),
            3,
            dict(same_bucket_only=True, discount_duplicates=True),
        ),
        ("favor", dict(feature_epsilon=0.1), 3, dict(name="positive", epsilon=0.1)),
        ("favor", dict(features="elu"), 3, dict(name="elu", epsilon=1e-3)),
        (
            "favor",
            dict(stabiliser="original", maxima="constant", renormaliser=0.2),
            5,
            dict(feature_epsilon=1e-6, maxima="constant", renormaliser=0.2),
        ),
        (
            "favor",
            dict(stabiliser="original", feature_epsilon=0.1),
            5,
            dict(feature_epsilon=0.1, maxima="differentiated", renormaliser=0.1),
        ),
    ],
)
def test_options_reach_their_operation(monkeypatch, mechanism, fields, where, found):
    """As Lsh, Features or Original, one of its arguments; nothing is computed."""
    operation = {
        "lsh": (lsh, "lsh_attention"),
        "favor": (linear_attention, "linear_attention"),
    }[mechanism]
    if "stabiliser" in fields:
        operation = published, "attention"
    seen, real = [], getattr(*operation)

    def spy(*args, **options):
        seen.append(args[where])
        return real(*args, **options)

    monkeypatch.setattr(*operation, spy)
    model, ids_BT = build(mechanism, **fields), np.zeros((B, T), np.int32)
    arrays = weights(model), ids_BT, ids_BT, model.init_state(B)
    jax.eval_shape(model.apply, *arrays)
    assert {name: getattr(seen[0], name) for name in found} == found


def test_linformer_may_take_keys_for_values(float64):
    model = build("linformer", share_kv=True)
    params = jax.tree.map(np.copy, weights(model))
    y_BTD, _ = run(model, vectors())
    layers = params["trunk"]["layers"]
    layers["attention"]["qkv"][:, :, 2] = layers["length_values"][:] = 7.0
    np.testing.assert_array_equal(run(model, vectors(), params=params)[0], y_BTD)


def test_flops_grow_with_what_is_seen():
    def of(T, name="favor", **fields):
        sizes = dict(batch_size=B, segment_length=T)
        return build(name, **fields).flops(**sizes)

    # K = 4, two heads and layers: 5 features of q and k, a product with v and a sum.
    per_token = 2 * 2 * 4 * 5 * 4, 2 * 2 * 4 * 5 * (4 + 1)
    for length in (T, 8 * T):
        found = of(length)
        assert (found.features, found.attention) == tuple(
            B * length * x for x in per_token
        )
        seen = B * length * (length + 1) / 2
        assert of(length, "softmax").attention == 4 * 2 * D * seen
        assert of(length, "identity").attention == 0
        assert of(length, "linformer").attention == 4 * 2 * D * B * length * T
    pairs = of(T, features="hyperbolic")
    assert pairs.attention == 2 * of(T).attention and pairs.features == of(T).features
    assert of(T).training == 3 * of(T).forward


# Segments.


@pytest.mark.parametrize("fields", [dict(positions="learned"), "linformer"])
def test_no_segment_is_longer_than_what_was_learnt(fields):
    model = build("linformer") if fields == "linformer" else build(**fields)
    assert model.longest_segment == T and build().longest_segment is None
    with pytest.raises(UserError, match=f"{T + 1} tokens.*context_length={T}"):
        run(model, vectors(T + 1))


def test_a_segment_that_carries_nothing_is_one_at_the_beginning():
    carrying, alone = build(), build(carry_sums=False)
    params, ids_BT = weights(carrying), np.arange(B * T).reshape(B, T) % V
    first, _ = jax.jit(carrying.log_probs)(params, ids_BT, carrying.init_state(B))
    found, state = jax.jit(alone.log_probs)(params, ids_BT, alone.init_state(B))
    np.testing.assert_array_equal(found, first)
    assert not jax.tree.leaves(state)


def test_what_carries_nothing_continues_by_a_window():
    assert build().for_generation() == build() and build().memory_length is None
    assert build().replay(5) is None
    alone = build(positions="learned"), build(carry_sums=False)
    for model in (build("softmax"), build("lsh"), *alone):
        assert model.memory_length == 0 and model.for_generation().sight == T
    with pytest.raises(UserError, match="causal=False"):
        build("linformer").for_generation()
