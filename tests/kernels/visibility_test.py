"""What a query sees: every answer of Visibility against the rule, pair by pair."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from xlformer.kernels.call import Call, Tiles
from xlformer.kernels.visibility import Visibility

RULES = [
    *reference.RULES.values(),
    *(dict(window=11, causal=causal) for causal in (True, False)),  # sees everything
]
SIZES = [(1, 1), (1, 7), (5, 5), (5, 7), (3, 11)]  # (T, S)


def pairs(T, S, rule, start_T=None):
    """[T, S], from the reference."""
    seen_TS = np.zeros((T, S), bool)
    for t, s in np.ndindex(T, S):
        start = None if start_T is None else start_T[t]
        seen_TS[t, s] = reference.visible(t, s, S - T, start=start, **rule)
    return seen_TS


def starts(T, S):
    """Rows: nothing hidden, part of the memory, a reset at every other query."""
    M = S - T
    return np.array([[0] * T, [M // 2] * T, [M + t - t % 2 for t in range(T)]])


def test_a_band_of_known_numbers():
    def mask(T, S, **rule):
        mask = Visibility(**rule).mask(np.arange(T), np.arange(S), S - T)
        return mask[0, 0].astype(int).tolist()

    assert mask(3, 5) == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1] * 5]
    assert mask(3, 5, window=1) == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert mask(2, 3, window=0) == [[0, 1, 0], [0, 0, 1]]
    assert mask(2, 3, causal=False) == [[1, 1, 1], [1, 1, 1]]
    assert mask(2, 4, window=1, causal=False) == [[0, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("rule", RULES)
def test_masks_and_counts_are_those_of_all_pairs(rule):
    for T, S in SIZES:
        queries, keys = np.arange(T), np.arange(S)
        rule_alone, seen_TS = Visibility(**rule), pairs(T, S, rule)
        mask = rule_alone.mask(queries, keys, S - T)
        assert isinstance(mask, np.ndarray)  # a constant of the program
        np.testing.assert_array_equal(mask[0, 0], seen_TS)
        assert rule_alone.keys_seen(T, S).tolist() == seen_TS.sum(1).tolist()
        start_BT = starts(T, S)
        whole = dataclasses.replace(rule_alone, key_start_BT=start_BT)
        mask = whole.mask(queries, keys, S - T)
        for b, start_T in enumerate(start_BT):
            np.testing.assert_array_equal(mask[b, 0], pairs(T, S, rule, start_T))
        last = whole.of_queries(T - 1, T).mask(queries[-1:], keys, S - T)
        np.testing.assert_array_equal(last, mask[:, :, -1:])
        assert whole.static == rule_alone and hash(whole.static) == hash(rule_alone)


@pytest.mark.parametrize("rule", RULES)
def test_no_visible_key_lies_outside_of_the_bounds(rule):
    """They are tight, too: each rule so far shows one run of keys."""
    visibility = Visibility(**rule)
    for T, S in SIZES:
        M, seen_TS = S - T, pairs(T, S, rule)
        for first_query in range(T):
            for last_query in range(first_query, T):
                seen = np.flatnonzero(seen_TS[first_query : last_query + 1].any(0))
                found = visibility.key_range(first_query, last_query, T, S)
                assert found == (seen[0], seen[-1] + 1)
        for key in range(S):
            seen = np.flatnonzero(seen_TS[:, key])
            if not seen.size:
                continue
            first, last = visibility.first_query(key, M), visibility.last_query(key, M)
            assert seen[0] == (0 if first is None else max(first, 0))
            assert seen[-1] == (T - 1 if last is None else min(last, T - 1))


@pytest.mark.parametrize("rule", RULES)
def test_a_query_sees_a_mark_if_one_of_its_keys_is_marked(rule):
    random = np.random.default_rng(0)
    for T, S in SIZES:
        marked_BS = random.random((3, S)) < 0.3
        for start_BT in (None, starts(T, S)):
            visibility = Visibility(**rule, key_start_BT=start_BT)
            found_BT = visibility.sees(jnp.asarray(marked_BS), T)
            for b in range(3):
                start_T = None if start_BT is None else start_BT[b]
                seen_TS = pairs(T, S, rule, start_T)
                expected_T = (seen_TS & marked_BS[b]).any(1)
                np.testing.assert_array_equal(found_BT[b], expected_T)


@pytest.mark.parametrize("window", [None, 0, 3, 40])
def test_tiles_that_are_skipped_hold_nothing_visible(window):
    T, M, Q, N = 11, 7, 2, 4
    S, rule = M + T, dict(window=window)
    shapes = [jax.ShapeDtypeStruct((3, n, 1, 8), "float32") for n in (T, S, S)]
    start_BT = starts(T, S)
    visibility = Visibility(window, start_BT)
    tiles = Tiles(Call.of(*shapes, None, visibility, rate=0.0), Q, N)
    assert (tiles.query_tiles, tiles.key_tiles) == (6, 5)
    first = tiles.first_tiles(jnp.asarray(start_BT))
    for b, start_T in enumerate(start_BT):
        seen_TS = np.zeros((12, 20), bool)
        seen_TS[:T, :S] = pairs(T, S, rule, start_T)
        seen = seen_TS.reshape(6, Q, 5, N).any((1, 3))
        for i in range(tiles.query_tiles):
            visited = np.arange(5)
            visited = (visited >= first[b, i]) & (visited <= tiles.last_tile(i))
            np.testing.assert_array_equal(visited, seen[i])
    seen = seen_TS.reshape(6, Q, 5, N).any((1, 3))  # of the row with resets
    for n in range(tiles.key_tiles):
        start, stop = tiles.query_range(n)
        assert not seen[:start, n].any() and not seen[stop:, n].any()


def test_it_goes_through_a_compiled_function_and_a_loop():
    """Static but for the starts: another window is another program."""
    traced = []

    @jax.jit
    def count(visibility):
        traced.append(visibility.window)
        return visibility.mask(np.arange(2), np.arange(4), 2).sum()

    start_BT = jnp.zeros((1, 2), jnp.int32)
    assert count(Visibility(1, start_BT)) == 4
    assert count(Visibility(1, start_BT + 2)) == 3
    assert count(Visibility(0, start_BT)) == 2
    assert traced == [1, 0]
    _, counts = jax.lax.scan(
        lambda c, v: (c, count(v)), 0, Visibility(1, start_BT[None])
    )
    assert counts.tolist() == [4]
