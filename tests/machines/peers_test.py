"""The comparison with PyTorch programs: turns, ratios, rows with reasons; no torch."""

import functools
import importlib
import json
import pathlib
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlformer import config as config_lib
from xlformer import models

HERE = pathlib.Path(__file__).parents[1] / "peers"

# Answers as worker.serve does and writes down when; ends itself after `rounds` of them.
FAKE = """
import json, sys, time
name, log, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])

def note(what):
    with open(log, "a") as file:
        print(name, what, file=file)

note("ready")
print(json.dumps({"device": "cpu", "versions": {"fake": "1"}}), flush=True)
for k, _ in enumerate(sys.stdin):
    note("round")
    if k == rounds:
        print("first line\\nit broke", file=sys.stderr)
        sys.exit(3)
    print(json.dumps({"tokens": 100, "seconds": 0.5 + k}), flush=True)
"""


@pytest.fixture
def load(monkeypatch):
    """Imports a module of tests/peers by name."""
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module


@pytest.fixture
def fake(load, tmp_path):
    """fake(program, form, rounds=...) -> a Program; all write to tmp_path/log."""
    compare = load("compare")

    def make(name, form, rounds=99):
        arguments = [form, str(tmp_path / "log"), str(rounds)]
        return compare.Program(name, form, [sys.executable, "-c", FAKE, *arguments])

    return make


def measured(compare, programs, **options):
    options = {"rounds": 2, "build_limit_s": 20.0, "gpu": False} | options
    compare.measure(programs, **options)
    return programs


def test_all_are_ready_before_the_first_round_and_then_take_turns(load, fake, tmp_path):
    compare = load("compare")
    a, b = measured(compare, [fake("xlformer", "a"), fake("original", "b")])
    log = (tmp_path / "log").read_text().splitlines()
    assert sorted(log[:2]) == ["a ready", "b ready"]
    assert log[2:] == ["a round", "b round"] * 3  # one that nobody counts, and two
    assert a.tokens == b.tokens == [100, 100] and a.seconds == [1.5, 2.5]
    assert a.process is None and a.facts["versions"] == {"fake": "1"}


def test_one_that_crashes_or_is_not_there_is_a_row_and_the_others_go_on(load, fake):
    compare = load("compare")
    missing = compare.Program(
        "nvidia", "eager", [sys.executable, "-c", "import nosuch"]
    )
    programs = [fake("original", "crashes", rounds=1), missing, fake("xlformer", "a")]
    rows = compare.report("s", measured(compare, programs))
    assert rows[0]["why_not"] == "exit code 3: it broke"
    assert rows[1]["why_not"].startswith("exit code 1: ModuleNotFoundError")
    assert len(rows[2]["rates"]) == 2 and "of_best_peer" not in rows[2]
    shown = compare.table(rows)
    assert "not measured: exit code 3: it broke" in shown


