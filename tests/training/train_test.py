"""A run from its first step to its last, with everything that may come in between."""

import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from training_runs import (
    SYMBOLS,
    assert_same,
    bag,
    blanks,
    everything,
    final_state,
    refusal,
    text_config,
    write_text,
)

from xlformer import config as config_lib
from xlformer import models, runs
from xlformer.data.stream import Stream
from xlformer.hosts import faults
from xlformer.runs import log
from xlformer.runs.checkpoints import Checkpoints
from xlformer.runs.locks import WorkdirLock
from xlformer.scoring import Evaluator
from xlformer.train import main, train

TOTAL = 24


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def config(text):
    found = everything(text_config(text))
    found.data.directory = str(text.parent / "prepared")
    return found


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    """(work directory, result, console) of a run to the end; not to be changed."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(log.Writer, "console", lambda _, line: lines.append(line))
        result = train(config, workdir)
    return workdir, result, "\n".join(lines)


@pytest.fixture
def finished(uninterrupted, tmp_path):
    return shutil.copytree(uninterrupted[0], tmp_path / "finished")


def final(workdir, config):
    return final_state(workdir, config, models.build(config.model, vocab_size=SYMBOLS))


def losses(workdir):
    """Everything that was logged, without the time that it took."""
    measured = ("time", "perf/tokens_per_s")
    return [
        {k: v for k, v in record.items() if k not in measured}
        for record in log.read(workdir)
        if not record["kind"].startswith("goodput")
    ]


def assert_same_run(workdir, reference, config):
    step, found, _ = final(workdir, config)
    expected_step, expected, _ = final(reference, config)
    assert step == expected_step == TOTAL
    assert_same(found, expected)
    checkpoints = [
        Checkpoints(d / "checkpoints", read_only=True) for d in (workdir, reference)
    ]
    assert checkpoints[0].steps() == checkpoints[1].steps()
    assert checkpoints[0].best() == checkpoints[1].best()


def signal_at(monkeypatch, step, number=signal.SIGTERM):
    """The signal comes while the batch of a step is made."""
    real = Stream.at

    def at(self, k):
        if k == step:
            os.kill(os.getpid(), number)
            time.sleep(0.1)  # for the thread that notices it
        return real(self, k)

    monkeypatch.setattr(Stream, "at", at)


# A run --------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_what_the_others_read(config, uninterrupted):
    workdir, result, _ = uninterrupted
    assert result["step"] == TOTAL and result["interrupted"] is None
    evals = [r["eval/nats_per_token"] for r in log.read(workdir, kind="eval")]
    assert len(evals) == 3 and evals[2] < evals[1] < evals[0] < np.log(SYMBOLS) + 0.1
    assert result["eval/nats_per_token"] == evals[-1] < 1.9
    assert result["train/loss_nats"] < 1.9
    json.dumps(result)
    assert runs.read_config(workdir).to_dict() == config.to_dict()
    run = runs.load(workdir)
    assert run.vocabulary.size == SYMBOLS and run.averaged and run.step == TOTAL
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    assert checkpoints.steps() == [18, 24] and checkpoints.best() == 24
    card = json.loads((workdir / "data.json").read_text())
    assert card["corpus"] == "text" and len(card["payload_sha256"]) == 64
    assert not list(workdir.glob("*.tmp"))


def test_the_log_says_where_it_is_and_how_fast(uninterrupted):
    workdir, _, console = uninterrupted
    line = (
        r"step +(\d+)/24  loss \d\.\d{4}  bpc \d\.\d{4}  \S+ tokens/s  eta \d:\d\d:\d\d"
    )
    assert [int(s) for s in re.findall(line, console)] == list(range(2, 25, 2))
    assert re.findall(r"step (\d+)  validation bpc", console) == ["8", "16", "24"]
    assert "parameters" in console and "an epoch is" in console
    assert console.count("compiled the step") == 1
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    *records, total = map(json.loads, lines)
    assert total["kind"] == "goodput_total"  # Its weights were made, not restored.
    assert total["goodput/restoring_s"] == 0 < total["goodput/start_up_s"]
    records = [r for r in records if r["kind"] in ("train", "eval")]
    for record in records:
        nats = "eval/nats_per_token" if record["kind"] == "eval" else "train/loss_nats"
        bpc = record["eval/bpc" if record["kind"] == "eval" else "train/bpc"]
        assert bpc == pytest.approx(record[nats] / np.log(2))
    train_records = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in train_records] == list(range(2, 25, 2))
    assert all(r["perf/tokens_per_s"] > 0 for r in train_records)


def test_a_finished_run_says_so_and_changes_nothing(config, finished, capsys):
    before = final(finished, config)
    written = {p: p.read_bytes() for p in finished.glob("*.json")}
    other = config.copy_and_resolve_references()
    other.optimizer.learning_rate /= 2
    other.train.steps -= 1
    result = train(other, finished)
    assert (
        "the run is complete: it has taken 24 steps, and config.train.steps=23 asks for"
        " no more; config.optimizer.learning_rate changed nothing"
    ) in capsys.readouterr().err
    assert {p: p.read_bytes() for p in written} == written
    assert result["step"] == TOTAL and result["interrupted"] is None
    assert (
        result["eval/nats_per_token"]
        == log.read(finished, kind="eval")[-1]["eval/nats_per_token"]
    )
    assert_same(final(finished, config)[1], before[1])


def test_lines_come_at_their_multiples_whatever_one_call_makes(text, tmp_path):
    config = text_config(text, steps=11, segments_per_call=3, log_every=4)
    config.train.update(eval_every=0, save_every=0)
    train(config, tmp_path, model=bag(vocab_size=SYMBOLS))
    steps = [r["step"] for r in log.read(tmp_path, kind="train")]
    assert steps == [6, 9, 11]  # the first call's end at or after 4 and 8, and the last
    assert [r["step"] for r in log.read(tmp_path, kind="eval")] == [11]


# Interrupted and resumed --------------------------------------------------------------


COMMAND = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
from training_runs import everything, text_config
from xlformer import config
from xlformer.data.stream import Stream
from xlformer.train import main
text, workdir, slow = sys.argv[1:]
at = Stream.at
if slow:  # however slow the killer is, the run is not over
    Stream.at = lambda self, k: time.sleep(60 if k == 23 else 0.02) or at(self, k)
made = everything(text_config(text))
made.data.directory = workdir + "-prepared"
config.load = lambda *_: made
sys.exit(main(["--config=made", "--workdir=" + workdir]))
"""


