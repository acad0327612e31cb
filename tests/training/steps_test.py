"""The training step: a pure function that does what the config says, and no more."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import (
    StepRun,
    assert_close,
    assert_same,
    bag,
    small_config,
)

from xlformer import models
from xlformer.training import optimizers, steps
from xlformer.training.gradients import make_gradients


@functools.cache
def transformer(dropout=0.0):
    fields = small_config().model.to_dict() | {"dropout": dropout, "scan_layers": True}
    return models.build(fields, vocab_size=13)


# Several in one call ------------------------------------------------------------------


@pytest.mark.parametrize("make", [bag, transformer], ids=["bag", "transformer"])
def test_three_segments_in_one_call_are_three_calls(make):
    run = StepRun(small_config(ema_decay=0.5), make(dropout=0.3))
    one_by_one, logged = run.states(3)
    batches = [run.stream.at(k) for k in range(3)]
    batches = {name: np.stack([b[name] for b in batches]) for name in batches[0]}
    found, metrics = jax.jit(steps.make_steps(run.function))(one_by_one[0], batches)
    assert_close(found, one_by_one[3])
    stacked = jax.tree.map(lambda *x: np.stack(x), *logged)
    assert_close(metrics, stacked, 3e-6)
    # With the same units dropped, and not the same ones in each step.
    other = found._replace(step=one_by_one[0].step, params=one_by_one[0].params)
    again = run.step(other._replace(step=jnp.int32(7)), run.stream.at(0))[1]
    first = run.step(other, run.stream.at(0))[1]
    assert abs(first["train/loss_nats"] - again["train/loss_nats"]) > 1e-4


@pytest.mark.parametrize("make", [bag, transformer], ids=["bag", "transformer"])
def test_micro_batches_with_a_memory_each_are_the_whole_batch(make):
    whole = StepRun(small_config(batch_size=6), make())
    parts = StepRun(small_config(batch_size=6, micro_batches=2), make())
    start = whole.create()
    (_, _, a), logged = whole.states(2, start)
    (_, _, b), parts_logged = parts.states(2, start)
    assert_close(b.params, a.params)
    assert_close(b.carried, a.carried)  # Every row in its place.
    if make is bag:  # No two rows are equal.
        assert np.unique(a.carried["seen_VB"], axis=1).shape[1] == 6
    for one, other in zip(logged, parts_logged, strict=True):
        np.testing.assert_allclose(one["norm/grad"], other["norm/grad"], rtol=1e-5)
        np.testing.assert_allclose(
            one["train/loss_nats"], other["train/loss_nats"], rtol=1e-6
        )


def test_micro_batches_without_memory_keep_its_shape():
    def loss_fn(params, carried, batch, rngs):
        del rngs
        return (params * batch["inputs_BT"]).mean(), (carried, {})

    gradients = make_gradients(
        loss_fn, micro_batches=3, state_axes=("layers", "batch", "memory")
    )
    carried, batch = jnp.zeros((2, 6, 0)), {"inputs_BT": jnp.arange(6.0)[:, None]}
    found, (after, _) = gradients(jnp.float32(7), carried, batch, jax.random.key(0))
    assert found == 2.5 and after.shape == carried.shape


@pytest.mark.parametrize("make", [bag, transformer], ids=["bag", "transformer"])
def test_micro_batches_drop_what_the_whole_batch_drops(make):
    model = make(dropout=0.5)
    whole = StepRun(small_config(batch_size=6), model)
    parts = StepRun(small_config(batch_size=6, micro_batches=3), model)
    (start, a), logged = whole.states(1)
    (_, b), parts_logged = parts.states(1, start)
    assert_close(b.params, a.params)
    (one,), (other,) = logged, parts_logged
    np.testing.assert_allclose(
        one["train/loss_nats"], other["train/loss_nats"], rtol=1e-6
    )


def test_equal_rows_drop_different_units():
    run = StepRun(small_config(batch_size=2), bag(dropout=0.5))
    start, batch = run.create(), run.stream.at(0)
    batch["inputs_BT"][1] = batch["inputs_BT"][0]
    batch["targets_BT"][1] = batch["targets_BT"][0]
    after, _ = run.step(start, batch)
    single = StepRun(small_config(batch_size=1), run.model)
    one = {name: x[:1] if x.ndim else x for name, x in batch.items()}
    alone, _ = single.step(single.create(), one)
    moved, alone = (
        np.asarray(x.params["table_VV"] - start.params["table_VV"]) != 0
        for x in (after, alone)
    )
    assert moved.any(axis=0).sum() > alone.any(axis=0).sum()  # more symbols are kept


# Lengths ------------------------------------------------------------------------------


def test_variable_lengths_are_the_unpadded_segments_in_one_compiled_step():
    run = StepRun(small_config(segment_length=13, variable_length=True))
    n = 4
    (start, *_, last), logged = run.states(n)
    assert run.traced == 1
    by_hand = StepRun(small_config())
    found, lengths = start, []
    for k in range(n):
        batch = run.stream.at(k)
        length = int(batch["length"])
        for name in ("inputs_BT", "targets_BT"):
            assert batch[name].shape == (2, 13 + 15)
            batch[name] = batch[name][:, :length]
        found, values = by_hand.step(found, batch)
        np.testing.assert_allclose(
            values["train/loss_nats"], logged[k]["train/loss_nats"], rtol=1e-6
        )
        lengths.append(length)
    assert len(set(lengths)) > 2
    assert_close(found, last)
    assert tuple(last.data) == run.stream.place(n - 1) == (0, sum(lengths[:-1]), length)
    seen = np.asarray(last.carried["seen_VB"]).sum(axis=0)
    np.testing.assert_array_equal(seen, sum(lengths))


def test_weights_count_the_valid_targets_and_with_half_the_later_ones():
    weights = functools.partial(steps.loss_weights, (2, 7))

    def rows(*values):
        return [[float(v) for v in values]] * 2

    np.testing.assert_array_equal(weights(7, half=False), rows(1, 1, 1, 1, 1, 1, 1))
    np.testing.assert_array_equal(weights(5, half=False), rows(1, 1, 1, 1, 1, 0, 0))
    np.testing.assert_array_equal(weights(7, half=True), rows(0, 0, 0, 1, 1, 1, 1))
    np.testing.assert_array_equal(weights(5, half=True), rows(0, 0, 1, 1, 1, 0, 0))
    np.testing.assert_array_equal(weights(1, half=True), rows(1, 0, 0, 0, 0, 0, 0))


def test_half_loss_learns_from_the_later_half_of_each_segment():
    run = StepRun(small_config(half_loss=True))
    (start, after), (values,) = run.states(1)
    batch = run.stream.at(0)
    nll_BT, carried, _ = run.model.apply(
        start.params, batch["inputs_BT"], batch["targets_BT"], start.carried
    )
    np.testing.assert_allclose(
        values["train/loss_nats"], nll_BT[:, 3:].mean(), rtol=1e-6
    )
    assert_close(after.carried, carried)  # All of it is remembered.
    moved_V = np.abs(after.params["table_VV"] - start.params["table_VV"]).sum(axis=1)
    assert set(np.flatnonzero(moved_V)) == set(batch["inputs_BT"][:, 3:].ravel())


def test_a_new_epoch_begins_without_a_memory():
    run = StepRun(small_config(segment_length=100))  # 2 rows of 300: 2 segments
    assert run.stream.steps_per_epoch == 2
    found, _ = run.states(3)
    seen = [np.asarray(s.carried["seen_VB"]).sum(axis=0).tolist() for s in found]
    assert seen == [[0, 0], [100, 100], [200, 200], [100, 100]]
    assert [int(s.data.epoch) for s in found] == [0, 0, 0, 1]


# The update ---------------------------------------------------------------------------


def test_sgd_goes_downhill_by_the_rate_of_the_schedule():
    config = small_config()
    config.optimizer.update(schedule="cosine", warmup_steps=2)
    run = StepRun(config)
    found, logged = run.states(4)
    for k, values in enumerate(logged):
        assert values["train/learning_rate"] == run.schedule(k)
    assert [float(v["train/learning_rate"]) for v in logged[:2]] == pytest.approx(
        [0, 0.05]
    )
    batch = run.stream.at(2)

    def loss(params):
        nll_BT, _, _ = run.model.apply(
            params, batch["inputs_BT"], batch["targets_BT"], found[2].carried
        )
        return nll_BT.mean()

    grads = jax.grad(loss)(found[2].params)
    rate = run.schedule(2)
    expected = jax.tree.map(lambda p, g: p - rate * g, found[2].params, grads)
    assert_close(found[3].params, expected)
    assert int(found[4].step) == 4


def test_gradients_are_clipped_by_their_norm_and_logged_before():
    config = small_config()
    config.optimizer.update(clip_norm=0.03, learning_rate=1.0)
    (start, after), (values,) = StepRun(config).states(1)
    moved = jax.tree.map(lambda a, b: a - b, after.params, start.params)
    norm = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(moved)))
    assert norm == pytest.approx(0.03, rel=1e-4)
    assert values["norm/grad"] > 0.1


def test_the_plateau_scales_only_its_own_schedule():
    for name, expected in (("plateau", 0.025), ("constant", 0.1)):
        config = small_config()
        config.optimizer.schedule = name
        run = StepRun(config)
        start = run.create()
        quarter = start.plateau._replace(scale=jnp.float32(0.25))
        _, values = run.step(start._replace(plateau=quarter), run.stream.at(0))
        assert float(values["train/learning_rate"]) == pytest.approx(expected)


def test_validations_without_progress_lower_the_scale():
    config = small_config()
    config.optimizer.update(plateau_factor=0.5, plateau_patience=1)
    update, plateau = steps.make_evaluated(config.optimizer), optimizers.plateau_init()
    scales = []
    for loss in (3.0, 2.0, 2.5, 2.0, 1.9, 2.1):
        noted = update(plateau, None, loss, 7)
        plateau = noted["plateau"]
        assert int(noted["evaluated"]) == 7 and noted["averaging"] is None
        scales.append(float(plateau.scale))
    assert scales == [1, 1, 1, 0.5, 0.5, 0.5]


def test_the_average_is_of_the_steps_taken():
    """Not of the initial parameters; nor does a dropped step count as one."""
    config = small_config(ema_decay=0.75, skip_nonfinite=True)
    (start, *after), _ = StepRun(config, bag(nan_steps=(0, 3))).states(5)
    assert_same(start.ema, start.params)
    assert_same(after[0].ema, start.params)
    assert_same(after[1].ema, after[1].params)
    taken = []
    for k in (1, 2, 4):
        taken.append(after[k].params)
        weights = 0.75 ** np.arange(len(taken))[::-1]
        expected = jax.tree.map(
            lambda *x, w=weights: (
                sum(a * b for a, b in zip(w, x, strict=True)) / sum(w)
            ),
            *taken,
        )
        assert_close(after[k].ema, expected)
    assert_same(after[3].ema, after[2].ema)
    none, _ = StepRun(small_config()).states(1)
    assert none[1].ema is None


@pytest.mark.parametrize("decay", [0.5, 0.999, 0.9999999])
def test_weights_of_the_average_keep_their_digits(decay):
    for n in (1, 2, 3, 1000, 10**6):
        exact = (1 - decay) / -math.expm1(n * math.log(decay))
        found = float(steps.average_weight(decay, jnp.int32(n)))
        assert found == pytest.approx(exact, rel=1e-6), n
    assert float(steps.average_weight(decay, 1)) == 1


def test_a_step_that_is_not_finite_is_dropped_and_counted():
    config = small_config(skip_nonfinite=True, ema_decay=0.5)
    config.optimizer.name = "adam"
    run = StepRun(config, bag(nan_steps=(1, 2, 4)))
    found, logged = run.states(5)
    assert [bool(v["train/finite"]) for v in logged] == [
        True,
        False,
        False,
        True,
        False,
    ]
    for k in (1, 2, 4):
        for part in ("params", "opt_state", "ema", "carried"):
            assert_same(getattr(found[k + 1], part), getattr(found[k], part))
    assert (np.asarray(found[4].params["gain"]) != found[3].params["gain"]).all()
    assert [int(s.step) for s in found] == [0, 1, 2, 3, 4, 5]
    assert [int(s.data.offset) for s in found[1:]] == [0, 7, 14, 21, 28]
    assert [int(s.skipped) for s in found] == [0, 0, 1, 2, 2, 3]
    assert [int(v["train/skipped"]) for v in logged] == [0, 1, 2, 2, 3]
    in_a_row = [int(v["train/skipped_in_a_row"]) for v in logged]
    assert in_a_row == [0, 1, 2, 0, 1]
    assert in_a_row == [int(s.skipped_in_a_row) for s in found[1:]]


def test_a_dropped_segment_leaves_its_resets_to_the_next():
    """Of the rows that have one, before it or inside; the others go on."""
    run = StepRun(small_config(skip_nonfinite=True), bag(nan_steps=(1,)))
    batches = [run.stream.at(k) for k in range(3)]
    for batch in batches:
        batch["resets_BT"] = np.zeros(batch["inputs_BT"].shape, bool)
    batches[1]["resets_BT"][0, 3] = True
    state, seen = run.create(), []
    for batch in batches:
        state, _ = run.step(state, batch)
        seen.append(np.asarray(state.carried["seen_VB"]).sum(0).tolist())
    assert seen == [[7, 7], [0, 7], [7, 14]]


def test_what_is_dropped_already_is_no_spike():
    config = small_config(skip_nonfinite=True, spike_factor=1.5, spike_after=1)
    found, logged = StepRun(config, bag(nan_steps=(2,), inf_steps=(3,))).states(4)
    assert [float(v["spike/ratio"]) for v in logged[2:]] == [1, 1]
    assert [int(s.spikes.count) for s in found] == [0, 1, 2, 2, 2]
    config.train.skip_nonfinite = False
    _, logged = StepRun(config, bag(nan_steps=(2,))).states(3)
    assert np.isinf(logged[2]["spike/ratio"])


def test_without_skipping_the_loss_is_said_to_be_not_finite():
    found, logged = StepRun(small_config(), bag(nan_steps=(1,))).states(2)
    assert [bool(v["train/finite"]) for v in logged] == [True, False]
    assert np.isnan(found[2].params["table_VV"]).any()


# For people who hold on to pmap -------------------------------------------------------


def test_pmap_of_the_pure_step_is_the_step_on_each_device():
    run = StepRun(small_config())
    start, batches = run.create(), [run.stream.at(k) for k in (0, 3)]
    both = jax.tree.map(lambda *x: np.stack(x), start, start)
    batch = {name: np.stack([b[name] for b in batches]) for name in batches[0]}
    found, _ = jax.pmap(run.function)(both, batch)
    for device, one in enumerate(batches):
        after, _ = run.step(start, one)
        assert_close(jax.tree.map(lambda x, i=device: x[i], found), after)
