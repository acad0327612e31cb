"""Does a run that saves often grow? python tests/soak/memory.py

Trains a small model, reads the resident size of the process at every save, and fits a
line from step --first to the end. Exit code 1 if it rises by more than --limit of what
it was at --first. The growth is also stated in checkpoints: a run that kept every
checkpoint it has saved would grow by one for each save.
"""

import argparse
import os
import pathlib
import random
import sys
import tempfile
import time
from unittest import mock

import jax
import numpy as np

from xlformer import config as config_lib
from xlformer.runs.checkpoints import Checkpoints
from xlformer.train import keep_heap_small, train

MIB = 2**20


def resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def small_run(directory: pathlib.Path, *, steps: int, save_every: int):
    """Steps of milliseconds, a state of about 7 MiB."""
    draw = random.Random(0)
    text = directory / "text.txt"
    text.write_text("".join(draw.choices("abcdefgh \n", k=20_000)))
    config = config_lib.load(f"text:path={text},unit=chars,debug")
    config.data.directory = str(directory / "prepared")
    config.model.update(d_model=64, d_inner=2048, n_layer=2, n_head=2, d_head=32)
    config.train.update(steps=steps, save_every=save_every, eval_every=0, log_every=100)
    return config


def measure(config, workdir, model=None):
    """Trains; returns (steps, resident bytes at the save of each, bytes of a state)."""
    points, sizes = [], set()
    real = Checkpoints.save

    def save(self, step, state, **kwargs):
        points.append((step, resident()))
        sizes.add(sum(x.nbytes for x in jax.tree.leaves(state)))
        return real(self, step, state, **kwargs)

    with mock.patch.object(Checkpoints, "save", save):
        train(config, workdir, model)
    (size,) = sizes
    return *np.array(points, np.float64).T, size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save_every", type=int, default=20)
    parser.add_argument("--first", type=int, default=500, help="before it is warm-up")
    parser.add_argument("--limit", type=float, default=0.02, help="allowed growth")
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        config = small_run(directory, steps=args.steps, save_every=args.save_every)
        keep_heap_small()  # as the command does
        steps, bytes_, state = measure(config, directory / "run")
    for step, size in zip(steps[::5], bytes_[::5], strict=True):
        print(f"step {step:6.0f}  {size / MIB:8.2f} MiB")
    late = steps >= args.first
    slope, start = np.polyfit(steps[late] - args.first, bytes_[late], 1)
    growth = slope * (args.steps - args.first)
    saves = int(late.sum()) - 1
    print(
        f"{saves} saves from step {args.first} to {args.steps}: "
        f"{start / MIB:.2f} MiB {growth / MIB:+.2f} MiB ({growth / start:+.2%}), "
        f"{growth / state:+.2f} checkpoints of {state / MIB:.2f} MiB; "
        f"{time.monotonic() - begin:.0f} s"
    )
    return int(growth > args.limit * start)


if __name__ == "__main__":
    sys.exit(main())