def test_one_that_hangs_is_ended_with_its_children(load, tmp_path, monkeypatch):
    compare = load("compare")
    monkeypatch.setattr(compare, "ROUND_LIMIT_S", 0.5)
    program = """
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
        open(sys.argv[1], "w").write(str(child.pid))
        print("{}", flush=True)
        child.wait()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "pid")]
    hangs = compare.Program("nvidia", "compile", command)
    measured(compare, [hangs])
    assert hangs.why_not.startswith("no answer in ")
    end = time.monotonic() + 20
    while alive(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(process):
    try:
        stat = pathlib.Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # which nobody has waited for


def test_the_ratio_is_to_the_fastest_form_of_the_peer(load):
    compare = load("compare")
    forms = [("xlformer", "auto", 3.0), ("original", "eager", 1.0)]
    programs = [
        compare.Program(
            name, form, [], tokens=[60] * 3, seconds=[20 / v, 60 / v, 30 / v]
        )
        for name, form, v in [*forms, ("original", "compile", 2.0)]
    ]
    ours, eager, compiled = compare.report("s", programs)
    assert ours["tokens_per_second"] == pytest.approx(6.0)  # the median of 9, 3, 6
    assert ours["fastest"] == pytest.approx(9.0) and ours["spread"] == pytest.approx(1)
    assert ours["of_best_peer"] == pytest.approx(1.5)
    assert eager["of_best_peer"] == pytest.approx(0.5)
    assert compiled["of_best_peer"] == 1.0


def test_the_command_prints_tables_and_writes_numbers(
    load, fake, tmp_path, capsys, monkeypatch
):
    compare = load("compare")
    made = [fake("xlformer", "a"), fake("original", "b")]
    monkeypatch.setattr(compare, "programs", lambda *_, **__: made)
    file = tmp_path / "found.json"
    arguments = ["--settings=cpu_eval_long", "--rounds=1", f"--json={file}"]
    assert compare.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "cpu_eval_long: scoring, 6 layers of 256" in shown and "fake 1" in shown
    found = json.loads(file.read_text())
    assert [row["form"] for row in found["rows"]] == ["a", "b"]
    assert found["rows"][0]["of_best_peer"] == 1.0 and found["date"] and found["host"]
    compare.main(["--settings=cpu_eval_long", "--limit=0"])
    assert "not measured: --limit=0 was over" in capsys.readouterr().out


def test_every_form_of_a_setting_is_asked_for(load):
    compare = load("compare")

    def forms(name, *implementations):
        found = compare.programs(name, implementations, seconds=1.0, tiny=False)
        return [f"{p.name} {p.form}" for p in found]

    peers = ["original eager-f32", "original compile-f32"]
    ours = ["xlformer auto", "xlformer one device", "xlformer naive"]
    assert forms("cpu_train", "auto") == [*ours, *peers]
    assert "xlformer plain" in forms("cpu_eval", "auto")
    assert forms("wt103_base_infer_16", "auto", "xla")[1:] == [
        "xlformer xla",
        *(f"nvidia {form}" for form in ("eager", "compile", "torchscript")),
    ]
    assert "original compile-bf16" in forms("enwik8_12L_train", "auto")
    peers = ["awd_lstm eager-f32", "awd_lstm compile-f32"]
    assert forms("awd_penn", "auto", "xla") == [*ours[:2], *peers]
    peers = ["sha_rnn eager-f32", "sha_rnn compile-f32"]
    assert forms("sha_enwik8", "auto") == [*ours[:2], *peers]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--settings=cpu_tran"], ["cpu_tran", "cpu_train"]),
        (["--settings=cpu_train", "--rounds=0"], ["--rounds=0"]),
        (["--settings=enwik8"], ["enwik8_12L_train", "GPU", "--tiny"]),
        ([], ["--settings"]),
    ],
)
def test_bad_input_is_one_line(load, arguments, fragments, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    assert load("compare").main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert all(fragment in line for fragment in fragments), line


def test_a_worker_keeps_the_protocol_clean_and_sizes_its_rounds():
    program = """
        import time, worker

        def build(setting, form):
            print("noise of a library")
            def run(times):
                time.sleep(0.02 * times)
                return times * setting.tokens
            return run, {"form": form}

        worker.serve(build)
    """
    options = ["--setting=cpu_train", "--form=f", "--seconds=0.1"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *options],
        env={"PYTHONPATH": str(HERE)},
        input="\n\n",
        capture_output=True,
        text=True,
        timeout=20,
    )
    ready, *rounds = map(json.loads, done.stdout.splitlines())
    assert ready["form"] == "f" and "noise of a library" in done.stderr
    assert len(rounds) == 2 and rounds[0]["tokens"] % 1024 == 0
    assert 0.06 < rounds[1]["seconds"] and rounds[1]["tokens"] >= 3 * 1024


@pytest.mark.parametrize("name", ["penn", "enwik8"])
def test_an_lstm_is_measured_as_its_published_config_trains(load, name):
    settings, ours = load("settings"), load("ours")
    setting = settings.SETTINGS[f"awd_{name}"]
    found, config = ours.config_of(setting, "auto"), config_lib.load(f"lstm_{name}")
    same = set(found.model) - {"vocab_size", "dtype"}
    assert {k: found.model[k] for k in same} == {k: config.model[k] for k in same}
    assert found.optimizer.clip_norm == config.optimizer.clip_norm
    # What it does until validations get no better.
    assert setting.optimizer == {"nt_asgd": "sgd"}.get(
        config.optimizer.name, config.optimizer.name
    )
    model = models.build(config.model, vocab_size=setting.vocab_size)
    counted = model.flops(batch_size=1, segment_length=1)
    products = [8 * D * N for D, N in setting.layers]
    assert counted.inputs == sum(products)


@pytest.mark.parametrize(
    ("setting", "spec"),
    [
        ("wt103_base_train_32", "wt103_base_nvidia"),
        ("wt103_large_train_16", "wt103_large_nvidia"),
        ("enwik8_12L_train", "enwik8_base"),
        ("enwik8_24L_train", "enwik8_large"),
    ],
)
def test_what_is_measured_is_what_the_published_configs_train(load, setting, spec):
    settings, ours = load("settings"), load("ours")
    found = ours.config_of(settings.SETTINGS[setting], "auto")
    config = config_lib.load(spec)
    # Not what the numbers are at the start.
    same = set(found.model) - {"init_std", "init_scheme", "vocab_size"}
    assert {k: found.model[k] for k in same} == {k: config.model[k] for k in same}
    assert found.optimizer.name == config.optimizer.name
    assert found.optimizer.clip_norm == config.optimizer.clip_norm
    assert found.train.segment_length == config.train.segment_length


def test_scoring_is_that_of_the_published_configs(load):
    settings = load("settings")
    for size in ("base", "large"):
        setting = settings.SETTINGS[f"wt103_{size}_infer_16"]
        published = config_lib.load(f"wt103_{size}_nvidia").eval
        for field in ("segment_length", "memory_length", "clamp_length", "same_length"):
            assert getattr(setting, field) == published[field]


def test_the_naive_port_computes_the_same(load):
    naive, settings, ours = load("naive"), load("settings"), load("ours")
    setting = settings.SETTINGS["cpu_eval_long"].tiny()
    fields = ours.config_of(setting, "xla").model
    fields.attend_zero_memory = True  # as the port does
    model = models.build(fields, vocab_size=setting.vocab_size)
    params = naive.init(setting, jax.random.key(0))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, setting.vocab_size, (3, setting.batch_size, 17))
    M = setting.memory_length
    memory = [jnp.zeros((setting.batch_size, M, setting.d_model))] * setting.n_layer
    state = model.init_state(setting.batch_size)
    theirs = jax.jit(functools.partial(naive.forward, setting))
    apply, same = jax.jit(model.apply), converted(setting, params)
    for row in ids:
        inputs_BT, targets_BT = jnp.asarray(row[:, :-1]), jnp.asarray(row[:, 1:])
        with jax.numpy_rank_promotion("allow"):
            loss, memory = theirs(params, inputs_BT, targets_BT, memory)
        nll_BT, state, _ = apply(same, inputs_BT, targets_BT, state)
        assert float(nll_BT.mean()) == pytest.approx(float(loss), abs=1e-5)


def converted(setting, params):
    """The port's parameters as xlformer's."""
    heads, d = (setting.n_head, setting.d_head), setting.d_model
    layers = jax.tree.map(lambda *each: jnp.stack(each), *params["layers"])
    n = setting.n_layer
    attention = {
        "qkv": layers["qkv"].reshape(n, d, 3, *heads),
        "position": layers["r"].reshape(n, d, *heads),
        "output": layers["out"].reshape(n, *heads, d),
    }
    feed_forward = {
        "in_kernel": layers["up"],
        "in_bias": layers["up_bias"],
        "out_kernel": layers["down"],
        "out_bias": layers["down_bias"],
    }
    stacked = {
        "attention": attention,
        "attention_norm": layers["norm1"],
        "feed_forward": feed_forward,
        "norm": layers["norm2"],
    }
    return {
        "embedding": {"table": params["table"]},
        "softmax": {"bias": params["bias"]},
        "trunk": {"layers": stacked, "u": params["u"], "v": params["v"]},
    }
