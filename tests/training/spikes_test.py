"""The guard against loss spikes: what is one, and which segments are left out."""

import functools
import random

import jax
import numpy as np
import pytest
from training_runs import assert_same, refusal

from xlformer.data.stream import Stream
from xlformer.runs.checkpoints import Checkpoints
from xlformer.training import spikes
from xlformer.training.spikes import add, data_index, skipped

update = jax.jit(spikes.update, static_argnames="warmup")
ratio = jax.jit(spikes.ratio, static_argnames="warmup")


@pytest.fixture(scope="module")
def fresh():
    return spikes.init()


def after(losses, *, factor=2.0, warmup=3):
    found = spikes.init()
    for loss in losses:
        found = update(found, np.float32(loss), factor=factor, warmup=warmup)
    return found


# Which loss is a spike ------------------------------------------------------------


def test_the_average_is_the_plain_mean_and_then_an_exponential_one():
    assert after([4.0]).average == 4
    assert after([4.0, 2.0, 3.0]).average == pytest.approx(3)
    many = after([1.0] * 100)
    assert many.average == pytest.approx(1) and many.count == 100
    more = update(many, np.float32(1.5), factor=2.0)
    assert more.average == pytest.approx(1 + 0.01 * 0.5)


def test_nothing_is_a_spike_in_the_first_steps():
    for count in range(3):
        assert ratio(after([1.0] * count), np.float32(50), warmup=3) == 1
    assert ratio(after([1.0] * 3), np.float32(50), warmup=3) == 50
    assert spikes.WARMUP == 100
    assert ratio(after([1.0] * 99), np.float32(50)) == 1
    assert ratio(after([1.0] * 100), np.float32(50)) == pytest.approx(50)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.1])
def test_a_spike_is_seen_and_does_not_enter_the_average(bad):
    before = after([1.0] * 5)
    assert ratio(before, np.float32(bad), warmup=3) > 2
    assert_same(update(before, np.float32(bad), factor=2.0, warmup=3), before)
    assert update(before, np.float32(1.9), factor=2.0, warmup=3).average > 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_enter_in_the_first_steps_either(fresh, bad):
    assert_same(update(fresh, np.float32(bad), factor=2.0), fresh)


def test_a_loss_of_zero_divides_nothing():
    zero = after([0.0] * 5)
    assert zero.average == 0
    assert ratio(zero, np.float32(0), warmup=3) == 0
    assert np.isfinite(after([0.0] * 5 + [1e-3]).average)


def test_jit_and_scan_give_the_same_bits():
    losses = np.random.default_rng(0).normal(3, 1, 150).astype(np.float32)
    one = after(losses)
    step = functools.partial(spikes.update, factor=2.0, warmup=3)
    scanned, _ = jax.jit(
        lambda s, x: jax.lax.scan(lambda s, loss: (step(s, loss), None), s, x)
    )(spikes.init(), losses)
    assert_same(one, scanned)


# Which segments the steps read ----------------------------------------------------


def test_without_skips_a_step_reads_its_own_segment(fresh):
    for step in (0, 1, 7, 10**6):
        assert data_index(step, []) == step
        assert data_index(step, np.asarray(fresh.skips)) == step


def test_by_hand():
    assert [data_index(step, [2, 3, 6]) for step in range(6)] == [0, 1, 4, 5, 7, 8]
    assert [data_index(step, [0]) for step in range(3)] == [1, 2, 3]


def test_random_skips_leave_out_themselves_and_nothing_else():
    draw = random.Random(0)
    for _ in range(100):
        skips = sorted(draw.sample(range(40), draw.randint(0, spikes.MOST)))
        read = [data_index(step, skips) for step in range(60)]
        expected = [index for index in range(100) if index not in skips]
        assert read == expected[:60]


def test_a_later_skip_moves_no_step_before_it(fresh):
    draw = random.Random(0)
    for _ in range(100):
        skips = sorted(draw.sample(range(40), draw.randint(0, spikes.MOST - 1)))
        step = draw.randint(0, 40)
        before = [data_index(s, skips) for s in range(step + 1)]
        now = np.asarray(add(add(fresh, *skips), before[step]).skips)
        assert [data_index(s, now) for s in range(step)] == before[:-1]
        assert data_index(step, now) > before[step]


TEXT = np.random.default_rng(0).integers(0, 7, 2 * 29)


