"""Lines of the log, and when a trace is taken."""

import jax
import numpy as np
import pytest

from xlformer import config as config_lib
from xlformer import progress as progress_lib
from xlformer.runs import log
from xlformer.training.profiler import Profiler
from xlformer.training.progress import Progress


def _train():
    section = config_lib.default_config().train
    section.update(steps=11, batch_size=3, segment_length=7)
    return section


def test_a_line_is_the_mean_of_finite_losses_since_the_last(tmp_path, capsys):
    with log.Writer(tmp_path) as writer:
        progress = Progress(_train(), writer, lambda nats: ("bpc", nats * 2))
        progress.add(np.array([1.0, 5.0]), np.array([True, True]))
        progress.add(np.array([np.nan]), np.array([False]))
        progress.log(3, {"norm/grad": 0.5})
        progress.add(np.array([2.0]), np.array([True]))
        progress.log(4, {})
    first, second = log.read(tmp_path)
    assert (first["train/loss_nats"], first["train/bpc"]) == (3.0, 6.0)
    assert first["norm/grad"] == 0.5 and first["perf/tokens_per_s"] > 0
    assert second["train/loss_nats"] == 2.0  # Nothing is left of the first.
    line = capsys.readouterr().err.splitlines()[0]
    for part in ("step  3/11", "loss 3.0000", "bpc 6.0000", "tokens/s", "eta"):
        assert part in line


def test_time_in_a_pause_is_not_training(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with log.Writer(tmp_path) as writer:
        progress = Progress(_train(), writer, lambda nats: ("bpc", nats))
        with progress.pause():
            now[0] += 50.0
        now[0] += 2.0
        progress.add(np.ones(4), np.ones(4, bool))
        progress.log(4, {})
    (record,) = log.read(tmp_path)
    assert record["perf/tokens_per_s"] == pytest.approx(4 * 3 * 7 / 2)


def test_a_trace_covers_the_chosen_steps_and_ends_with_the_run(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda d: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    profiler = Profiler(tmp_path, first=2, steps=3)
    told = {step: profiler.follow(step) for step in range(7)}
    assert calls == ["start", "stop"]
    assert [step for step, line in told.items() if line] == [5]
    assert profiler.stop() == ""
    none = Profiler(tmp_path, first=2, steps=0)
    assert not any(none.due(step) for step in range(7))
    cut_short = Profiler(tmp_path, first=2, steps=3)
    cut_short.follow(2)
    assert str(tmp_path) in cut_short.stop() and calls[-1] == "stop"


def test_a_line_now_and_then_says_how_fast_a_text_passes(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with progress_lib.counting("preparing words", 20_000_000):
        for _ in range(3):
            now[0] += 3
            progress_lib.passed(1_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["preparing words 10%, 0.3 MB/s, 0:00:54 left"]
    progress_lib.passed(10)  # Nothing counts any more.
    assert capsys.readouterr().err == ""
