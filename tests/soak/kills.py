"""kill -9 of random processes at random moments.

    PYTHONPATH=tests python tests/soak/kills.py

Trains a small model in --processes processes under launch/supervise.py, and kills one
of them --kills times: while it starts, compiles, trains, validates or saves. At every
restart it checks that the run goes on from the last committed step and repeats at most
one save interval (and the steps that were made while a save was being written); in the
end, that the final state is that of an uninterrupted run, bit by bit. Linux only.
"""

import argparse
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import cluster
from training_runs import write_text

from xlformer.runs import goodput, integrity, log
from xlformer.runs.checkpoints import Checkpoints

HERE = pathlib.Path(__file__).resolve().parent
EVERY = 50  # steps between two saves
PACE_S = 0.01  # a step: long enough that a save is over before the next one
AT_START = 0.3  # of the kills: before the restarted run has made a step
LATEST_S = 2.5  # after the restart's first step, or after the last kill
LIMIT_S = 120  # for anything that is waited for


class Run:
    """One supervised training with its log."""

    def __init__(self, text, workdir, *, processes, devices, steps):
        self.workdir, self.log = workdir, pathlib.Path(f"{workdir}.log")
        fields = {"steps": steps, "save_every": EVERY, "eval_every": 4 * EVERY}
        fields |= {"log_every": 1, "batch_size": 8}
        command = cluster.worker(
            text, workdir, train=fields, hosts={"heartbeat": 30.0}, pace_s=PACE_S
        )
        supervisor = [sys.executable, HERE.parents[1] / "launch" / "supervise.py"]
        supervisor += [f"--processes={processes}", "--max_restarts=100000"]
        supervisor += [f"--log_dir={workdir}.hosts", "--", *command]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                supervisor,
                env=cluster.environment(devices),
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            for child in self.children():
                os.killpg(child, signal.SIGKILL)
            self.process.kill()
        self.process.wait()

    def children(self):
        pid = self.process.pid
        path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
        return [int(child) for child in path.read_text().split()]

    def starts(self):
        """The step from which each attempt that has come so far went on."""
        found = re.findall(
            r"resuming from the checkpoint of step (\d+)|(no checkpoint): starting",
            self.log.read_text(),
        )
        return [int(step) if step else 0 for step, _ in found]

    def last_step(self):
        """That was logged; 0 if none was."""
        path = self.workdir / log.FILE
        lines = path.read_text().splitlines() if path.exists() else []
        for line in reversed(lines):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["kind"] == "train":
                return record["step"]
        return 0

    def committed(self):
        return Checkpoints(self.workdir / "checkpoints", read_only=True).latest() or 0

    def wait_until(self, true):
        end = time.monotonic() + LIMIT_S
        while not true():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, self.log.read_text()[-4000:]
            time.sleep(0.002)
        return True


def kill_one(run, chance):
    """Waits, kills; returns what was known then, or None if the run was over."""
    attempts, step = len(run.starts()), run.last_step()
    if chance.random() >= AT_START:
        if not run.wait_until(lambda: run.last_step() != step):
            return None
    time.sleep(chance.random() * LATEST_S)
    attempts = len(run.starts())
    children = run.children()
    if run.process.poll() is not None or not children:
        return None
    victim = chance.randrange(len(children))
    os.killpg(children[victim], signal.SIGKILL)
    # The others may go on for a moment; then all are dead, and new ones come.
    ended = run.wait_until(lambda: not set(children) & set(run.children()))
    last, committed = run.last_step(), run.committed()
    if not ended and run.process.returncode == 0:
        return None
    run.wait_until(lambda: len(run.starts()) > attempts)
    return {
        "victim": victim,
        "last": last,
        "committed": committed,
        "resumed": run.starts()[-1],
    }


def soak(directory, *, kills, processes, devices, steps, seed):
    """Returns the table as a dict; AssertionError says what was lost."""
    directory.mkdir(parents=True, exist_ok=True)
    text = write_text(directory / "text.txt")
    shape = {"processes": processes, "devices": devices, "steps": steps}
    with Run(text, directory / "whole", **shape) as whole:
        assert whole.process.wait(LIMIT_S + steps) == 0, whole.log.read_text()[-4000:]
    chance, found = random.Random(seed), []
    with Run(text, directory / "killed", **shape) as run:
        while len(found) < kills:
            kill = kill_one(run, chance)
            if kill is None:
                break
            found.append(kill)
            assert kill["resumed"] == kill["committed"], kill
            # One interval, and what was done while the next save was being written.
            assert kill["last"] - kill["resumed"] < 2 * EVERY, kill
        assert run.process.wait(LIMIT_S + steps) == 0, run.log.read_text()[-4000:]
        starts = len(run.starts())
    repeated = [k["last"] - k["resumed"] for k in found]
    # A save had begun, and was lost: the steps of one interval and those since.
    while_saving = [steps for steps in repeated if steps >= EVERY]
    otherwise = [steps for steps in repeated if steps < EVERY]
    total = goodput.summary(goodput.read(directory / "killed"))
    return {
        "seed": seed,
        **shape,
        "save_every": EVERY,
        "kills": len(found),
        "kills_of_process_0": sum(k["victim"] == 0 for k in found),
        "kills_while_saving": len(while_saving),
        "attempts": starts,
        "repeated_steps": sum(repeated),
        "most_repeated_by_a_kill_while_saving": max(while_saving, default=0),
        "most_repeated_by_another": max(otherwise, default=0),
        "leaves_that_differ": differing(directory / "whole", directory / "killed"),
        "goodput": round(total["goodput/ratio"], 4),
        "line": goodput.line(total),
    }


def differing(one, other):
    """Leaves of the last checkpoint whose digests differ."""
    seals = []
    for workdir in (one, other):
        latest = Checkpoints(workdir / "checkpoints", read_only=True).latest()
        seals.append(integrity.read_seal(workdir / "checkpoints" / str(latest)))
    a, b = (seal["leaves"] for seal in seals)
    assert a.keys() == b.keys() and len(a) > 5
    return [name for name in a if a[name] != b[name]]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="of each process")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = soak(pathlib.Path(directory) / "soak", **vars(args))
    print(json.dumps(found, indent=2))
    assert found["kills"] == args.kills, "the run was over before: raise --steps"
    return 1 if found["leaves_that_differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
