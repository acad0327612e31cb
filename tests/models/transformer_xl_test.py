"""Transformer-XL: the contract for each option, and the paper's own claims."""

import dataclasses
import functools
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import small_transformer as small
from jax import jit
from small_transformer import TINY, D, V

from xlformer import models, testing
from xlformer.errors import UserError
from xlformer.layers import memory
from xlformer.models import TransformerXLConfig

pytestmark = pytest.mark.usefixtures("float64")


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
    model = models.build(TransformerXLConfig(**small.FIELDS | CONTRACT[name]))
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
    model, tokens_BN = small.build(memory_length=M), small.tokens(2, sum(sizes))
    segments_BN, _ = small.score(model, tokens_BN, sizes)
    first_N = np.repeat(np.cumsum((0, *sizes[:-1])), sizes)

    def one_pass(M):
        start_BN = np.broadcast_to(np.maximum(0, first_N - M), tokens_BN.shape)
        return _masked(_without_memory(model))(
            small.weights(model), tokens_BN, start_BN
        )

    small.close(segments_BN, one_pass(M))
    assert np.abs(segments_BN - one_pass(M + 1)).max() > 1e-4


WINDOWS = {
    "pytorch": dict(same_length=True),
    "tensorflow": dict(window=5),
}


@pytest.mark.parametrize("fields", WINDOWS.values(), ids=WINDOWS)
def test_a_window_within_the_memory_hides_the_segment_length(fields):
    """... for a stream of any length, far beyond the memory."""
    model, tokens_BN = small.build(memory_length=5, **fields), small.tokens(2, 17)
    expected_BN, _ = small.score(_without_memory(model), tokens_BN, [17])
    for sizes in ((3, 7, 7), (7, 2, 1, 7), (1,) * 17):
        small.close(small.score(model, tokens_BN, sizes)[0], expected_BN)


def test_the_window_that_same_length_means():
    def window(**fields):
        return TransformerXLConfig(**fields).attention_window

    assert window(memory_length=7) is None
    assert window(memory_length=7, same_length=True) == 6  # 7 keys, self included
    assert window(memory_length=7, same_length=True, window=7) == 7
    assert window(memory_length=7, window=3) == 3
    model = small.build(memory_length=7, same_length=True)
    same, explicit = model, small.build(memory_length=7, window=6)
    tokens_BN = small.tokens(2, 16)
    small.close(
        *(small.score(m, tokens_BN, (11, 5))[0] for m in (same, explicit)), tolerance=0
    )


@pytest.mark.parametrize("sizes", [(11,), (3, 3, 3, 2)], ids=["one_pass", "segments"])
def test_the_last_output_reaches_exactly_layers_times_window(sizes):
    model = small.build(n_layer=3, window=2, memory_length=5)
    tokens_BN = np.repeat(small.tokens(1, 11), 12, axis=0)
    places = np.arange(11)
    tokens_BN[places, places] = (tokens_BN[places, places] + 1) % V
    targets_BN = np.repeat(small.tokens(1, 11), 12, axis=0)
    state, start = model.init_state(12, jnp.float64), 0
    for size in sizes:
        arrays = tokens_BN[:, start : start + size], targets_BN[:, start : start + size]
        nll_BT, state, _ = small.apply(model)(small.weights(model), *arrays, state)
        start += size
    moved = np.asarray(nll_BT)[:-1, -1] != np.asarray(nll_BT)[-1, -1]
    assert moved.tolist() == [False] * 4 + [True] * 7  # itself and 3 x 2 before it


def test_empty_memory_is_no_memory_and_masked_zeros():
    tokens_BT = small.tokens(2, 5)
    model = small.build()
    empty, _ = small.score(model, tokens_BT, [5])
    none, _ = small.score(small.build(memory_length=0), tokens_BT, [5])
    small.close(empty, none)
    state = model.init_state(2, jnp.float64)
    junk = state._replace(hidden_LBMD=jnp.full_like(state.hidden_LBMD, 7.0))
    small.close(small.score(model, tokens_BT, [5], state=junk)[0], empty, tolerance=0)
    attended, _ = small.score(small.build(attend_zero_memory=True), tokens_BT, [5])
    assert np.abs(attended - empty).max() > 0.01
    # The same zeros, declared valid, are those that are attended.
    valid = state._replace(length_B=jnp.full(2, 13, jnp.int32))
    small.close(small.score(model, tokens_BT, [5], state=valid)[0], attended)


