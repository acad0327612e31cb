"""Transformer-XL: the contract for each option, and the paper's own claims."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trained_run
from jax import jit

from xlformer import models, testing
from xlformer.errors import UserError
from xlformer.layers import memory
from xlformer.models import TransformerXLConfig

V, D, TINY = 23, 8, 1e-9
SMALL = dict(
    vocab_size=V,
    n_layer=2,
    d_model=D,
    n_head=2,
    d_inner=11,
    memory_length=13,
    dropout=0.0,
    scan_layers=True,
    norm_epsilon=1e-3,
)


@functools.cache
def _build(**fields):
    return models.build(TransformerXLConfig(**SMALL | fields))


@functools.cache
def _params(model, dtype="float64"):
    """Weights as large as those of testing.check_model, without compiling init."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(
        lambda x: (random.normal(size=x.shape) * x.size**-0.25).astype(dtype), shapes
    )


@functools.cache
def _tokens(B, N):
    return np.random.default_rng(B).integers(V, size=(B, N))


@functools.cache
def _apply(model):
    return jit(model.apply, static_argnames=("train",))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def _score(model, tokens_BN, sizes, *, params=None, state=None, **options):
    """nll of the stream cut into segments of these sizes."""
    params = _params(model) if params is None else params
    state = model.init_state(len(tokens_BN), jnp.float64) if state is None else state
    parts, start = [], 0
    for size in sizes:
        here = slice(start, start + size)
        arrays = tokens_BN[:, here], tokens_BN[:, here] * 5 % V
        nll_BT, state, _ = _apply(model)(params, *arrays, state, **options)
        parts.append(nll_BT)
        start += size
    return np.concatenate(parts, axis=1), state


def _close(actual, expected, tolerance=TINY):
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=0)


