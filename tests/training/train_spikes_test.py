"""A run with a loss spike goes back, leaves out the segment and tells so."""

import shutil

import numpy as np
import pytest
from training_runs import (
    SYMBOLS,
    assert_same,
    bag,
    final_state,
    refusal,
    text_config,
    write_text,
)

from xlformer.data.stream import Stream
from xlformer.runs import log
from xlformer.train import train

BAD = 10  # the segment with another text's targets: a loss that training never makes


@pytest.fixture
def read(monkeypatch):
    """Every segment that a run asks for, in order; segment BAD is nonsense."""
    asked, real = [], Stream.at

    def at(self, k):
        asked.append(k)
        batch = real(self, k)
        if k in spoiled:
            batch["targets_BT"] = (batch["targets_BT"] + 3) % SYMBOLS
        return batch

    spoiled = {BAD}
    monkeypatch.setattr(Stream, "at", at)
    return asked, spoiled


@pytest.fixture
def config(tmp_path):
    config = text_config(write_text(tmp_path / "text.txt"), log_every=1)
    config.train.update(spike_factor=1.3, spike_after=4, save_every=6, eval_every=0)
    config.optimizer.learning_rate = 0.1
    config.data.directory = str(tmp_path / "prepared")
    return config


def model():
    return bag(vocab_size=SYMBOLS)


def test_it_goes_back_and_around_the_segment(config, read, tmp_path, capsys):
    asked, _ = read
    result = train(config, tmp_path / "run", model())
    assert result["step"] == 24
    # A lag of one: step 12 was on its way when the loss of step 11 was read.
    seen = [k for n, k in enumerate(asked) if n]  # without the one to compile for
    assert seen[:19] == [*range(12), *range(6, 10), 11, 12, 13]
    assert max(asked) == 24 and asked.count(BAD) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "times its" in x]
    assert line.startswith("the loss of step 11 is ")
    assert line.endswith("back to step 6, leaving out segment 10")
    (record,) = log.read(tmp_path / "run", kind="spike")
    assert record["step"] == 6 and record["spike/segment"] == BAD
    total = log.read(tmp_path / "run", kind="goodput_total")[-1]
    assert 4 <= total["goodput/repeated_steps"] <= 6
    assert tensorboard_steps(tmp_path / "run") == [*range(1, 25)]


def tensorboard_steps(workdir):
    """Of the curve that people see: no step twice, none after a later one."""
    reader = "tensorboard.backend.event_processing.event_accumulator"
    found = pytest.importorskip(reader).EventAccumulator(str(workdir / "tensorboard"))
    found.Reload()
    return [event.step for event in found.Scalars("train/loss_nats")]


def test_a_resumed_run_leaves_it_out_too(config, read, tmp_path):
    train(config, tmp_path / "whole", model())
    config.train.steps = 15
    train(config, tmp_path / "parts", model())
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "15")  # as if killed before it
    config.train.steps = 24
    train(config, tmp_path / "parts", model())
    assert tensorboard_steps(tmp_path / "parts") == [*range(1, 25)]
    found, expected = (
        final_state(tmp_path / d, config, model())[1] for d in ("parts", "whole")
    )
    assert_same(found, expected)
    assert int(expected.spikes.skips[0]) == BAD


def test_before_the_first_save_it_starts_anew(config, read, tmp_path, capsys):
    config.train.save_every = 0
    train(config, tmp_path / "run", model())
    assert "back to step 0, leaving out segment 10" in capsys.readouterr().err


def test_it_is_off_by_default_and_then_nothing_is_left_out(config, read, tmp_path):
    config.train.spike_factor = 0.0
    asked, _ = read
    train(config, tmp_path / "run", model())
    assert asked[1:] == list(range(24))
    assert not log.read(tmp_path / "run", kind="spike")


def test_a_run_that_diverges_ends_in_one_line(config, read, tmp_path):
    _, spoiled = read
    spoiled.update(range(BAD, 200))
    line = refusal(train, config, tmp_path / "run", model())
    assert "config.train.spike_factor" in line
    assert "config.optimizer.learning_rate" in line
    assert np.isfinite(log.read(tmp_path / "run", kind="train")[-1]["step"])
