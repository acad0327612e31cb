"""metrics.jsonl is strict JSON and survives kills; lines and tables for people."""

import json
import math
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlformer import tables
from xlformer.runs import log
from xlformer.training import progress


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def lines(workdir):
    text = (workdir / log.FILE).read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_each_write_is_one_line_of_strict_json(tmp_path):
    with log.Writer(tmp_path / "run") as writer:
        values = {"train/bpc": jnp.float32(1.5), "perf/tokens_per_s": 12, "note": "a"}
        writer.write(np.int64(10), values)
        writer.write(20, {"train/bpc": math.nan, "norm/grad": jnp.float32(jnp.inf)})
        written = lines(tmp_path / "run")  # before close: a killed run keeps them
    assert [r["step"] for r in written] == [10, 20]
    assert written[0]["train/bpc"] == 1.5 and written[0]["perf/tokens_per_s"] == 12
    assert (written[1]["train/bpc"], written[1]["norm/grad"]) == ("nan", "inf")
    last = log.read(tmp_path / "run")[-1]
    assert math.isnan(last["train/bpc"]) and last["norm/grad"] == math.inf


def test_after_a_resume_the_last_record_of_a_step_counts(tmp_path):
    with log.Writer(tmp_path) as killed:
        for step in (10, 20, 30):
            killed.write(step, {"train/bpc": step})
        killed.write(20, {"eval/bpc": 7.0}, kind="eval")
    with log.Writer(tmp_path) as resumed:  # from the checkpoint of step 15
        for step in (20, 25):
            resumed.write(step, {"train/bpc": 100 + step})
    assert len(lines(tmp_path)) == 6
    found = [(r["step"], r["train/bpc"]) for r in log.read(tmp_path, kind="train")]
    assert found == [(10, 10), (20, 120), (25, 125), (30, 30)]
    assert [r["eval/bpc"] for r in log.read(tmp_path, kind="eval")] == [7.0]


def test_a_part_of_a_stranger_has_no_number(tmp_path):
    for name in ("metrics-old.jsonl", "metrics-3-x.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    for number in (1, 2):
        part = log._Parts(log.storage.path(tmp_path))
        assert part._path.name.startswith(f"metrics-{number:06d}-")
        part._path.write_text("")


def test_a_pipe_has_no_lines(tmp_path):
    with log.Writer(tmp_path) as writer:
        writer.write(1, {"train/bpc": 1.0})
    os.mkfifo(tmp_path / "metrics-1.jsonl")
    (tmp_path / "metrics-2.jsonl").mkdir()
    (tmp_path / "metrics-3.jsonl").symlink_to("nowhere")
    assert [r["step"] for r in log.read(tmp_path)] == [1]


def test_a_line_torn_by_a_kill_costs_only_itself(tmp_path):
    with log.Writer(tmp_path) as writer:
        writer.write(1, {"train/bpc": 1.0})
    with (tmp_path / log.FILE).open("a") as file:
        file.write('{"step": 2, "ki')
    with log.Writer(tmp_path) as writer:
        writer.write(3, {"train/bpc": 3.0})
    assert [r["step"] for r in log.read(tmp_path)] == [1, 3]


def test_a_disk_that_is_full_at_the_end_is_reported_once(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "_open_for_append", lambda _: open("/dev/full", "w"))
    writer = log.Writer(tmp_path)
    writer._file.write("x")
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    writer.close()  # nothing is left open, nothing is tried again


def test_nothing_written_is_nothing_read(tmp_path):
    assert log.read(tmp_path) == []
    assert log.read(tmp_path / "missing") == []


def test_a_disabled_writer_leaves_no_trace(tmp_path, capsys):
    with log.Writer(tmp_path / "run", enabled=False) as writer:
        writer.write(1, {"train/bpc": 1.0})
        writer.console("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_tensorboard_files_appear_where_tensorboardx_is_importable(
    tmp_path, monkeypatch
):
    pytest.importorskip("tensorboardX")
    with log.Writer(tmp_path / "with") as writer:
        writer.write(1, {"train/bpc": 1.0, "note": "no number"})
    assert list((tmp_path / "with" / "tensorboard").glob("events*"))
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as if not installed
    with log.Writer(tmp_path / "without") as writer:
        writer.write(1, {"train/bpc": 1.0})
    assert not (tmp_path / "without" / "tensorboard").exists()
    assert len(log.read(tmp_path / "without")) == 1


def curve(workdir, tag="train/bpc"):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    found = reader.EventAccumulator(str(workdir / "tensorboard"))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_curves_of_tensorboard_never_go_back(tmp_path):
    """After a kill, after a spike, and where a run begins anew without a checkpoint."""
    pytest.importorskip("tensorboardX")
    killed = log.Writer(tmp_path)
    killed.rewind(0)
    for step in (0, 2, 4, 6):
        killed.write(step, {"train/bpc": step})
    killed.close()
    with log.Writer(tmp_path) as resumed:  # in the same second
        resumed.rewind(3)
        for step in (4, 6, 8):
            resumed.write(step, {"train/bpc": 10 + step})
        resumed.rewind(4)  # a spike
        resumed.write(5, {"train/bpc": 25})
    assert curve(tmp_path) == [(0, 0), (2, 2), (4, 14), (5, 25)]
    with log.Writer(tmp_path) as fresh:
        fresh.rewind(0)
        fresh.write(2, {"train/bpc": 32})
    assert curve(tmp_path) == [(2, 32)]


def test_the_line_of_progress():
    line = progress.format_progress(
        step=1200,
        total=10_000,
        loss_nats=1.23456,
        score=1.7811,
        unit="bpc",
        tokens_per_s=12_345.6,
        eta_s=93_784,
    )
    assert line == (
        "step  1,200/10,000  loss 1.2346  bpc 1.7811  12.3k tokens/s  eta 1d 2:03:04"
    )
    assert tables.duration(math.inf) == tables.duration(math.nan) == "?"
    assert [tables.short(n) for n in (7, 999.96, 1e6)] == ["7", "1.0k", "1.0M"]
    assert tables.binary_size(1536) == "1.50 KiB"


PARAMS = {
    "embedding": {"table": jax.ShapeDtypeStruct((11, 5), jnp.float32)},
    "softmax": {"bias": jax.ShapeDtypeStruct((11,), jnp.float32)},
    "trunk": {"layers": {"kernel": jax.ShapeDtypeStruct((3, 5, 7), jnp.bfloat16)}},
}


def test_the_table_of_parameters_counts_embeddings_apart():
    rows = [line.split() for line in tables.parameter_table(PARAMS).splitlines()]
    assert rows[1:4] == [
        ["embedding/table", "11x5", "float32", "55"],
        ["softmax/bias", "11", "float32", "11"],
        ["trunk/layers/kernel", "3x5x7", "bfloat16", "105"],
    ]
    assert [row[-1] for row in rows[4:]] == ["171", "66", "105"]
    # Of a model of one's own that calls its embedding something else it knows nothing.
    last = tables.parameter_table(PARAMS["trunk"]).splitlines()[-1]
    assert last.split() == ["total", "105"]


def test_the_estimate_of_memory_adds_up():
    assert tables.tree_bytes(PARAMS) == 4 * (55 + 11) + 2 * 105
    carried = {"h": jax.ShapeDtypeStruct((1024, 256), jnp.float32)}
    line = tables.memory_estimate(PARAMS, {"mu": PARAMS, "nu": PARAMS}, carried)
    assert "parameters 474 B" in line and "optimizer 948 B" in line
    assert "carried state 1.00 MiB" in line and "1.00 MiB without" in line
