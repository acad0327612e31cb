"""Averages in a run: when they begin, of what, at which rates, and what reads them.

Against torch's own numbers it is compared in golden/check_test.py.
"""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import (
    SYMBOLS,
    StepRun,
    assert_close,
    assert_same,
    bag,
    final_state,
    small_config,
    text_config,
    write_text,
)

from xlformer import config as config_lib
from xlformer import models, runs, sharding
from xlformer.errors import UserError
from xlformer.runs import log
from xlformer.train import train
from xlformer.training import averaging, optimizers, steps
from xlformer.training.compiling import TrainingStep


def nt_asgd(config, **optimizer):
    config.optimizer.update(name="nt_asgd", **optimizer)
    return config


# When ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "losses", "index"),
    [
        # Below the least of all but the last two at each, though above the last ones.
        (2, [5, 4, 3, 3.5, 3.5, 2.9], -1),
        (2, [5, 4, 3, 4.5, 3.9, 3.1], 5),
        (1, [5, 4, 4.5, 4.2], 3),
        # As good is not worse, and the first n + 1 switch nothing.
        (2, [3, 3, 3, 3, 3], -1),
        (3, [1, 2, 3, 4, 5], 4),
        (2, [np.nan, 5, np.nan, np.nan, np.nan, 5.5], 5),
        (2, [np.nan] * 5, -1),
    ],
)
def test_a_validation_above_the_least_of_the_older_ones_switches(n, losses, index):
    state, found = averaging.init(n), []
    for loss in losses:
        state = averaging.validated(state, loss)
        found.append(bool(state.triggered))
    assert found.index(True) == index if index >= 0 else not any(found)
    assert averaging.validated(state, 0.0).triggered == state.triggered  # for good


# What, and at which rates -------------------------------------------------------------


def test_the_average_leaves_out_the_first_iterate_and_rates_come_late():
    """A step that is dropped is none. The rate is halved at step 8 of 17."""
    config = nt_asgd(small_config(skip_nonfinite=True), nonmonotone=1)
    config.optimizer.update(schedule="steps", decay_at=(0.47,), decay_factor=0.5)
    run = StepRun(config, bag(nan_steps=(7,)))
    note, state = steps.make_evaluated(config.optimizer), run.create()
    for loss in (3.0, 2.0):
        noted = note(state.plateau, state.averaging, loss, 0)
        assert not noted["averaging"].triggered
        state = state._replace(**noted)
    before, logged = run.states(6, state)
    for found in before:
        assert_same(found.ema, found.params)
        assert int(found.averaging.count) == 0
    state = before[-1]
    state = state._replace(**note(state.plateau, state.averaging, 3.5, 6))
    assert state.averaging.triggered
    iterates, rates = [], [float(x["train/learning_rate"]) for x in logged]
    for k in range(6, 12):
        old, (state, values) = state, run.step(state, run.stream.at(k))
        rates.append(float(values["train/learning_rate"]))
        if k == 7:
            assert_same(state.averaging, old.averaging)
            assert_same(state.ema, old.ema)
            continue
        iterates.append(state.params)
        of = iterates[1:] or iterates
        mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *of)
        assert_close(state.ema, mean)
        assert int(state.averaging.count) == len(iterates)
    np.testing.assert_allclose(rates, [0.1] * 9 + [0.05] * 3)
    assert run.traced == 1


def test_the_rate_of_a_segment_is_as_its_length():
    config = small_config(variable_length=True)
    config.optimizer.length_scaled = True
    run = StepRun(config)
    states, logged = run.states(5)
    lengths = [int(run.stream.at(k)["length"]) for k in range(5)]
    assert len({*lengths}) > 1
    rates = [values["train/learning_rate"] for values in logged]
    np.testing.assert_allclose(rates, [0.1 * n / 7 for n in lengths], rtol=1e-6)
    config.optimizer.length_scaled = False
    plain, _ = StepRun(config).states(1)
    moved, whole = (
        jax.tree.map(lambda a, b: a - b, found[1].params, found[0].params)
        for found in (states, plain)
    )
    assert_close(moved, jax.tree.map(lambda x: x * lengths[0] / 7, whole))


