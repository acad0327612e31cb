"""The stream: layout of rows, purity, hosts, documents, extended, variable length."""

import numpy as np
import pytest

from xlformer.data.stream import Stream
from xlformer.errors import UserError

TOKENS = np.random.default_rng(1).integers(0, 251, 997).astype(np.uint8)


def make(tokens=TOKENS, batch_size=3, segment_length=13, **options):
    return Stream(
        tokens, batch_size=batch_size, segment_length=segment_length, **options
    )


def same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)
        assert left[key].dtype == right[key].dtype


def test_rows_are_contiguous_and_targets_are_the_next_token():
    stream = make()
    length = 997 // 3
    assert stream.steps_per_epoch == (length - 1) // 13
    segments = [stream.at(step) for step in range(stream.steps_per_epoch)]
    used = 13 * stream.steps_per_epoch
    for b in range(3):
        row = TOKENS[b * length : (b + 1) * length]
        inputs = np.concatenate([s["inputs_BT"][b] for s in segments])
        targets = np.concatenate([s["targets_BT"][b] for s in segments])
        np.testing.assert_array_equal(inputs, row[:used])
        np.testing.assert_array_equal(targets, row[1 : used + 1])
    for one, two in zip(segments, segments[1:], strict=False):
        np.testing.assert_array_equal(two["inputs_BT"][:, 0], one["targets_BT"][:, -1])
    assert segments[0]["inputs_BT"].dtype == np.int32
    assert segments[0]["length"] == 13