def test_attended_zeros_leave_only_a_window_independent_of_the_segments():
    """One pass keeps its M zeros in sight to the end, segments push them out."""
    tokens_BN, sizes = small.tokens(2, 12), (5, 7)
    for window, equal in ((13, True), (None, False)):
        model = small.build(attend_zero_memory=True, window=window)
        assert model.segments_equal_one_pass is equal
        one_BN, _ = small.score(model, tokens_BN, [12])
        difference = np.abs(small.score(model, tokens_BN, sizes)[0] - one_BN).max()
        assert difference < TINY if equal else difference > 1e-3


def test_no_output_depends_on_the_capacity_of_the_memory():
    """Positions are distances: the same context further right in a larger buffer."""
    tokens_BN, sizes = small.tokens(2, 12), (5, 7)
    nll = [
        small.score(m, tokens_BN, sizes)[0]
        for m in (small.build(memory_length=5), small.build())
    ]
    small.close(*nll)


def test_a_clamp_beyond_all_distances_changes_nothing():
    tokens_BN, sizes = small.tokens(2, 12), (5, 7)
    plain, _ = small.score(small.build(), tokens_BN, sizes)
    small.close(
        small.score(small.build(clamp_length=13 + 7), tokens_BN, sizes)[0],
        plain,
        tolerance=0,
    )
    clamped, _ = small.score(small.build(clamp_length=3), tokens_BN, sizes)
    small.close(clamped[:, :4], plain[:, :4])
    assert np.abs(clamped - plain)[:, 4:].max() > 1e-3


def test_beyond_the_clamp_the_order_of_the_memory_does_not_matter():
    model, order = small.build(n_layer=1, clamp_length=4), np.array([2, 0, 3, 1])
    tokens_BT = small.tokens(2, 3)
    full = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 13, D)))
    state = model.init_state(2, jnp.float64)
    state = state._replace(hidden_LBMD=full, length_B=jnp.full(2, 13, jnp.int32))
    expected, _ = small.score(model, tokens_BT, [3], state=state)

    def permuted(first):
        """Four slots from `first` on in another order."""
        moved = full.at[:, :, first : first + 4].set(full[:, :, first + order])
        return small.score(
            model, tokens_BT, [3], state=state._replace(hidden_LBMD=moved)
        )[0]

    # Slot 9 is at distance 4 of the first query: it and all before are beyond.
    small.close(permuted(6), expected)
    assert np.abs(permuted(7) - expected).max() > 1e-4


def test_memory_ends_before_the_extended_part():
    """The last extended_length inputs come again, so they are not remembered."""
    model, params = small.build(extended_length=3), small.weights(small.build())
    tokens_BT = small.tokens(2, 7)
    _, state = small.score(model, tokens_BT, [7])
    assert state.length_B.tolist() == [4, 4]
    inputs_BTD = params["embedding"]["table"][tokens_BT] * D**0.5
    small.close(state.hidden_LBMD[0, :, -4:], inputs_BTD[:, :4])
    assert not state.hidden_LBMD[:, :, :-4].any()


def test_extended_inputs_come_without_targets():
    model, tokens_BT = small.build(extended_length=3), small.tokens(2, 7)
    state = model.init_state(2, jnp.float64)
    whole, _, _ = small.apply(model)(small.weights(model), tokens_BT, tokens_BT, state)
    last, _, _ = small.apply(model)(
        small.weights(model), tokens_BT, tokens_BT[:, 2:], state
    )
    small.close(last, whole[:, 2:])
    for targets_BT in (tokens_BT[:, 4:], np.zeros((2, 8), int)):
        with pytest.raises(UserError, match="extended_length=3 allows at most"):
            model.apply(small.weights(model), tokens_BT, targets_BT, state)


def test_resets_within_a_segment_are_refused_with_attended_zeros():
    model, tokens_BT = small.build(attend_zero_memory=True), small.tokens(2, 5)
    arrays = (
        small.weights(model),
        tokens_BT,
        tokens_BT,
        model.init_state(2, jnp.float64),
    )
    resets_BT = np.zeros((2, 5), bool)
    with pytest.raises(UserError, match="resets_BT has 5 columns"):
        model.apply(*arrays, resets_BT=resets_BT)
    with pytest.raises(UserError, match="resets_BT has 5 columns"):
        model.log_probs(*arrays[:2], arrays[3], resets_BT=resets_BT)
    with pytest.raises(UserError, match="resets_BT has 5 columns"):
        x_BTD = jnp.zeros((2, 5, D))
        model.trunk.apply(arrays[0], x_BTD, arrays[3], resets_BT=resets_BT)