CONTRACT = {
    "post_norm": dict(memory_length=11, dropout=0.3),
    "pre_norm_adaptive": dict(
        pre_norm=True,
        final_norm=True,
        untie_r=True,
        cutoffs=(7,),
        div_val=2,
        d_embed=16,
        memory_length=3,
    ),
    "learned_relative_same_length": dict(
        attn_type=1,
        table_length=11,
        clamp_length=5,
        same_length=True,  # up to a distance of 10, beyond the clamp
        memory_length=11,
        scan_layers=False,
    ),
    "absolute": dict(attn_type=2, memory_length=5, allow_incoherent_positions=True),
    "learned_absolute": dict(attn_type=3, table_length=5, memory_length=0),
    "rotary": dict(positions="rotary", memory_length=11, attention_dropout=0.3),
    "attended_zeros": dict(attend_zero_memory=True),
    "remat_extended": dict(remat="full", extended_length=3, memory_length=11),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_keeps_the_contract(name):
    model = models.build(TransformerXLConfig(**SMALL | CONTRACT[name]))
    testing.check_model(model)


# The paper's claims (Dai et al. 2019) and their limits.


def _without_memory(model):
    window = model.config.attention_window
    fields = dict(memory_length=0, same_length=False, window=window)
    return models.build(dataclasses.replace(model.config, **fields))


@functools.cache
def _masked(model):
    """apply with the first visible key of each query given."""

    def apply(params, tokens_BN, start_BN):
        with mock.patch.object(memory, "key_start", lambda *_, **__: start_BN):
            return model.apply(
                params,
                tokens_BN,
                tokens_BN * 5 % V,
                model.init_state(len(tokens_BN), jnp.float64),
                resets_BT=jnp.zeros(tokens_BN.shape, bool),
            )[0]

    return jit(apply)


@pytest.mark.parametrize("sizes", [(3, 5, 2, 7), (7, 1, 5, 4)])
@pytest.mark.parametrize("M", [2, 5])
def test_bounded_memory_equals_a_mask_by_segment(M, sizes):
    """A query sees what lies at most M before its segment: in every layer."""
    model, tokens_BN = _build(memory_length=M), _tokens(2, sum(sizes))
    segments_BN, _ = _score(model, tokens_BN, sizes)
    first_N = np.repeat(np.cumsum((0, *sizes[:-1])), sizes)

    def one_pass(M):
        start_BN = np.broadcast_to(np.maximum(0, first_N - M), tokens_BN.shape)
        return _masked(_without_memory(model))(_params(model), tokens_BN, start_BN)

    _close(segments_BN, one_pass(M))
    assert np.abs(segments_BN - one_pass(M + 1)).max() > 1e-4


WINDOWS = {
    "pytorch": dict(same_length=True),
    "tensorflow": dict(window=5),
}


@pytest.mark.parametrize("fields", WINDOWS.values(), ids=WINDOWS)
def test_a_window_within_the_memory_hides_the_segment_length(fields):
    """... for a stream of any length, far beyond the memory."""
    model, tokens_BN = _build(memory_length=5, **fields), _tokens(2, 17)
    expected_BN, _ = _score(_without_memory(model), tokens_BN, [17])
    for sizes in ((3, 7, 7), (7, 2, 1, 7), (1,) * 17):
        _close(_score(model, tokens_BN, sizes)[0], expected_BN)


def test_the_window_that_same_length_means():
    def window(**fields):
        return TransformerXLConfig(**fields).attention_window

    assert window(memory_length=7) is None
    assert window(memory_length=7, same_length=True) == 6  # 7 keys, self included
    assert window(memory_length=7, same_length=True, window=7) == 7
    assert window(memory_length=7, window=3) == 3
    model = _build(memory_length=7, same_length=True)
    same, explicit = model, _build(memory_length=7, window=6)
    tokens_BN = _tokens(2, 16)
    _close(*(_score(m, tokens_BN, (11, 5))[0] for m in (same, explicit)), tolerance=0)


@pytest.mark.parametrize("sizes", [(11,), (3, 3, 3, 2)], ids=["one_pass", "segments"])
def test_the_last_output_reaches_exactly_layers_times_window(sizes):
    model = _build(n_layer=3, window=2, memory_length=5)
    tokens_BN = np.repeat(_tokens(1, 11), 12, axis=0)
    places = np.arange(11)
    tokens_BN[places, places] = (tokens_BN[places, places] + 1) % V
    targets_BN = np.repeat(_tokens(1, 11), 12, axis=0)
    state, start = model.init_state(12, jnp.float64), 0
    for size in sizes:
        arrays = tokens_BN[:, start : start + size], targets_BN[:, start : start + size]
        nll_BT, state, _ = _apply(model)(_params(model), *arrays, state)
        start += size
    moved = np.asarray(nll_BT)[:-1, -1] != np.asarray(nll_BT)[-1, -1]
    assert moved.tolist() == [False] * 4 + [True] * 7  # itself and 3 x 2 before it


def test_empty_memory_is_no_memory_and_masked_zeros():
    tokens_BT = _tokens(2, 5)
    model = _build()
    empty, _ = _score(model, tokens_BT, [5])
    none, _ = _score(_build(memory_length=0), tokens_BT, [5])
    _close(empty, none)
    state = model.init_state(2, jnp.float64)
    junk = state._replace(hidden_LBMD=jnp.full_like(state.hidden_LBMD, 7.0))
    _close(_score(model, tokens_BT, [5], state=junk)[0], empty, tolerance=0)
    attended, _ = _score(_build(attend_zero_memory=True), tokens_BT, [5])
    assert np.abs(attended - empty).max() > 0.01
    # The same zeros, declared valid, are those that are attended.
    valid = state._replace(length_B=jnp.full(2, 13, jnp.int32))
    _close(_score(model, tokens_BT, [5], state=valid)[0], attended)


def test_attended_zeros_leave_only_a_window_independent_of_the_segments():
    """One pass keeps its M zeros in sight to the end, segments push them out."""
    tokens_BN, sizes = _tokens(2, 12), (5, 7)
    for window, equal in ((13, True), (None, False)):
        model = _build(attend_zero_memory=True, window=window)
        assert model.segments_equal_one_pass is equal
        one_BN, _ = _score(model, tokens_BN, [12])
        difference = np.abs(_score(model, tokens_BN, sizes)[0] - one_BN).max()
        assert difference < TINY if equal else difference > 1e-3


def test_no_output_depends_on_the_capacity_of_the_memory():
    """Positions are distances: the same context further right in a larger buffer."""
    small, large, tokens_BN = _build(memory_length=5), _build(), _tokens(2, 12)
    sizes = (5, 7)
    _close(_score(small, tokens_BN, sizes)[0], _score(large, tokens_BN, sizes)[0])


def test_a_clamp_beyond_all_distances_changes_nothing():
    tokens_BN, sizes = _tokens(2, 12), (5, 7)
    plain, _ = _score(_build(), tokens_BN, sizes)
    _close(_score(_build(clamp_length=13 + 7), tokens_BN, sizes)[0], plain, tolerance=0)
    clamped, _ = _score(_build(clamp_length=3), tokens_BN, sizes)
    _close(clamped[:, :4], plain[:, :4])
    assert np.abs(clamped - plain)[:, 4:].max() > 1e-3


def test_beyond_the_clamp_the_order_of_the_memory_does_not_matter():
    model, order = _build(n_layer=1, clamp_length=4), np.array([2, 0, 3, 1])
    tokens_BT = _tokens(2, 3)
    full = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 13, D)))
    state = model.init_state(2, jnp.float64)
    state = state._replace(hidden_LBMD=full, length_B=jnp.full(2, 13, jnp.int32))
    expected, _ = _score(model, tokens_BT, [3], state=state)

    def permuted(first):
        """Four slots from `first` on in another order."""
        moved = full.at[:, :, first : first + 4].set(full[:, :, first + order])
        return _score(model, tokens_BT, [3], state=state._replace(hidden_LBMD=moved))[0]

    # Slot 9 is at distance 4 of the first query: it and all before are beyond.
    _close(permuted(6), expected)
    assert np.abs(permuted(7) - expected).max() > 1e-4


