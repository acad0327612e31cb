"""Benchmarks: what is timed, in which order, and what the table says."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from training_runs import quick_jit

from xlformer import bench, flops, models, rehearsal, sharding
from xlformer import config as config_lib

FAST = ["--config=quickstart:debug", "--repeats=2", "--seconds=0.01"]


def fake(name, seconds, log):
    def run(times):
        log.append((name, times))
        return seconds * times, None

    return bench.Case(name, run, tokens=100, at_once=10, flops=2e9)


def test_cases_take_turns_and_the_median_counts():
    log = []
    cases = [fake("a", 0.5, log), fake("b", 0.25, log)]
    bench.measure(cases, repeats=3, seconds=1.0)
    warm, turns = log[:4], log[4:]
    assert warm == [("a", 1), ("a", 1), ("b", 1), ("b", 1)]
    assert turns == [("a", 2), ("b", 4)] * 3
    cases[0].seconds = [1.0, 0.5, 0.4]
    cases[1].seconds = [0.25] * 3
    found = bench.report(cases[0], cases[1], sharding.make_mesh({"data": 1}))
    assert found["ms"] == 500 and found["tokens_per_second"] == 200
    assert found["spread"] == pytest.approx(1.2)
    assert found["of_matrix_products"] == 0.5
    assert found["flops_per_second"] == 4e9 and found["mfu"] is None  # of a CPU


def test_the_share_of_the_datasheet_is_of_all_devices():
    case = fake("a", 1.0, [])
    case.seconds = [1.0]
    devices = np.array([SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")] * 4)
    mesh = SimpleNamespace(devices=devices, size=4)
    assert bench.report(case, case, mesh)["mfu"] == 2e9 / 4 / 989e12


def test_two_steps_are_in_flight_at_most(monkeypatch):
    config = config_lib.load("quickstart:debug")
    mesh, log = sharding.make_mesh({"data": 1}), []
    real = rehearsal.step(config, models.build(config.model, vocab_size=256), mesh)

    class Compiled:
        def __call__(self, state, batch):
            log.append("step")
            loss = SimpleNamespace(block_until_ready=lambda: log.append("done"))
            return state, {"train/loss_nats": loss}

        def memory_analysis(self):
            fields = ("argument", "output", "alias", "temp")
            sizes = {f"{name}_size_in_bytes": 3 for name in fields}
            return SimpleNamespace(**sizes)

    lowered = SimpleNamespace(compile=Compiled)
    function = SimpleNamespace(lower=lambda *_: lowered)
    step = real._replace(function=function, create=lambda _: None)
    monkeypatch.setattr(rehearsal, "step", lambda *_: step)
    case = bench.train_case("a", config, 256, mesh)
    case.run(5)
    in_flight = np.cumsum([1 if event == "step" else -1 for event in log])
    assert max(in_flight) == 2 and in_flight[-1] == 0
    assert case.memory == 6


def test_training_is_timed_for_each_implementation(capsys, tmp_path):
    file = tmp_path / "bench.json"
    arguments = [*FAST, "--implementation=xla,blocked", f"--json={file}"]
    arguments += ["--config.train.batch_size=4", "--mesh=data=2"]
    with quick_jit():
        assert bench.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "2 x cpu" in shown and "tokens/s" in shown
    rows = json.loads(file.read_text())
    assert [row["case"] for row in rows] == ["xla", "blocked"]
    config = config_lib.load("quickstart:debug")
    model = models.build(config.model, vocab_size=256).config
    counted = flops.segment(model, batch_size=4, segment_length=7)
    for row in rows:
        assert row["flops"] == counted.training
        assert len(row["seconds"]) == 2 and row["memory"] > 0
        assert 0 < row["host_ms"] and row["compile_seconds"] > 0


def test_evaluation_sweeps_over_a_field_and_generation_runs():
    config = config_lib.load("quickstart:debug")
    fast = {"repeats": 1, "seconds": 0.01, "mesh": sharding.make_mesh({"data": 1})}
    sweep = ("model.memory_length", ["3", "9"])
    with quick_jit():
        short, long = bench.bench(config, 256, mode="eval", sweep=sweep, **fast)
        (row,) = bench.bench(config, 256, mode="generate", **fast)
    assert short["case"] == "auto model.memory_length=3"
    assert long["flops"] > short["flops"] > 0 and short["ms"] > 0
    assert config.model.memory_length == 5  # the caller's config stays as it was
    assert row["tokens_per_second"] > 0 and row["host_ms"] is None


def test_tokens_are_as_frequent_as_words():
    ids = bench._tokens(1000, (4000,))
    expected = flops.frequencies(1000)
    assert abs((ids == 0).mean() - expected[0]) < 0.03
    assert ids.max() < 1000 and ids.dtype == np.int32
    assert jax.device_count() > 1  # as in every test


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--implementation=foo"], ["config.model.attention='foo'", "blocked"]),
        (["--implementation=pallas_tpu"], ["pallas_tpu", "cpu"]),
        (["--mode=serve"], ["serve", "train", "generate"]),
        (["--sweep=memory_length"], ["--sweep=memory_length", "FIELD:VALUE"]),
        (["--sweep=memory_lenth:1,2"], ["memory_lenth", "did you mean"]),
        (["--repeats=0"], ["--repeats=0"]),
        (["--mesh=data=99"], ["data=99", "8 devices"]),
    ],
)
def test_bad_input_is_one_line(arguments, fragments, capsys):
    assert bench.main([*FAST, *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert all(fragment in line for fragment in fragments), line
