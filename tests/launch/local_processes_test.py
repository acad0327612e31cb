"""launch/local.sh --processes=2 for real: one process is killed, the run ends well."""

import os
import re
import signal
import subprocess
import sys
import time

from fake_commands import ROOT, launch_files
from quick import xla_flags
from training_runs import write_text

# The Python of this test in the place of .venv; everything is installed already.
PYTHON = f"""#!/usr/bin/env bash
[[ "$1 $2 ${{3:-}}" == "-m pip install" ]] && exit 0
exec {sys.executable} "$@"
"""
LIMIT_S = 120


def test_a_killed_process_is_restarted_and_the_run_is_scored_and_sampled(tmp_path):
    checkout = launch_files(tmp_path / "a checkout")
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    text, log = write_text(tmp_path / "text.txt"), tmp_path / "log.txt"
    workdir = tmp_path / "run"
    fields = {"train.steps": 160, "train.save_every": 20, "train.log_every": 10}
    fields |= {"mesh.data": 2, "data.directory": tmp_path / "prepared"}
    fields |= {"train.eval_every": 0, "model.n_layer": 1}
    environment = os.environ | {"XLA_FLAGS": xla_flags(devices=1)}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                "bash",
                checkout / "launch" / "local.sh",
                "--processes=2",
                f"--config=text:path={text},unit=chars,debug",
                f"--workdir={workdir}",
                *(f"--config.{name}={value}" for name, value in fields.items()),
            ],
            env=environment | {"XLFORMER_EXTRA": "cpu"},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        wait_for(process, lambda: (workdir / "checkpoints" / "40").exists(), log)
        os.kill(int(host_line(log, 0)), signal.SIGKILL)
        assert process.wait(LIMIT_S) == 0, log.read_text()
    finally:
        for found in re.findall(r"host \d of 2: \S+, pid (\d+)", log.read_text()):
            end(int(found))
        end(process.pid)
        process.wait()
    said = log.read_text()
    steps = re.findall(r"resuming from the checkpoint of step (\d+)", said)
    assert len(steps) == 1 and int(steps[0]) >= 40 and int(steps[0]) % 20 == 0
    assert re.search(r"host 0 of 2 failed .*-9 \(SIGKILL\)", said), said
    assert "160/160" in said and "restarts 1" in said
    assert re.search(r"^tokens_scored +\d+$", said, re.MULTILINE)
    assert "sample:" in said


def host_line(log, host):
    return re.search(rf"host {host} of 2: \S+, pid (\d+)", log.read_text())[1]


def wait_for(process, true, log):
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def end(pid):
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