def test_memory_ends_before_the_extended_part():
    """The last extended_length inputs come again, so they are not remembered."""
    model, params = _build(extended_length=3), _params(_build())
    tokens_BT = _tokens(2, 7)
    _, state = _score(model, tokens_BT, [7])
    assert state.length_B.tolist() == [4, 4]
    inputs_BTD = params["embedding"]["table"][tokens_BT] * D**0.5
    _close(state.hidden_LBMD[0, :, -4:], inputs_BTD[:, :4])
    assert not state.hidden_LBMD[:, :, :-4].any()


def test_extended_inputs_come_without_targets():
    model, tokens_BT = _build(extended_length=3), _tokens(2, 7)
    state = model.init_state(2, jnp.float64)
    whole, _, _ = _apply(model)(_params(model), tokens_BT, tokens_BT, state)
    last, _, _ = _apply(model)(_params(model), tokens_BT, tokens_BT[:, 2:], state)
    _close(last, whole[:, 2:])
    for targets_BT in (tokens_BT[:, 4:], np.zeros((2, 8), int)):
        with pytest.raises(UserError, match="extended_length=3 allows at most"):
            model.apply(_params(model), tokens_BT, targets_BT, state)


def test_resets_within_a_segment_are_refused_with_attended_zeros():
    model, tokens_BT = _build(attend_zero_memory=True), _tokens(2, 5)
    arrays = _params(model), tokens_BT, tokens_BT, model.init_state(2, jnp.float64)
    resets_BT = np.zeros((2, 5), bool)
    with pytest.raises(UserError, match="resets_BT has 5 columns"):
        model.apply(*arrays, resets_BT=resets_BT)
    with pytest.raises(UserError, match="resets_BT has 5 columns"):
        model.log_probs(*arrays[:2], arrays[3], resets_BT=resets_BT)
    with pytest.raises(UserError, match="resets_BT has 5 columns"):
        x_BTD = jnp.zeros((2, 5, D))
        model.trunk.apply(arrays[0], x_BTD, arrays[3], resets_BT=resets_BT)


