"""The memory against a list of slots that is updated token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from xlformer.layers import memory

B, M, T = 3, 5, 7
RESETS_BT = np.array([[0] * 7, [1, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]], bool)


def test_append_keeps_the_newest():
    memory_BMD = jnp.arange(1, 6)[None, :, None]
    x_BTD = jnp.arange(10, 17)[None, :, None]

    def slots(end):
        return memory.append(memory_BMD, x_BTD, end)[0, :, 0].tolist()

    assert slots(0) == [1, 2, 3, 4, 5]
    assert slots(2) == [3, 4, 5, 10, 11]
    assert slots(5) == [10, 11, 12, 13, 14]
    assert slots(6) == [11, 12, 13, 14, 15]
    assert slots(7) == [12, 13, 14, 15, 16]


@pytest.mark.parametrize("M", [0, 3, 5, 11])
def test_append_is_the_same_for_every_form_of_end(M):
    random = np.random.default_rng(0)
    memory_BMD = jnp.asarray(random.normal(size=(B, M, 2)))
    x_BTD = jnp.asarray(random.normal(size=(B, T, 2)))
    ends = (0, 2, T)
    by_row = memory.append(memory_BMD, x_BTD, jnp.array(ends))
    for b, end in enumerate(ends):
        static = memory.append(memory_BMD, x_BTD, end)
        expected = np.concatenate([memory_BMD[b], x_BTD[b, :end]])[end:]
        np.testing.assert_array_equal(static[b], expected)
        traced = memory.append(memory_BMD, x_BTD, jnp.asarray(end))
        np.testing.assert_array_equal(traced, static)
        np.testing.assert_array_equal(by_row[b], static[b])


def test_append_keeps_the_dtype_of_the_memory():
    x_BTD = jnp.ones((B, T, 2), jnp.float32)
    for end in (2, jnp.array(2), jnp.array([2] * B)):
        appended = memory.append(jnp.zeros((B, M, 2), jnp.bfloat16), x_BTD, end)
        assert appended.dtype == jnp.bfloat16 and appended.shape == (B, M, 2)


@pytest.mark.parametrize("length", [0, 3, M])
@pytest.mark.parametrize("resets", ["none", "some"])
def test_key_start_is_the_oldest_slot_or_the_last_reset(length, resets):
    length_B = jnp.full(B, length)
    resets_BT = RESETS_BT if resets == "some" else np.zeros((B, T), bool)
    expected = [reference.key_start(length, row, M) for row in resets_BT]
    given = jnp.asarray(resets_BT) if resets == "some" else None
    start_BT = memory.key_start(length_B, given, M=M, T=T)
    assert start_BT.tolist() == expected


def test_key_start_of_a_known_case():
    start_BT = memory.key_start(jnp.array([0, 2, M]), RESETS_BT, M=M, T=T)
    assert start_BT.tolist() == [
        [5, 5, 5, 5, 5, 5, 5],
        [5, 5, 5, 8, 8, 8, 8],
        [0, 0, 0, 0, 0, 0, 11],
    ]


@pytest.mark.parametrize("slots", [0, 3, 5, 11])
@pytest.mark.parametrize("ends", [T, (0, 4, T), (1, 3, 6)])
def test_valid_slots_are_those_of_a_list(slots, ends):
    """append and next_length together, over two segments."""
    random = np.random.default_rng(0)
    hidden_BMD = jnp.asarray(random.normal(size=(B, slots, 2)))
    length_B = jnp.zeros(B, jnp.int32)
    lists = [[] for _ in range(B)]
    end = ends if isinstance(ends, int) else jnp.array(ends)
    for resets_BT in (np.zeros((B, T), bool), RESETS_BT):
        x_BTD = jnp.asarray(random.normal(size=(B, T, 2)))
        hidden_BMD = memory.append(hidden_BMD, x_BTD, end)
        length_B = memory.next_length(length_B, jnp.asarray(resets_BT), end, M=slots)
        for b, stop in enumerate(np.broadcast_to(ends, B)):
            new = np.asarray(x_BTD)[b, :stop], resets_BT[b, :stop]
            lists[b] = reference.memory(lists[b], *new, slots)
            assert length_B[b] == len(lists[b])
            valid = hidden_BMD[b, slots - len(lists[b]) :]
            np.testing.assert_array_equal(valid, np.reshape(lists[b], valid.shape))
    assert length_B.dtype == jnp.int32


def test_next_length_of_a_known_case():
    length_B = jnp.array([1, 3, 3])
    assert memory.next_length(length_B, None, 2, M=M).tolist() == [3, 5, 5]
    assert memory.next_length(length_B, RESETS_BT, T, M=M).tolist() == [5, 4, 1]
    # A reset in the padding does not count.
    assert memory.next_length(length_B, RESETS_BT, 1, M=M).tolist() == [2, 1, 4]


def test_resets_of_one_column_lie_before_the_segment():
    column_B1 = jnp.array([[True], [False]])
    expected = [[True, False, False], [False, False, False]]
    assert memory.expand_resets(column_B1, 3).tolist() == expected
    assert memory.expand_resets(None, 3) is None
    whole_BT = jnp.array(expected)
    assert memory.expand_resets(whole_BT, 3) is whole_BT
    with pytest.raises(ValueError, match="3 columns, expected 5 or 1"):
        memory.expand_resets(whole_BT, 5)


def test_axes_name_the_batch_of_each_leaf():
    state = memory.Memory(np.zeros((2, B, M, 4)), np.zeros(B))
    jax.tree.map(
        lambda x, names: x.shape[names.index("batch")] == B, state, memory.STATE_AXES
    )
    assert memory.STATE_AXES.hidden_LBMD.index("batch") == 1