@pytest.mark.parametrize("name", ["sgd", "nt_asgd"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_decay_is_a_part_of_the_clipped_gradient(name, momentum):
    """Of every parameter, and before momentum, as torch has it."""
    section = config_lib.default_config().optimizer
    section.update(name=name, weight_decay=0.25, clip_norm=1.0, momentum=momentum)
    tx = optimizers.build(section)
    params = {"bias": jnp.array([2.0]), "kernel": jnp.array([[4.0]])}
    grads = {"bias": jnp.array([30.0]), "kernel": jnp.array([[40.0]])}
    state = tx.init(params)
    for times in (1, 1 + momentum):
        updates, state = tx.update(grads, state, params)
        assert float(updates["bias"][0]) == pytest.approx(times * (0.6 + 0.5))
        assert float(updates["kernel"][0, 0]) == pytest.approx(times * (0.8 + 1.0))


# In a run -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Whose rate is too high: one of its validations is worse than those before."""
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    found = nt_asgd(text_config(text, eval_every=2, segments_per_call=2), nonmonotone=1)
    found.train.variable_length = True
    found.optimizer.update(learning_rate=30.0, clip_norm=0.25, length_scaled=True)
    found.data.directory = str(text.parent / "prepared")
    return found


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log.Writer, "console", lambda _, line: lines.append(line))
        train(config, workdir, model=bag(vocab_size=SYMBOLS))
    return workdir, lines


def state_of(workdir, config):
    return final_state(workdir, config, bag(vocab_size=SYMBOLS))[1]


def test_a_run_goes_on_bit_for_bit_before_and_after_the_switch(config, whole, tmp_path):
    workdir, lines = whole
    expected = state_of(workdir, config)
    (line,) = [line for line in lines if "averaging from here on" in line]
    switched = int(line.split()[1])
    assert expected.averaging.triggered and int(expected.averaging.count) > 4
    assert int(expected.averaging.count) == 24 - switched
    for steps_taken in (switched - 2, switched, switched + 4, 24):
        shorter = config.copy_and_resolve_references()
        shorter.train.steps = steps_taken
        train(shorter, tmp_path, model=bag(vocab_size=SYMBOLS))
    assert_same(state_of(tmp_path, config), expected)


def test_what_reads_a_run_reads_its_average(config, whole, capsys):
    workdir, model = whole[0], bag(vocab_size=SYMBOLS)
    state = state_of(workdir, config)
    run = runs.load(workdir, checkpoint="latest", model=model)
    assert run.averaged
    assert_same(run.params, state.ema)
    raw = runs.load(workdir, checkpoint="latest", params="raw", model=model)
    assert not raw.averaged
    assert_same(raw.params, state.params)
    assert (raw.params["table_VV"] != run.params["table_VV"]).any()
    # The last validation was of the average.
    last = log.read(workdir, kind="eval")[-1]["eval/nats_per_token"]
    np.testing.assert_allclose(state.averaging.losses_N, [last], rtol=1e-6)


def test_the_average_lies_where_the_parameters_do():
    config = nt_asgd(config_lib.load("quickstart:debug"), schedule="constant")
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
    model = models.build(config.model, vocab_size=13)
    made = TrainingStep(config, model, mesh)
    assert made.placed.ema == made.placed.params
    assert any(s != sharding.replicated(mesh) for s in jax.tree.leaves(made.placed.ema))
    rest = jax.tree.leaves(made.placed.averaging)
    assert set(rest) == {sharding.replicated(mesh)} and len(rest) == 5


# The tail of a run -------------------------------------------------------------------


def test_the_tails_average_is_the_mean_of_the_parameters_after_its_steps():
    """Of 17 steps the last 8; one of them is dropped, and is in no mean."""
    config = small_config(skip_nonfinite=True, tail_average=0.45)
    run = StepRun(config, bag(nan_steps=(11,)))
    states, _ = run.states(17)
    for found in states[:10]:
        assert_same(found.ema, found.params)
        assert int(found.tail.count) == 0
    taken = [10, 11, 13, 14, 15, 16, 17]
    for k in range(10, 18):
        iterates = [states[n].params for n in taken if n <= k]
        assert int(states[k].tail.count) == len(iterates)
        mean = jax.tree.map(
            lambda *x: np.mean(x, axis=0, dtype=np.float64).astype(np.float32),
            *iterates,
        )
        assert_close(states[k].ema, mean, atol=0, rtol=2e-6)
    assert_same(states[12].ema, states[11].ema)


def test_a_run_with_another_tail_begins_its_average_anew():
    tail = averaging.Tail(jnp.int32(0), jnp.int32(6))
    counts = []
    for step, start in [(5, 6), (6, 6), (7, 6), (8, 12), (11, 12), (12, 12), (13, 9)]:
        tail = averaging.tail_stepped(tail, step, start)
        counts.append(int(tail.count))
    assert counts == [0, 1, 2, 0, 0, 1, 1]
    section = config_lib.default_config().train
    for share, total, start in ((0.25, 1000, 750), (1.0, 7, 0), (1e-9, 7, 6)):
        section.update(tail_average=share, steps=total)
        assert averaging.tail_start(section) == start


@pytest.fixture(scope="module")
def tailed(tmp_path_factory):
    """A run of 24 steps that averages the last 12, and all of its checkpoints."""
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    config = text_config(text, tail_average=0.5, keep=4, segments_per_call=2)
    config.train.update(save_every=6, eval_every=12)
    config.data.directory = str(text.parent / "prepared")
    workdir = tmp_path_factory.mktemp("tailed")
    train(config, workdir, model=bag(vocab_size=SYMBOLS))
    return config, workdir


@pytest.mark.parametrize("killed_at", [6, 18])
def test_a_run_killed_before_or_in_its_tail_goes_on_to_the_same_bits(
    tailed, killed_at, tmp_path
):
    config, whole = tailed
    expected = state_of(whole, config)
    assert int(expected.tail.count) == 12 and int(expected.tail.start) == 12
    workdir = shutil.copytree(whole, tmp_path / "killed")
    for path in (workdir / runs.CHECKPOINTS).iterdir():
        if path.name.isdigit() and int(path.name) > killed_at:
            shutil.rmtree(path)
    train(config, workdir, model=bag(vocab_size=SYMBOLS))
    assert_same(state_of(workdir, config), expected)


def test_what_reads_a_run_with_a_tail_reads_its_average(tailed):
    config, workdir = tailed
    expected, model = state_of(workdir, config), bag(vocab_size=SYMBOLS)
    for params, tree in ((None, expected.ema), ("raw", expected.params)):
        found = runs.load(workdir, checkpoint="latest", params=params, model=model)
        assert found.averaged == (params is None)
        assert_same(found.params, tree)
    assert (expected.ema["table_VV"] != expected.params["table_VV"]).any()


# What cannot be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["name=nt_asgd", "train.ema_decay=0.5"], "ema_decay=0.5 with .*'nt_asgd'"),
        (["name=nt_asgd", "train.tail_average=0.5"], "tail_average=0.5 with .*nt_asgd"),
        (
            ["train.ema_decay=0.5", "train.tail_average=0.5"],
            "config.train.ema_decay=0.5 and config.train.tail_average=0.5: .* one",
        ),
        (["train.tail_average=1.5"], "tail_average=1.5 must be at least 0 and at most"),
        (["nonmonotone=3"], "nonmonotone=3 has no effect with 'adam'"),
        (["name=nt_asgd", "nonmonotone=0"], "nonmonotone=0 must be at least 1"),
        (["name=nt_asgd", "momentum=0.5"], "momentum=0.5 has no effect with 'nt_asgd'"),
        (["length_scaled=True"], "length_scaled=True with .*variable_length=False"),
        (["schedule=steps"], r"decay_at=\(\) with .*'steps'"),
        (["decay_at=(0.5,)"], r"decay_at=\(0.5,\) with .*'cosine'"),
        (["decay_factor=0.5"], "decay_factor=0.5 has no effect with .*'cosine'"),
        (["schedule=steps", "decay_at=(0.5,0.5)"], "each above the one before"),
        (["schedule=steps", "decay_at=(0.5,1.0)"], "below 1"),
        (["schedule=steps", "decay_at=('a',)"], "shares of the run"),
        (["schedule=steps", "decay_at=0.5"], "decay_at='0.5': expected tuple"),
    ],
)
def test_what_no_run_can_do_is_one_line(overrides, message):
    overrides = [x if x.startswith("train.") else f"optimizer.{x}" for x in overrides]
    config = config_lib.load("quickstart:debug")
    config.optimizer.schedule = "cosine"
    with pytest.raises(UserError, match=message):
        config_lib.set_fields(config, overrides)
        config_lib.check(config)