@pytest.mark.parametrize("extended", [0, 3])
@pytest.mark.parametrize("documents", [None, np.array([0, 13, 29 + 6])])
def test_the_next_segment_hides_what_the_left_out_ones_would_have(documents, extended):
    """Two rows of 7 segments of 4; the second epoch begins with segment 7."""
    options = {"batch_size": 2, "segment_length": 4, "extended_length": extended}
    stream = Stream(TEXT, documents=documents, **options)
    own = [stream.at(k)["resets_BT"] for k in range(17)]
    for skips in ([], [0], [1], [3, 4], [6, 7, 8], [13, 14, 15]):
        previous = -1
        for step in range(10):
            index = data_index(step, skips)
            expected = own[index].copy()
            for left_out in range(previous + 1, index):
                assert left_out in skips
                expected[:, 0] |= own[left_out].any(axis=1)
            found = spikes.batch(stream, step, skips)
            np.testing.assert_array_equal(found["resets_BT"], expected)
            read = stream.at(index)["inputs_BT"]
            np.testing.assert_array_equal(found["inputs_BT"], read)
            previous = index
    begun = spikes.batch(stream, 7, [7])["resets_BT"]
    assert begun[:, 0].all() and not own[8][:, 0].any()


# Leaving out ----------------------------------------------------------------------


def test_skips_are_sorted_and_counted_once(fresh):
    found = add(add(fresh, 30), 10, 30, 20)
    assert skipped(found) == [10, 20, 30]
    assert found.skips.dtype == np.int32 and found.skips.shape == (spikes.MOST,)
    assert skipped(fresh) == []


def test_a_run_that_spikes_all_the_time_is_refused_in_one_line(fresh):
    full = add(fresh, *range(16))
    assert skipped(add(full, 3)) == list(range(16))  # Left out already.
    line = refusal(add, full, 99)
    for part in ("segment 99", "16", "train.spike_factor", "optimizer.learning_rate"):
        assert part in line


def test_the_sharding_stays(fresh):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.device_put(fresh, everywhere)
    assert add(placed, 3).skips.sharding == everywhere


def test_a_checkpoint_brings_it_back(fresh, tmp_path):
    found = add(update(fresh, np.float32(3.0), factor=2.0), 7, 12)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, {"spikes": found}, config={})
        checkpoints.wait()
        _, restored, _ = checkpoints.restore(jax.eval_shape(lambda: {"spikes": found}))
    assert_same(restored["spikes"], found)


# A run ----------------------------------------------------------------------------


class Run:
    """A loop with a checkpoint every 10 steps; segments in `bad` spike."""

    def __init__(self, bad):
        self.bad, self.saved = bad, {0: spikes.init()}
        self.start()

    def start(self):
        """As after a kill: nothing is known but what was saved."""
        self.step = max(self.saved)
        self.spikes = self.saved[self.step]
        self.read = {}  # step -> segment
        self.rollbacks = 0

    def until(self, step):
        while self.step < step:
            if self.step % 10 == 0 and self.step not in self.saved:
                self.saved[self.step] = self.spikes
            index = data_index(self.step, skipped(self.spikes))
            loss = np.float32(9.0 if index in self.bad else 1.0)
            if ratio(self.spikes, loss, warmup=3) > 2:
                live, self.step = skipped(self.spikes), max(self.saved)
                self.spikes = add(self.saved[self.step], *live, index)
                self.rollbacks += 1
                continue
            self.spikes = update(self.spikes, loss, factor=2.0, warmup=3)
            self.read[self.step] = index
            self.step += 1
        return self


def test_two_spikes_after_one_checkpoint_are_both_left_out():
    run = Run(bad={14, 16, 23}).until(40)
    assert run.rollbacks == 3
    assert list(run.read.values()) == [i for i in range(43) if i not in run.bad]


def test_a_run_that_is_killed_after_a_roll_back_finds_the_same_spikes():
    calm = Run(bad={14, 16}).until(30)
    killed = Run(bad={14, 16}).until(15)  # It has rolled back and saved nothing since.
    assert killed.rollbacks and skipped(killed.saved[10]) == []
    killed.start()
    killed.until(30)
    assert_same(killed.spikes, calm.spikes)
    assert killed.read == {s: i for s, i in calm.read.items() if s >= 10}
