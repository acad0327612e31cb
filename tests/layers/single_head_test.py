"""One head over a ring: what is seen, what is forgotten, what costs nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlformer.layers import feed_forward, single_head
from xlformer.layers.single_head import Drops

B, D, P = 3, 4, 11
# Of segments; each row has some of the tokens of each. One wraps around the end.
LENGTHS = [[7, 7, 7], [7, 0, 3], [5, 5, 1], [1, 1, 1], [11, 2, 11], [3, 3, 0]]
RESETS = {(0, 2): [4], (2, 0): [0], (2, 1): [0], (3, 2): [0], (5, 0): [1, 2]}
RANDOM = np.random.default_rng(0)


def array(*shape):
    return RANDOM.normal(size=shape)


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def segments():
    """(m_BTD, q_BTD, resets_BT, lengths_B) of each segment."""
    for s, lengths in enumerate(LENGTHS):
        T = max(lengths)
        resets_BT = np.zeros((B, T), bool)
        for b in range(B):
            resets_BT[b, RESETS.get((s, b), [])] = True
        yield array(B, T, D), array(B, T, D), resets_BT, np.array(lengths)


@functools.partial(jax.jit, static_argnames="repair")
def step(ring, m_BTD, q_BTD, resets_BT, lengths_B, repair=False):
    seen = single_head.seen(ring, resets_BT, lengths_B, m_BTD.shape[1])
    (rows_BPD,) = ring.rows
    rows_BPD = single_head.repaired(rows_BPD) if repair else rows_BPD
    rows_BPD = single_head.write(rows_BPD, m_BTD, seen, ring.next_B)
    y_BTD = single_head.attend(q_BTD, (m_BTD, m_BTD), (rows_BPD, rows_BPD), seen)
    return y_BTD, single_head.after(ring, (rows_BPD,), seen, resets_BT)


def empty():
    return single_head.empty(B, P, D, blocks=1, dtype=jnp.float64)


def test_it_is_attention_over_the_last_p_minus_l_vectors_and_the_segments_own():
    with jax.enable_x64(True):
        ring, pasts = empty(), [np.zeros((0, D)) for _ in range(B)]
        for m_BTD, q_BTD, resets_BT, lengths_B in segments():
            y_BTD, ring = step(ring, m_BTD, q_BTD, resets_BT, lengths_B)
            for b, (past, L) in enumerate(zip(pasts, lengths_B, strict=True)):
                # The original cuts the memory before it looks: m[-(P - L):].
                past = past[max(len(past) - (P - L), 0) :]
                for t in range(L):
                    past = past[:0] if resets_BT[b, t] else past
                    first = max(np.flatnonzero(resets_BT[b, : t + 1]), default=0)
                    keys = np.concatenate([past, m_BTD[b, first : t + 1]])
                    expected = softmax(keys @ q_BTD[b, t]) @ keys
                    np.testing.assert_allclose(y_BTD[b, t], expected, atol=1e-12)
                last = max(np.flatnonzero(resets_BT[b, :L]), default=0)
                pasts[b] = np.concatenate([past, m_BTD[b, last:L]])[-P:]
            for b, past in enumerate(pasts):
                kept_PD = np.roll(ring.rows[0][b], -int(ring.next_B[b]), 0)
                # Never more than P of them; those of a row come back to back.
                assert ring.length_B[b] == len(past) <= P
                np.testing.assert_array_equal(kept_PD[P - len(past) :], past)


def test_the_order_of_what_is_remembered_changes_nothing():
    with jax.enable_x64(True):
        ring = empty()._replace(
            rows=(jnp.asarray(array(B, P, D)),), length_B=jnp.full(B, P)
        )
        arrays = array(B, 1, D), array(B, 1, D), None, None
        y_BTD, _ = step(ring, *arrays)
        # The slot that is overwritten stays where it is.
        order = np.array([0, *(1 + np.random.default_rng(1).permutation(P - 1))])
        other_BTD, _ = step(ring._replace(rows=(ring.rows[0][:, order],)), *arrays)
        np.testing.assert_allclose(other_BTD, y_BTD, atol=1e-14)


def test_what_comes_before_a_reset_may_be_nan():
    with jax.enable_x64(True):
        full = empty()._replace(rows=(jnp.asarray(array(B, P, D)),))
        full = full._replace(length_B=jnp.full(B, P))
        lost = full._replace(rows=(full.rows[0] * jnp.nan,))
        resets_BT = np.arange(3)[None] == np.array([0, 2, 1])[:, None]
        arrays = array(B, 3, D), array(B, 3, D), resets_BT, None
        expected, found = (step(x, *arrays, repair=True) for x in (full, lost))
        after_BT = np.maximum.accumulate(resets_BT, axis=1)
        np.testing.assert_array_equal(found[0][after_BT], expected[0][after_BT])
        assert np.isfinite(found[1].rows[0]).all()


def test_many_queries_go_in_groups_with_the_same_numbers_and_gradients(monkeypatch):
    T = 7
    with jax.enable_x64(True):
        ring = empty()._replace(length_B=jnp.array([11, 4, 0]))
        m_BTD, q_BTD, rows_BPD = array(B, T, D), array(B, T, D), array(B, P, D)
        seen = single_head.seen(ring, None, np.array([7, 3, 7]), T)
        drops = Drops(0.3, jnp.asarray(RANDOM.integers(1 << 31, size=(B, 2)), "int32"))

        def loss(q_BTD, own_BTD):
            own, rows = (own_BTD, 2 * own_BTD), (rows_BPD, rows_BPD)
            return (single_head.attend(q_BTD, own, rows, seen, drops) ** 3).sum()

        found = []
        for queries in (7, 3):  # 3 groups of 3, of which 2 are none
            monkeypatch.setattr(single_head, "QUERIES", queries)
            whole = jax.jit(jax.value_and_grad(lambda *x: loss(*x), (0, 1)))
            found.append(whole(q_BTD, m_BTD))
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)


def test_probabilities_are_dropped_and_rescaled():
    rows_BPD, T = jnp.zeros((B, P, D)), 400
    ring = single_head.empty(B, P, D, blocks=1, dtype=jnp.float32)
    seen = single_head.seen(ring._replace(length_B=jnp.full(B, P)), None, 0, T)
    drops = Drops(0.25, jnp.arange(2 * B, dtype=jnp.int32).reshape(B, 2))
    ones = jnp.zeros((B, T, D)), jnp.ones((B, T, D))
    # All weights are alike, so that a query finds the share of those that were kept.
    y_BTD = single_head.attend(ones[0], ones, (rows_BPD, rows_BPD + 1), seen, drops)
    assert np.abs(y_BTD.mean((1, 2)) - 1).max() < 0.02 and y_BTD[0, 0, 0] != 1
    assert (y_BTD[0] != y_BTD[1]).any() and (y_BTD[..., 0] == y_BTD[..., 1]).all()


@pytest.mark.parametrize("T", [1, 5])
def test_a_segment_copies_no_ring(T):
    slots, width = 5000, 64
    ring = single_head.empty(B, slots, width, blocks=1, dtype=jnp.float32)
    x_BTD = jnp.zeros((B, T, width))
    for resets_BT in (None, np.zeros((B, T), bool)):
        run = functools.partial(step.__wrapped__, repair=resets_BT is not None)
        run = jax.jit(run, donate_argnums=0)
        made = run.lower(ring, x_BTD, x_BTD, resets_BT, None).compile()
        used, size = made.memory_analysis(), ring.rows[0].nbytes
        # There are scores and weights of T x 5,000, a truth value for each number, and
        # no second ring.
        assert used.alias_size_in_bytes >= size and used.temp_size_in_bytes < size / 2


def test_values_are_scaled_by_a_vector_that_is_made_of_more():
    gate_D, kernel_DCN, bias_CN = array(D), array(D, 2, D), array(2, D)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    c_D, f_D = (sigmoid(gate_D) @ kernel_DCN[:, k] + bias_CN[k] for k in range(2))
    with jax.enable_x64(True):
        found_D = single_head.overparameterised(gate_D, kernel_DCN, bias_CN)
    np.testing.assert_allclose(found_D, sigmoid(f_D) * np.tanh(c_D), atol=1e-14)


def test_the_boom_is_a_network_with_a_fixed_second_matrix():
    x_BTD, kernel_DCN, bias_CN = array(B, 2, D), array(D, 3, D), array(3, D)
    z_BTF = x_BTD @ kernel_DCN.reshape(D, -1) + bias_CN.reshape(-1)
    fixed_FD = np.concatenate([np.eye(D)] * 3)
    expected = (z_BTF / (1 + np.exp(-1.702 * z_BTF))) @ fixed_FD
    with jax.enable_x64(True):
        found = feed_forward.boom(x_BTD, kernel_DCN, bias_CN)
    np.testing.assert_allclose(found, expected, atol=1e-14)
