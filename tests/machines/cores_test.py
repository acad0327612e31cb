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

FREE = {"data": -1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("available", "rows", "large", "sizes", "expected"),
    [
        (2, 8, True, FREE, 2),
        (1, 8, True, FREE, 1),
        # At most what divides the rows.
        (2, 7, True, FREE, 1),
        (8, 12, True, FREE, 6),
        (64, 20, True, FREE, 20),
        (8, 1, True, FREE, 1),
        # A small step keeps one.
        (8, 8, False, FREE, 1),
        # A mesh says itself what it needs, whatever the step.
        (8, 8, False, {"data": 1, "fsdp": 1, "tensor": 1}, 1),
        (8, 8, False, {"data": 2, "fsdp": 2, "tensor": 1}, 4),
        (2, 8, False, {"data": 4, "fsdp": 1, "tensor": 1}, 2),
        (8, 8, False, {"data": -1, "fsdp": 2, "tensor": 1}, 2),
        (7, 6, True, {"data": -1, "fsdp": 2, "tensor": 1}, 6),
        (2, 6, True, {"data": -1, "fsdp": 1, "tensor": 4}, 2),
    ],
)
def test_one_device_a_core_unless_rows_size_or_mesh_forbid(
    available, rows, large, sizes, expected
):
    assert cores.count(available, rows=rows, large=large, sizes=sizes) == expected


def test_the_size_of_a_step_is_known_before_the_vocabulary():
    def flops(name, **options):
        return cores._flops(config_lib.load(name), 8, 32, **options)

    assert flops("quickstart", training=True) > 2 * flops("quickstart", training=False)
    # Its bins need more symbols than the least vocabulary has.
    assert flops("wt103_base", training=True) > 1e11


def prepared(asked):
    config = config_lib.load("quickstart:debug")
    cores.prepare(config, asked=asked, rows=2, segment_length=7, sizes=FREE)


def test_the_environment_decides_and_jax_that_has_started():
    assert jax.device_count() == 8  # of these tests, by XLA_FLAGS
    prepared(None)
    prepared(8)
    assert "cpu_devices=3: JAX has started" in refusal(prepared, 3)
    assert "cpu_devices=0 must be at least 1" in refusal(prepared, 0)


PROGRAM = """
import json, pathlib, sys
import jax
from xlformer import bench, config, evaluate, generate, runs, train
from xlformer.machines import cores

folder = pathlib.Path(sys.argv[1])
large = config.load("quickstart")
(folder / "run").mkdir()
(folder / "run" / runs.CONFIG).write_text(config.to_json(large))
jax.config.update("jax_platforms", "cpu")
cores.available = lambda: 3
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
    assert found == [[3, 12], [3, 9], [1, 6], [3, 15]]
    assert devices == 3
    assert done.stderr == "3 CPU devices share 9 rows (--cpu_devices)\n"