PYTHON = [sys.executable, "-W", "error", "-c"]


class Process:
    """The command in a session of its own, its standard error in a file."""

    def __init__(self, text, workdir, slow=""):
        self.log = workdir.parent / "log.txt"
        here = pathlib.Path(__file__).parents[1]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [*PYTHON, COMMAND, here, text, workdir, slow],
                env=os.environ | {"PYTHONPATH": str(here.parent)},
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
            )

    def wait_for(self, pattern):
        end = time.monotonic() + 60
        while not re.search(pattern, self.log.read_text()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.003)

    def signal(self, number):
        os.killpg(self.process.pid, number)
        return self.process.wait(timeout=60)

    def finish(self):
        assert self.process.wait(timeout=60) == 0, self.log.read_text()


def compiled_steps(workdir):
    kept = (workdir / "compilation_cache").iterdir()
    return {path.name for path in kept if path.name.startswith("jit_step")}


def test_killed_at_a_random_moment_it_ends_bit_by_bit_as_if_it_never_was(
    text, config, uninterrupted, tmp_path, monkeypatch
):
    # What it compiles is then kept in its own directory.
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    workdir = tmp_path / "killed"
    seed = time.time_ns()
    print("seed", seed)  # shown if this fails
    chance = random.Random(seed)
    process, step = Process(text, workdir, slow="yes"), chance.randrange(2, 21)
    process.wait_for(rf"step +({'|'.join(map(str, range(step, TOTAL + 1)))})/24")
    time.sleep(chance.random() * 0.2)
    assert process.signal(signal.SIGKILL) == -signal.SIGKILL
    kept = compiled_steps(workdir)
    Process(text, workdir).finish()
    assert_same_run(workdir, uninterrupted[0], config)
    assert losses(workdir) == losses(uninterrupted[0])
    assert kept and compiled_steps(workdir) == kept


def test_a_signal_while_it_compiles_ends_it_at_once(text, tmp_path):
    process = Process(text, tmp_path / "run")
    process.wait_for("no checkpoint")
    assert process.signal(signal.SIGTERM) == faults.INTERRUPTED
    assert "SIGTERM: stopped before the first step" in process.log.read_text()
    assert not (tmp_path / "run" / "checkpoints" / "1").exists()


@pytest.mark.parametrize("step", [3, 16])
def test_a_signal_saves_that_step_and_the_rest_is_the_same(
    config, uninterrupted, tmp_path, monkeypatch, capfd, step
):
    monkeypatch.setattr(config_lib, "load", lambda *_: config)
    argv = ["--config=made", f"--workdir={tmp_path}"]
    with monkeypatch.context() as patch:
        signal_at(patch, step)
        assert main(argv) == faults.INTERRUPTED == 42
    out, err = capfd.readouterr()
    saved = Checkpoints(tmp_path / "checkpoints", read_only=True).latest()
    assert step < saved <= step + 2 and json.loads(out)["step"] == saved
    assert f"SIGTERM: saved at step {saved}" in err.splitlines()
    assert main(argv) == 0
    out, err = capfd.readouterr()
    assert f"resuming from the checkpoint of step {saved}" in err
    assert_same_run(tmp_path, uninterrupted[0], config)


