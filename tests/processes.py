"""Real processes for tests: started, seen to be ready, read to their end."""

import os
import subprocess
import sys
import textwrap

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def start(program, *args):
    """A process whose first line of output has been read: it is where it should be."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, args)],
        env=os.environ | {"PYTHONPATH": ROOT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def finish(process, timeout=30):
    try:
        _, errors = process.communicate(timeout=timeout)
        return process.returncode, errors
    finally:
        process.kill()
        process.wait()