# Dropout, dtypes, gradients.


def _train(model, key, **options):
    tokens_BT = _tokens(3, 7)
    rngs = {"dropout": jax.random.key(key)}
    return _score(model, tokens_BT, [5, 2], train=True, rngs=rngs, **options)[0]


def test_scanned_and_unrolled_layers_drop_the_same_units():
    fields = dict(dropout=0.3, attention_dropout=0.2)
    scanned, unrolled = _build(**fields), _build(**fields, scan_layers=False)
    params = _params(scanned)
    _close(_train(scanned, 0, params=params), _train(unrolled, 0, params=params))


def test_dropout_without_a_key_is_an_error():
    model, tokens_BT = _build(dropout=0.3), _tokens(3, 5)
    arrays = tokens_BT, tokens_BT, model.init_state(3, jnp.float64)
    for rngs in (None, {}, {"params": jax.random.key(0)}):
        with pytest.raises(ValueError, match="needs rngs={'dropout': key}"):
            model.apply(_params(model), *arrays, train=True, rngs=rngs)
    # Without a rate there is nothing to draw.
    _score(_build(), tokens_BT, [5], train=True)


def test_log_probs_pass_no_gradient_on():
    model, tokens_BT = _build(), _tokens(2, 5)
    _, warm = _score(model, tokens_BT, [5])

    def later(params, hidden_LBMD):
        state = warm._replace(hidden_LBMD=hidden_LBMD)
        log_probs_BTV, state = model.log_probs(params, tokens_BT, state)
        return log_probs_BTV.sum() * 0 + state.hidden_LBMD.sum(), log_probs_BTV.sum()

    grad = jit(jax.grad(lambda *a: later(*a)[0]))(_params(model), warm.hidden_LBMD)
    assert not any(g.any() for g in jax.tree.leaves(grad))
    grad = jit(jax.grad(lambda *a: later(*a)[1], 1))(_params(model), warm.hidden_LBMD)
    assert not grad.any()


def test_bfloat16_computes_near_float32_and_scores_in_float32():
    exact, low = _build(dtype="float32"), _build(dtype="bfloat16")
    params, tokens_BT = _params(exact, "float32"), _tokens(2, 7)

    def score(model):
        state = model.init_state(2)
        return _score(model, tokens_BT, [5, 2], params=params, state=state)

    (expected, _), (nll_BT, state) = score(exact), score(low)
    assert state.hidden_LBMD.dtype == jnp.bfloat16 and nll_BT.dtype == np.float32
    _close(nll_BT, expected, tolerance=0.15)
    assert np.abs(nll_BT - expected).max() > 1e-4