def test_only_an_epochs_first_segment_resets():
    stream = make()
    n = stream.steps_per_epoch
    found = [stream.at(step) for step in range(2 * n + 1)]
    flags = [s["resets_BT"] for s in found]
    assert all(f.shape == (3, 1) and f.dtype == bool for f in flags)
    assert [bool(f.all()) for f in flags] == [
        step % n == 0 for step in range(2 * n + 1)
    ]
    assert [bool(f.any()) for f in flags] == [
        step % n == 0 for step in range(2 * n + 1)
    ]
    assert [int(s["epoch"]) for s in found] == [step // n for step in range(2 * n + 1)]
    assert [int(s["offset"]) for s in found[:3]] == [0, 13, 26]
    np.testing.assert_array_equal(found[0]["inputs_BT"], found[n]["inputs_BT"])


@pytest.mark.parametrize("options", [{}, {"variable_length": True, "seed": 7}])
@pytest.mark.parametrize("documents", [None, np.array([0, 5, 331, 332, 700])])
@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_hosts_concatenate_to_the_global_batch(hosts, documents, options):
    options = {"batch_size": 6, "documents": documents, "extended_length": 2} | options
    whole = make(**options)
    parts = [make(**options, rows=r) for r in np.split(np.arange(6), hosts)]
    for step in (0, 1, 5, 11, 12, 40):
        expected, found = whole.at(step), [part.at(step) for part in parts]
        for key in ("inputs_BT", "targets_BT", "resets_BT"):
            joined = np.concatenate([f[key] for f in found])
            np.testing.assert_array_equal(joined, expected[key])
        for key in ("length", "epoch", "offset"):
            assert {int(f[key]) for f in found} == {int(expected[key])}


def test_rows_need_not_lie_side_by_side():
    options = {"batch_size": 6, "documents": np.array([0, 5, 331, 332, 700])}
    whole, part = make(**options), make(**options, rows=[1, 2, 5])
    for step in (0, 1, 11):
        for key in ("inputs_BT", "targets_BT", "resets_BT"):
            expected = whole.at(step)[key][[1, 2, 5]]
            np.testing.assert_array_equal(part.at(step)[key], expected)


def test_documents_reset_at_their_first_token():
    documents = np.array([0, 4, 13, 331, 332, 400, 996])
    stream = make(documents=documents, extended_length=5)
    for step in range(stream.steps_per_epoch + 1):
        batch = stream.at(step)
        offset = int(batch["offset"])
        expected = np.zeros((3, 5 + 13), bool)
        for b in range(3):
            for column in range(5 + 13):
                place = offset - 5 + column
                begins = b * stream.row_length + place in documents
                expected[b, column] = place >= 0 and (begins or place == 0)
        np.testing.assert_array_equal(batch["resets_BT"], expected)


@pytest.mark.parametrize("extended", [13, 17, 26])
def test_extended_inputs_hold_what_came_before(extended):
    """The row's first token resets in every segment that has it among its inputs."""
    length = 997 // 3
    stream = make(extended_length=extended)
    rows = TOKENS[: 3 * length].reshape(3, length)
    for step in range(stream.steps_per_epoch):
        batch, offset = stream.at(step), 13 * step
        lack = max(extended - offset, 0)
        inputs = batch["inputs_BT"]
        assert not inputs[:, :lack].any()
        first = max(offset - extended, 0)
        np.testing.assert_array_equal(inputs[:, lack:], rows[:, first : offset + 13])
        np.testing.assert_array_equal(
            batch["targets_BT"], rows[:, offset + 1 : offset + 14]
        )
        expected = np.zeros((3, extended + 13), bool)
        expected[:, lack] = offset <= extended
        np.testing.assert_array_equal(batch["resets_BT"], expected)


def test_variable_lengths_are_pure_and_cover_every_row():
    stream = make(variable_length=True, seed=5)
    batches = [stream.at(step) for step in range(300)]
    assert batches[-1]["epoch"] > 3
    same(make(variable_length=True, seed=5).at(299), batches[299])
    same(stream.at(17), batches[17])  # backwards, and across epochs
    row = TOKENS[: 997 // 3]
    for epoch in (0, 1):
        mine = [b for b in batches if b["epoch"] == epoch]
        inputs = np.concatenate([b["inputs_BT"][0, : b["length"]] for b in mine])
        targets = np.concatenate([b["targets_BT"][0, : b["length"]] for b in mine])
        np.testing.assert_array_equal(inputs, row[:-1])
        np.testing.assert_array_equal(targets, row[1:])
        assert [bool(b["resets_BT"].all()) for b in mine] == [True] + [False] * (
            len(mine) - 1
        )
    for b in batches:
        assert b["inputs_BT"].shape == b["targets_BT"].shape == (3, 13 + 15)
        assert not b["inputs_BT"][:, b["length"] :].any()
        assert not b["targets_BT"][:, b["length"] :].any()
    other = make(variable_length=True, seed=6)
    assert [other.place(s) for s in range(20)] != [stream.place(s) for s in range(20)]


def test_variable_lengths_follow_the_original():
    stream = make(np.zeros(400_000, np.uint8), 1, 64, variable_length=True)
    lengths = np.array([stream.place(step)[2] for step in range(5000)])
    assert lengths.min() >= 5 and lengths.max() <= 64 + 15
    half = lengths < 48
    assert abs(half.mean() - 0.05) < 0.015
    assert abs(lengths[~half].mean() - 63.5) < 0.5  # the original truncates too
    assert abs(lengths[half].mean() - 31.5) < 1.5
    assert abs(lengths[~half].std() - 5) < 0.4


def test_each_epoch_draws_other_lengths():
    stream = make(variable_length=True, seed=3)
    places = [stream.place(step) for step in range(200)]
    epochs = [[p[1:] for p in places if p[0] == epoch] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]


def test_the_last_token_of_a_row_is_only_a_target():
    assert make(TOKENS[: 3 * 39]).steps_per_epoch == 2
    assert make(TOKENS[: 3 * 40]).steps_per_epoch == 3


def test_a_segment_longer_than_a_row_names_both_values():
    assert make(TOKENS[:42]).at(0)["targets_BT"].shape == (3, 13)
    message = r"config\.train\.segment_length=13 .*config\.train\.batch_size=3 .* 13 "
    with pytest.raises(UserError, match=message):
        make(TOKENS[:41])
