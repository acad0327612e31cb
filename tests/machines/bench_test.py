"""Benchmarks: what is timed, in which order, and what the table says."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from fake_timings import FAST, fake, timed
from own_trunk import Recurrent
from training_runs import bag, refusal

from xlformer import bench, models, sharding
from xlformer import config as config_lib
from xlformer.layers import adaptive
from xlformer.machines import bench_runs, bench_timing, bench_workloads
from xlformer.machines.bench_runs import Values
from xlformer.machines.bench_table import render
from xlformer.machines.bench_timing import Timing
from xlformer.training.compiling import TrainingStep


def debug():
    config = config_lib.load("quickstart:debug")
    config.model.vocab_size = 256
    return config


def test_timings_take_turns_and_the_median_counts():
    log, done = [], []
    timings = [fake("a", 0.5, log), fake("b", 0.25, log)]
    timings[1].steps = 5
    bench_timing.measure(timings, repeats=3, seconds=1.0, progress=done.append)
    assert done == [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8]
    warm, turns = log[:4], log[4:]
    assert warm == [("a", 1), ("a", 1), ("b", 1), ("b", 1)]
    assert turns == [("a", 2), ("b", 4)] * 3
    assert timings[0].host_seconds == [0.1] * 3
    assert timings[1].seconds == [0.05] * 3  # of a step
    timings[0].seconds = [1.0, 0.5, 0.4]
    timings[1].seconds = [0.25] * 3
    found = bench_timing.report(timings[0], timings[1], sharding.make_mesh({"data": 1}))
    assert found["ms"] == 500 and found["tokens_per_second"] == 200
    assert found["spread"] == pytest.approx(1.2)
    assert found["of_matrix_products"] == 0.5
    assert found["flops_per_second"] == 4e9 and found["mfu"] is None  # of a CPU


def test_the_share_of_the_datasheet_is_of_all_devices():
    timing = timed("a", 1.0)
    devices = np.array([SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")] * 4)
    mesh = SimpleNamespace(devices=devices, size=4)
    assert bench_timing.report(timing, timing, mesh)["mfu"] == 2e9 / 4 / 989e12


def test_two_steps_are_in_flight_at_most(monkeypatch):
    config = config_lib.load("quickstart:debug")
    mesh, log = sharding.make_mesh({"data": 1}), []
    model = bag(vocab_size=11)

    class Compiled:
        def __call__(self, state, batch):
            log.append("step")
            loss = SimpleNamespace(block_until_ready=lambda: log.append("done"))
            return state, {"train/loss_nats": loss}

        def memory_analysis(self):
            fields = ("argument", "output", "alias", "temp")
            sizes = {f"{name}_size_in_bytes": 3 for name in fields}
            return SimpleNamespace(**sizes)

        def cost_analysis(self):
            return {"bytes accessed": 7.0}

    monkeypatch.setattr(TrainingStep, "compile", lambda *_: Compiled())
    timing = bench_workloads.train("a", config, model, mesh)
    timing.run(5)
    in_flight = np.cumsum([1 if event == "step" else -1 for event in log])
    assert max(in_flight) == 2 and in_flight[-1] == 0
    assert timing.memory == 6 and timing.accessed == 7


def test_training_is_timed_for_each_implementation(capsys, tmp_path):
    file = tmp_path / "bench.json"
    arguments = [*FAST, "--compare=attention:xla,blocked", f"--json={file}"]
    arguments += ["--config.train.batch_size=4", "--mesh=data=2"]
    assert bench.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "2 x cpu" in shown and "tokens/s" in shown
    rows = json.loads(file.read_text())
    assert [row["name"] for row in rows] == ["xla", "blocked"]
    config = config_lib.load("quickstart:debug")
    model = models.build(config.model, vocab_size=256)
    counted = model.flops(batch_size=4, segment_length=7)
    for row in rows:
        assert row["flops"] == counted.training
        assert len(row["seconds"]) == 2 and row["memory"] > 0
        assert 0 < row["host_ms"] and row["compile_seconds"] > 0


def test_configs_of_different_models_take_turns(monkeypatch, capsys, tmp_path):
    """In one table, with the parameters of each and one matrix product for both."""
    monkeypatch.setitem(models.MODELS, "recurrent", Recurrent)
    log, real = [], bench_workloads.train

    def train(name, config, model, mesh):
        timing = real(name, config, model, mesh)
        run = timing.run
        timing.run = lambda times: log.append(name) or run(times)
        return timing

    monkeypatch.setitem(bench_runs.WORKLOADS, "train", train)
    other = tmp_path / "other.py"
    other.write_text(
        "from xlformer.config import default_config\n"
        "def get_config():\n"
        "    config = default_config('recurrent', d_model=7, vocab_size=29)\n"
        "    config.train.update(batch_size=6, segment_length=5)\n"
        "    return config\n"
    )
    file = tmp_path / "bench.json"
    arguments = [*FAST, f"--against={other}", f"--json={file}", "--mesh=data=-1"]
    assert bench.main(arguments) == 0
    one, two = json.loads(file.read_text())
    assert [one["config"], two["config"]] == ["quickstart:debug", str(other)]
    assert log[-4:] == ["quickstart:debug", str(other)] * 2
    assert one["parameters"] > two["parameters"] == 29 * 7 + 29 + 7 * 7
    assert one["devices"] == two["devices"] == 2  # which divide 2 rows and 6
    shown = capsys.readouterr().out
    last = shown.splitlines()[3].split()
    assert last[0] == str(other) and last[-1] == "281"
    assert "GFLOP/s" in shown and f"quickstart:debug, {other}, train, 2 x cpu" in shown


def test_evaluation_sweeps_over_a_field_and_generation_runs():
    config = debug()
    fast = {"repeats": 1, "seconds": 0.01, "sizes": {"data": 1}}
    sweep = Values("model.memory_length", ["3", "9"])
    short, long = bench.bench(config, mode="eval", sweep=sweep, **fast)
    (row,) = bench.bench(config, mode="generate", **fast)
    assert short["name"] == "memory_length=3" and row["name"] == "generate"
    assert long["flops"] > short["flops"] > 0 and short["ms"] > 0
    assert long["memory"] > short["memory"] > 0
    assert config.model.memory_length == 5  # the caller's config stays as it was
    assert row["tokens_per_second"] > 0 and 0 < row["host_ms"] and 0 < row["memory"]
    assert row["tokens_per_second"] == pytest.approx(2 / row["ms"] * 1e3)  # 2 rows


def test_a_model_that_says_nothing_of_itself_is_timed():
    fast = {"repeats": 1, "seconds": 0.01, "sizes": {"data": 1}}
    config, model = config_lib.load("quickstart:debug"), bag(vocab_size=11)
    (row,) = bench.bench(config, model=model, **fast)
    assert row["tokens_per_second"] > 0 and row["memory"] > 0
    for unknown in ("flops", "mfu", "of_matrix_products"):
        assert row[unknown] is None
    assert render([row]).splitlines()[1].split()[:1] == ["train"]
    sweep = Values("model.n_layer", ["1"])
    line = refusal(bench.bench, config, model=model, sweep=sweep, **fast)
    assert "config.model.n_layer" in line


def test_tokens_are_as_frequent_as_words():
    ids = bench_workloads.tokens(1000, (4000,))
    expected = adaptive.frequencies(1000)
    assert abs((ids == 0).mean() - expected[0]) < 0.03
    assert ids.max() < 1000 and ids.dtype == np.int32
    assert jax.device_count() > 1  # as in every test


# What the device cannot do ------------------------------------------------------------


def too_much(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 99 GiB")


def test_one_that_runs_out_of_memory_leaves_the_others_running(monkeypatch):
    real = bench_workloads.train

    def create(name, *arguments):
        return too_much() if name == "xla" else real(name, *arguments)

    monkeypatch.setitem(bench_runs.WORKLOADS, "train", create)
    fast = {"repeats": 2, "seconds": 0.01, "sizes": {"data": 1}}
    compare = Values("model.attention", ["xla", "blocked"])
    lost, kept = bench.bench(debug(), compare=compare, **fast)
    monkeypatch.setitem(bench_runs.WORKLOADS, "train", too_much)
    (alone,) = bench.bench(debug(), **fast)
    assert lost["out_of_memory"] == alone["out_of_memory"]
    assert kept["tokens_per_second"] > 0
    shown = render([lost, kept]).splitlines()
    assert "out of memory: RESOURCE_EXHAUSTED: 99 GiB" in shown[1]
    assert shown[2].startswith("blocked")
    assert "99 GiB" in render([alone])


def test_what_cannot_run_is_refused_before_anything_is_compiled(monkeypatch, capsys):
    def compiled(*_):
        raise AssertionError("compiled before all were known to run")

    monkeypatch.setitem(bench_runs.WORKLOADS, "train", compiled)
    assert bench.main([*FAST, "--compare=attention:xla,pallas_tpu"]) == 2
    assert "config.model.attention='pallas_tpu'" in capsys.readouterr().err


def test_memory_may_end_while_the_turns_are_taken():
    log = []
    timings = [fake("a", 0.5, log), fake("b", 0.5, log)]
    good = timings[0].run
    timings[0].run = lambda times: too_much() if len(log) > 5 else good(times)
    bench_timing.measure(timings, repeats=3, seconds=1.0)
    assert "99 GiB" in timings[0].out_of_memory and timings[0].run is None
    assert len(timings[1].seconds) == 3

    def broken(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    timings = [Timing("c", broken)]
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        bench_timing.measure(timings, repeats=1, seconds=1.0)


# Bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--compare=attention:foo"], ["config.model.attention='foo'", "blocked"]),
        (["--compare=attention:xla,pallas_tpu"], ["pallas_tpu", "cpu"]),
        (["--mode=serve"], ["serve", "train", "generate"]),
        (["--compare=attention"], ["--compare=attention", "FIELD:VALUE"]),
        (["--sweep=memory_length"], ["--sweep=memory_length", "FIELD:VALUE"]),
        (["--sweep=memory_lenth:1,2"], ["memory_lenth", "did you mean"]),
        (["--repeats=0"], ["--repeats=0"]),
        (["--against=penn", "--compare=remat:none"], ["--against=penn", "--compare="]),
        (["--against=pen"], ["--against=pen:", "did you mean 'penn'"]),
        (["--mesh=data=99"], ["data=99", "8 devices"]),
        (["--preset=enwik8"], ["--config=quickstart:debug", "--preset=enwik8"]),
        (["--rehearse"], ["--rehearse", ":debug"]),
        (["--plot=a.png", "--sweep=n_layer:1,2"], ["--plot=a.png", ".svg"]),
        (["--plot=a.svg", "--sweep=remat:none,full"], ["--sweep=model.remat:none"]),
        (["--plot=a.svg"], ["--plot=a.svg", "--sweep"]),
        (["--config=", "--preset=nvidia_trian"], ["did you mean 'nvidia_train'"]),
        (["--config=", "--preset=enwik8", "--mode=eval"], ["--mode=eval", "preset"]),
        (["--config=", "--preset=enwik8", "--sweep=d:1"], ["--sweep=d:1", "preset"]),
    ],
)
def test_bad_input_is_one_line(arguments, fragments, capsys):
    assert bench.main([*FAST, *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert all(fragment in line for fragment in fragments), line