def test_init_is_float32_with_the_originals_spreads():
    fields = dict(d_model=64, d_inner=128, cutoffs=(101,), div_val=2, vocab_size=501)
    model = _build(**fields)
    params = jit(model.init)(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    layers, softmax = params["trunk"]["layers"], params["softmax"]
    expected = [
        (layers["attention"]["qkv"], 0, 0.02),
        (params["embedding"]["table_0"], 0, 0.02),
        (params["embedding"]["projection_1"], 0, 0.01),
        (softmax["cluster_kernel"], 0, 0.02),
        (layers["norm"]["scale"], 1, 0.02),
        (layers["norm"]["bias"], 0, 0),
        (softmax["bias"], 0, 0),
    ]
    for x, mean, deviation in expected:
        x = np.asarray(x)
        assert abs(x.mean() - mean) <= 5 * deviation / x.size**0.5
        assert abs(x.std() - deviation) <= 4 * deviation / x.size**0.5
    # No two layers start alike.
    assert (layers["attention"]["qkv"][0] != layers["attention"]["qkv"][1]).all()


def test_types_2_and_3_take_memory_where_it_is_allowed():
    for fields in (dict(attn_type=2), dict(attn_type=3, table_length=20)):
        model = _build(**fields, allow_incoherent_positions=True)
        nll_BN, state = _score(model, _tokens(2, 12), [5, 7])
        assert np.isfinite(nll_BN).all() and state.length_B.tolist() == [12, 12]
        assert not model.segments_equal_one_pass


@pytest.mark.parametrize("fields", [{}, {"pre_norm": True, "window": 4}])
def test_what_is_hidden_may_be_nan(fields):
    """In memory, padding, or before a reset: neither values nor gradients know."""
    model, random = _build(**fields), np.random.default_rng(0)
    x_BTD, params = random.normal(size=(3, 7, D)), _params(model)["trunk"]
    resets_BT, lengths_B = np.zeros((3, 7), bool), np.array([7, 5, 7])
    resets_BT[[0, 1, 2], [0, 0, 4]] = True
    seen_BT1 = (np.arange(7) < lengths_B[:, None])[..., None]
    seen_BT1[2, :4] = False  # before the reset

    @jit
    def found(x_BTD, state, resets_BT):
        def loss(params, x_BTD):
            options = {"resets_BT": resets_BT, "lengths_B": lengths_B}
            y_BTD, _, _ = model.trunk.apply(params, x_BTD, state, **options)
            return jnp.sin(jnp.where(seen_BT1, y_BTD, 0)).sum(), y_BTD

        grads, y_BTD = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x_BTD)
        return *grads, y_BTD

    state = model.init_state(3, jnp.float64)
    state = state._replace(length_B=state.length_B + 9)
    lost = state._replace(hidden_LBMD=state.hidden_LBMD * jnp.nan)
    _, dx_BTD, y_BTD = found(x_BTD, state, resets_BT)
    nan_BTD = np.where(seen_BT1, x_BTD, np.nan)
    _, lost_dx_BTD, lost_BTD = found(nan_BTD, lost, resets_BT)
    for actual, expected in ((lost_BTD, y_BTD), (lost_dx_BTD, dx_BTD)):
        actual, expected = (np.where(seen_BT1, x, 0) for x in (actual, expected))
        np.testing.assert_allclose(actual, expected, atol=TINY)
    # Where no query is NaN itself, the parameters' gradients are numbers too.
    resets_BT[2, 0] = True
    grads, expected = (found(x_BTD, x, resets_BT)[0] for x in (lost, state))
    for x, y in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        np.testing.assert_allclose(x, y, atol=TINY)
    # And what is seen stays NaN.
    resets_BT[0] = False
    _, _, y_BTD = found(x_BTD, lost, resets_BT)
    assert np.isnan(y_BTD[0, 0]).all() and np.isfinite(y_BTD[1:]).all()


def test_parameters_may_be_arrays_of_numpy():
    """What conversion gives: a gradient in them, not under jit, indexes no numpy."""
    fields = {"cutoffs": (7, 13), "div_val": 2, "d_embed": 16, "vocab_size": 23}
    fields |= {"n_layer": 1, "d_model": 16, "n_head": 2, "memory_length": 4}
    model = models.build(models.TransformerXLConfig(**fields))
    params = trained_run.random_params(model)
    state, x_BTD = model.init_state(2), np.ones((2, 5, 16), np.float32)

    def both(ids_BT):
        def scored(params):
            y_BTD, _, _ = model.trunk.apply(params, x_BTD, state)
            log_p_BTV, _ = model.log_probs(params, ids_BT, state)
            nll_BT, _, _ = model.apply(params, ids_BT, ids_BT, state)
            return nll_BT.sum() + log_p_BTV.sum() + y_BTD.sum()

        return jax.grad(scored)(params)

    found = jax.eval_shape(both, jax.ShapeDtypeStruct((2, 5), "int32"))
    shapes = jax.tree.map(lambda x, y: x.shape == y.shape, found, params)
    assert all(jax.tree.leaves(shapes))
