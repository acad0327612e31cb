"""Commands that a test puts first on PATH, so that no real client is ever called."""

import contextlib
import os
import pathlib
import shlex
import shutil
import signal
import stat
import subprocess
import time

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT = 60


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def launch_files(root):
    """A copy in `root` of what the launchers read; returns `root`."""
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "xlformer").mkdir()
    for name in ("setup.py", "xlformer/errors.py"):
        shutil.copy(ROOT / name, root / name)
    return root


NOTE = """#!/usr/bin/env bash
note() {
    printf '%q ' NAME "$@" >>"$FAKE/calls"
    echo >>"$FAKE/calls"
}
"""


class Bench:
    """A directory of fakes. Every one that calls `note` is seen by `calls`."""

    def __init__(self, directory, **fakes):
        self.directory = directory
        for name, text in fakes.items():
            executable(directory / "bin" / name, NOTE.replace("NAME", name) + text)
        (directory / "calls").touch()
        (directory / "home").mkdir()
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
            "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
            "HOME": str(directory / "home"),
            "FAKE": str(directory),
            "POLL_SECONDS": "0.05",
        }

    def start(self, script, *args, **more):
        """The running script, its output in the file `output`."""
        with open(self.directory / "output", "wb") as output:
            return subprocess.Popen(
                ["bash", str(ROOT / "launch" / script), *args],
                cwd=ROOT,
                env={**self.environment, **more},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def run(self, script, *args, **more):
        process = self.start(script, *args, **more)
        try:
            return process.wait(TIMEOUT)
        finally:
            process.kill()
            process.wait()

    def end(self):
        """Kills what a script that fails a test has left: all have FAKE from here."""
        mine = f"FAKE={self.directory}".encode()
        for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mine in path.read_bytes().split(b"\0"):
                    os.kill(int(path.parent.name), signal.SIGKILL)

    def output(self):
        return (self.directory / "output").read_text()

    def calls(self):
        lines = (self.directory / "calls").read_text().splitlines()
        return [shlex.split(line) for line in lines]

    def until(self, condition):
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < end, self.output()
            time.sleep(0.02)
