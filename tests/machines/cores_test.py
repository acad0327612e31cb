"""CPU devices: how many, and that each command asks before JAX starts."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import pytest
from processes import ROOT
from training_runs import refusal

from xlformer import config as config_lib
from xlformer.machines import cores

ANY = 1000
FREE = {"data": -1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("available", "rows", "most", "sizes", "expected"),
    [
        (2, 8, ANY, FREE, 2),
        (1, 8, ANY, FREE, 1),
        # At most what divides the rows.
        (2, 7, ANY, FREE, 1),
        (8, 12, ANY, FREE, 6),
        (64, 20, ANY, FREE, 20),
        (8, 1, ANY, FREE, 1),
        # A small step keeps one, a larger one some.
        (8, 8, 0, FREE, 1),
        (8, 8, 3, FREE, 2),
        # A mesh says itself what it needs, whatever the step.
        (8, 8, 1, {"data": 1, "fsdp": 1, "tensor": 1}, 1),
        (8, 8, 1, {"data": 2, "fsdp": 2, "tensor": 1}, 4),
        (2, 8, 1, {"data": 4, "fsdp": 1, "tensor": 1}, 2),
        (8, 8, 1, {"data": -1, "fsdp": 2, "tensor": 1}, 2),
        (7, 6, ANY, {"data": -1, "fsdp": 2, "tensor": 1}, 6),
        (2, 6, ANY, {"data": -1, "fsdp": 1, "tensor": 4}, 2),
    ],
)
def test_one_device_a_core_unless_rows_size_or_mesh_forbid(
    available, rows, most, sizes, expected
):
    assert cores.count(available, rows=rows, most=most, sizes=sizes) == expected


def test_small_steps_and_small_machines_keep_one_device(monkeypatch):
    def worth(name, *overrides, training=True, batch=16):
        config = config_lib.load(name, overrides)
        return cores.worth(config, batch, 64, training=training)

    monkeypatch.setattr(cores, "_memory", lambda: 64e9)
    assert worth("quickstart") == 19  # 4.9 GFLOP
    assert worth("quickstart", batch=1) == 1
    assert worth("quickstart", training=False) > 100
    small = ("model.d_model=32", "model.d_head=8", "model.d_inner=64")
    assert worth("quickstart", *small, batch=4) == 0
    assert worth("quickstart", *small, training=False, batch=1) == 0
    # 151 million parameters with their gradients and moments, of a vocabulary that is
    # known by its bins alone, and its products.
    assert worth("wt103_base") == 14
    monkeypatch.setattr(cores, "_memory", lambda: 8e9)
    assert worth("wt103_base") == 1
    assert worth("wt103_base", training=False) == 7


def test_a_long_segment_is_not_counted_pair_by_pair(monkeypatch):
    monkeypatch.setattr(cores, "_memory", lambda: 64e9)
    config = config_lib.load("quickstart")
    long = cores.worth(config, 1, 20_000, training=True)
    short = cores.worth(config, 1, cores.COUNTED, training=True)
    assert short > 2 and long == pytest.approx(short * 20_000 / 1024, rel=0.3)


def prepared(asked):
    config = config_lib.load("quickstart:debug")
    cores.prepare(config, asked=asked, rows=2, segment_length=7, sizes=FREE)


def test_the_environment_decides_and_jax_that_has_started(monkeypatch):
    assert jax.device_count() == 8  # of these tests, by XLA_FLAGS
    prepared(None)
    prepared(8)
    assert "cpu_devices=3: JAX has started" in refusal(prepared, 3)
    for number in (0, -1, 1025):
        line = f"cpu_devices={number} must be at least 1 and at most 1024"
        assert line in refusal(prepared, number)
    monkeypatch.setenv(cores.VARIABLE, "0")
    assert f"{cores.VARIABLE}=0 must be at least 1" in refusal(prepared, None)


@pytest.mark.parametrize(("rows", "length"), [(0, 7), (-1, 7), (2, 0), (2, -3)])
def test_sizes_that_cannot_be_are_left_to_who_uses_them(rows, length, monkeypatch):
    for name in ("XLA_FLAGS", cores.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    config = config_lib.load("quickstart:debug")
    sizes = {"asked": None, "sizes": FREE}
    cores.prepare(config, rows=rows, segment_length=length, **sizes)


def test_devices_that_have_no_rows_are_not_said_to_share_them(monkeypatch, capsys):
    class Config:
        update = staticmethod(lambda name, value: None)

    monkeypatch.setattr(cores.jax, "config", Config)
    prepared(3)
    prepared(2)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("2 of 3 CPU devices share 2 rows (")
    assert second.startswith("2 CPU devices share 2 rows (")


def test_cores_are_counted_where_there_is_no_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert cores.workers.cores() == cores.workers.processes() == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.workers.cores() == 1


PROGRAM = """
import json, pathlib, sys
import jax
from xlformer import bench, config, evaluate, generate, plan, runs, train
from xlformer.machines import cores

folder = pathlib.Path(sys.argv[1])
large = config.load("quickstart")
(folder / "run").mkdir()
(folder / "run" / runs.CONFIG).write_text(config.to_json(large))
jax.config.update("jax_platforms", "cpu")
cores.workers.cores = lambda: 3
real, found = cores.count, []

class Asked(Exception):
    pass

def count(cores, **options):
    devices = real(cores, **options)
    # Another number for each command: JAX refuses it once it has started.
    jax.config.update("jax_num_cpu_devices", 10 + len(found))
    found.append((devices, options["rows"]))
    raise Asked

cores.count = count
run = f"--workdir={folder / 'run'}"
for main, argv in (
    (train.main, ["--config=quickstart:batch=12", f"--workdir={folder / 'new'}"]),
    (evaluate.main, [run, "--batch_size=9"]),
    (generate.main, [run, "--prompt=a", "--prompt=b", "--num_samples=3"]),
    (bench.main, ["--config=quickstart:batch=15"]),
    (plan.main, ["--config=quickstart:batch=18", "--topology=local"]),
):
    try:
        main(argv)
    except Asked:
        pass
cores.count = real
cores.prepare(large, asked=None, rows=9, segment_length=64, sizes={"data": -1})
print(json.dumps([found, jax.device_count()]))
"""


def test_commands_ask_before_jax_starts(tmp_path):
    unset = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), tmp_path],
        env=environment | {"PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, devices = json.loads(done.stdout)
    assert found == [[3, 12], [3, 9], [1, 6], [3, 15], [3, 18]]
    assert devices == 3
    assert done.stderr == "3 CPU devices share 9 rows (--cpu_devices)\n"
