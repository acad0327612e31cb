"""Published speeds beside ours, and plots: what is shown of a benchmark."""

import json

import pytest
from fake_timings import FAST, timed
from training_runs import bag

from xlformer import bench, pictures, sharding
from xlformer import config as config_lib
from xlformer.machines import bench_plot, bench_presets, bench_runs, rehearsal
from xlformer.machines.bench_timing import report


def test_a_plot_has_a_line_for_each_implementation(tmp_path):
    def row(name, value, **more):
        timing = timed(name, float(value))
        timing.memory = 3 << 30
        found = report(timing, timing, mesh) | {"compared": name}
        return found | {"field": "model.memory_length", "value": value} | more

    mesh = sharding.make_mesh({"data": 1})
    config = config_lib.load("quickstart:debug")
    about = bench_runs.circumstances(config, bag(vocab_size=11), "train", mesh)
    rows = [row(n, v, **about) for v in ("2", "10") for n in ("xla", "blocked")]
    rows[-1] = rows[-1] | {"out_of_memory": "99 GiB"}
    bench_plot.plot(rows, tmp_path / "a.svg")
    bench_plot.plot(rows, tmp_path / "b.svg")
    shown = (tmp_path / "a.svg").read_text()
    for text in ("xla", "blocked", "memory_length", "tokens/s", "GiB", "1 x cpu"):
        assert f">{text}" in shown or f"{text}, " in shown, text
    assert len(shown) < 50_000
    assert shown == (tmp_path / "b.svg").read_text()


def test_a_plot_without_matplotlib_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda _: None)
    arguments = [*FAST, "--sweep=memory_length:3,9", "--plot=a.svg"]
    assert bench.main(arguments) == 2
    assert "xlformer[plot]" in capsys.readouterr().err


# Presets ------------------------------------------------------------------------------


def test_presets_are_what_was_published():
    """(layers, rows, segment, memory, clamp, window, vocabulary) of each line."""
    found = {}
    for name, lines in bench_presets.PRESETS.items():
        for line in lines:
            config = config_lib.load(line.config, line.overrides)
            vocab_size = rehearsal.vocab_size(line.config, config)
            model, train, scored = config.model, config.train, config.eval
            about = (train.batch_size, train.segment_length, model.memory_length, 0)
            if line.mode == "eval":
                about = (scored.batch_size, scored.segment_length)
                about += (scored.memory_length, scored.clamp_length)
                assert scored.same_length
            found[name, line.label] = (model.n_layer, *about, vocab_size)
    words = 267_735
    assert found == {
        ("nvidia_train", "base, 32 rows"): (16, 32, 192, 192, 0, words),
        ("nvidia_train", "base, 64 rows"): (16, 64, 192, 192, 0, words),
        ("nvidia_train", "large, 8 rows"): (18, 8, 384, 384, 0, words),
        ("nvidia_train", "large, 16 rows"): (18, 16, 384, 384, 0, words),
        ("nvidia_inference", "base, 1 rows"): (16, 1, 64, 640, 400, words),
        ("nvidia_inference", "base, 16 rows"): (16, 16, 64, 640, 400, words),
        ("nvidia_inference", "base, 32 rows"): (16, 32, 64, 640, 400, words),
        ("nvidia_inference", "large, 1 rows"): (18, 1, 128, 1600, 1000, words),
        ("nvidia_inference", "large, 16 rows"): (18, 16, 128, 1600, 1000, words),
        ("nvidia_inference", "large, 32 rows"): (18, 32, 128, 1600, 1000, words),
        ("enwik8", "12 layers, 22 rows"): (12, 22, 512, 512, 0, 204),
        ("enwik8", "24 layers, 16 rows"): (24, 16, 768, 768, 0, 204),
    }


def test_a_preset_is_rehearsed_with_tiny_sizes(capsys, tmp_path, monkeypatch):
    line = bench_presets.PRESETS["nvidia_inference"][1]
    monkeypatch.setitem(bench_presets.PRESETS, "one", (line,))
    file = tmp_path / "bench.json"
    arguments = ["--preset=one", "--rehearse", f"--json={file}", "--repeats=1"]
    assert bench.main([*arguments, "--seconds=0.01", "--mesh=data=2"]) == 0
    shown = capsys.readouterr().out
    assert "tiny sizes, 2 x cpu" in shown and "published" not in shown
    (row,) = json.loads(file.read_text())
    assert row["name"] == "base, 16 rows" and row["mode"] == "eval"
    assert row["tokens_per_second"] == pytest.approx(10 / row["ms"] * 1e3)  # 2 x 5


def test_published_figures_stand_beside_ours_with_their_device(monkeypatch, capsys):
    def measured(config, *, mode, **_):
        timing, mesh = timed("train", 0.5), sharding.make_mesh({"data": 1})
        row = report(timing, timing, mesh) | {"compared": ""}
        model = bag(vocab_size=11)
        return [row | bench_runs.circumstances(config, model, mode, mesh)]

    monkeypatch.setattr(bench_runs, "bench", measured)
    assert bench.main(["--preset=nvidia_inference"]) == 0
    head, names, *lines = capsys.readouterr().out.splitlines()
    assert "nvidia_inference" in head and "published ms" in names
    first = lines[0].split()
    assert first[:3] == ["base,", "1", "rows"]
    # 100 tokens in half a second.
    assert first[3:8] == ["200", "6,936", "0.03", "500.00", "9.23"]
    assert "A100 40GB" in lines[-1] and "same device only" in lines[-1]


def test_what_is_measured_is_kept_when_the_next_line_fails(monkeypatch, tmp_path):
    def measured(config, *_, **__):
        if config.train.batch_size == 64:
            raise KeyboardInterrupt
        timing = timed("train", 0.5)
        row = report(timing, timing, sharding.make_mesh({"data": 1}))
        return [row | {"compared": ""}]

    monkeypatch.setattr(bench_runs, "bench", measured)
    file = tmp_path / "bench.json"
    assert bench.main(["--preset=nvidia_train", f"--json={file}"]) == 130
    (row,) = json.loads(file.read_text())
    assert row["name"] == "base, 32 rows"