@pytest.mark.parametrize("step", [8, 24])
def test_a_signal_in_a_validation_leaves_it_for_later(
    config, uninterrupted, tmp_path, monkeypatch, step
):
    real, calls = Evaluator.score, itertools.count(1)

    def score(self, *args, progress, **kwargs):
        if next(calls) == step // config.train.eval_every:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return real(self, *args, progress=progress, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "score", score)
        assert train(config, tmp_path)["interrupted"] == "SIGTERM"
    saved, found, _ = final(tmp_path, config)
    assert saved == step and int(found.evaluated) == max(step - 8, 0)
    result = train(config, tmp_path)
    assert result["eval/nats_per_token"] == uninterrupted[1]["eval/nats_per_token"]
    assert_same_run(tmp_path, uninterrupted[0], config)
    assert losses(tmp_path) == losses(uninterrupted[0])
    # And it is done now.
    again = train(config, tmp_path)
    assert again["step"] == TOTAL


def test_a_run_that_was_too_short_goes_on(text, tmp_path):
    """What a step hides is a function of the step too: it hides the same again."""
    model = blanks(SYMBOLS + 1)
    config = text_config(text, steps=8, segments_per_call=2, objective="masked")
    assert train(config, tmp_path / "a", model=model)["step"] == 8
    config.train.steps = 24
    assert train(config, tmp_path / "a", model=model)["step"] == 24
    train(config, tmp_path / "b", model=model)
    a, b = (final_state(tmp_path / d, config, model)[1] for d in "ab")
    assert_same(a, b)  # The schedule is constant.


def test_a_checkpoint_moves_between_one_device_and_two(text, tmp_path):
    """Its numbers are those of one device but for the order of sums."""
    model = bag(vocab_size=SYMBOLS)
    config = text_config(text, eval_every=0)
    parts = {"one": [(12, 1)], "moved": [(4, 1), (8, 2), (12, 1)]}
    for name, found in parts.items():
        for config.train.steps, config.mesh.data in found:
            train(config, tmp_path / name, model=model)
    one, moved = (final_state(tmp_path / d, config, model) for d in ("one", "moved"))
    assert one[0] == moved[0] == 12
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(moved[1]), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


# Whose directory it is ----------------------------------------------------------------


def test_a_second_process_is_refused_by_name(config, finished, monkeypatch, capsys):
    monkeypatch.setattr(config_lib, "load", lambda *_: config)
    before = (finished / "metrics.jsonl").read_bytes()
    with WorkdirLock(finished):
        assert main(["--config=made", f"--workdir={finished}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and f"in use by pid {os.getpid()} on host" in line
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_what_a_run_killed_in_its_first_seconds_left_is_no_foreign_directory(
    text, tmp_path
):
    for name in ("lock", "metrics.jsonl", "vocabulary.json.tmp", "config.json.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / "vocabulary.json").write_text("another text's, but nothing was learnt")
    config = text_config(text, steps=1)
    train(config, tmp_path, model=bag(vocab_size=SYMBOLS))
    assert "symbols" in json.loads((tmp_path / "vocabulary.json").read_text())


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"model.d_model": 24}, ["d_model=16, now it is 24"]),
        ({"model.pre_norm": False}, ["pre_norm=True, now it is False"]),
        ({"train.segment_length": 13}, ["segment_length=7, now it is 13"]),
        ({"train.batch_size": 3}, ["batch_size=2, now it is 3"]),
        ({"data.unit": "bytes"}, ["unit='chars', now it is 'bytes'"]),
        ({"train.ema_decay": 0.0}, ["ema_decay=0.75, now it is 0.0"]),
    ],
    ids=lambda x: next(iter(x), "") if isinstance(x, dict) else "",
)
def test_a_run_refuses_another_config(config, finished, changes, fragments):
    """Also a complete one, of which nothing is written anew."""
    config = config.copy_and_resolve_references()
    before = {p: p.read_bytes() for p in finished.rglob("*.json*") if p.is_file()}
    for field, value in changes.items():
        section, name = field.split(".")
        config[section][name] = value
    line = refusal(train, config, finished)
    assert all(fragment in line for fragment in fragments), line
    assert {p: p.read_bytes() for p in before} == before


def test_a_resumed_run_refuses_another_text(config, finished, tmp_path):
    other = tmp_path / "other.txt"
    there = pathlib.Path(config.data.path).read_text()
    config = config.copy_and_resolve_references()
    config.data.path, config.train.steps = str(other), 48
    # Of the same length, with the same symbols; then with others.
    for text in (there[:100] + there[:99:-1], there + "§"):
        other.write_text(text)
        line = refusal(train, config, finished)
        assert "was trained on another text" in line and str(finished) in line
        assert f"init_from='{finished}' starts from its weights" in line
