"""A disk that is full, or read-only: a real one, of one megabyte."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from training_runs import write_text

# A mount namespace of its own: nothing is mounted outside, and root is not needed.
UNSHARE = ["unshare", "--map-root-user", "--mount"]
PROGRAM = """
import pathlib, subprocess, sys
sys.path.insert(0, sys.argv.pop(1))
from training_runs import SYMBOLS, bag, text_config
from xlformer import command, train
from xlformer.runs.checkpoints import Checkpoints

def mount(*args):
    subprocess.run(["mount", *args], check=True)

text, disk, readonly = sys.argv[1:]
mount("-t", "tmpfs", "-o", "size=1m", "none", disk)
workdir = pathlib.Path(disk, "run")
sys.modules["tensorboardX"] = None  # its thread has much to say about a full disk
config = text_config(text, eval_every=0)
config.data.directory = text + "-prepared"

def call(steps, workdir=workdir):
    config.train.steps = steps
    model = bag(vocab_size=SYMBOLS)
    code = command.run(lambda _: train.train(config, workdir, model=model)["step"])
    found = Checkpoints(workdir / "checkpoints", read_only=True)
    print("ended with", code, "latest", found.latest(), file=sys.stderr, flush=True)

def fill(left):
    with open(workdir.parent / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            file.truncate(file.tell() - left)

call(6)
fill(left=24 << 10)  # enough for the log, too little for a checkpoint
call(12)
fill(left=0)
call(12)
(workdir.parent / "filler").unlink()
mount("--bind", disk, readonly)
mount("-o", "remount,bind,ro", readonly)
call(12, pathlib.Path(readonly, "run"))
call(12)
"""


def can_mount():
    if not shutil.which("unshare"):
        return False
    command = [*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="no mount namespaces for this user")
def test_each_is_one_line_and_the_last_good_checkpoint_stays(tmp_path):
    disk, readonly = tmp_path / "disk", tmp_path / "readonly"
    disk.mkdir()
    readonly.mkdir()
    text = write_text(tmp_path / "text.txt")
    here = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [*UNSHARE, sys.executable, "-c", PROGRAM, here, text, disk, readonly],
        env=os.environ | {"PYTHONPATH": str(here.parent)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    # Orbax has much to say about a failed save, some of it later from its threads.
    parts = done.stderr.split("ended with ")
    ends = [part.splitlines()[0] for part in parts[1:]]
    assert ends == ["6 latest 6", *["2 latest 6"] * 3, "12 latest 12"]
    _, saving, logging, locked, freed = parts[:-1]
    # Its threads write at any time, so that ours need not begin a line.
    ours = re.compile(f"error: {re.escape(str(tmp_path))}.*")
    saving, logging, locked = map(ours.findall, (saving, logging, locked))
    assert [len(lines) for lines in (saving, logging, locked)] == [1, 1, 1]
    assert saving[0].startswith(f"error: {disk}/run/checkpoints: saving failed")
    assert "No space left on device" in saving[0]
    assert saving[0].endswith("the latest checkpoint is step 6")
    assert logging[0].startswith(f"error: {disk}/run: ")
    assert "No space left on device" in logging[0]
    assert locked[0].startswith(f"error: {readonly}/run: cannot be written: ")
    assert "Read-only file system" in locked[-1]
    assert "resuming from the checkpoint of step 6" in freed
