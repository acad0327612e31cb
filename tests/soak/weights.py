"""Is any damage to other programs' weights read unnoticed? python tests/soak/weights.py

Damages files of each class of tests/damaged_weights.py at random, for some seconds
each, then reads pickles that stand for large things. Exit code 1 where a file with
checksums was read to other values, where anything but a UserError of one line came out,
or where a file took more than ten seconds or more than a gigabyte.
"""

import argparse
import collections
import pathlib
import resource
import sys
import tempfile
import time

import damaged_weights
import numpy as np

from xlformer.convert import tensorflow_vocabulary
from xlformer.errors import UserError

SECONDS, BYTES = 10, 1 << 30


def damage(name: str, folder: pathlib.Path, seconds: float, seed: int) -> bool:
    """Prints a line; whether all was in order."""
    copy = damaged_weights.copy(name, folder / name.replace(" ", "_"))
    draw, ends, slowest = np.random.default_rng(seed), collections.Counter(), 0.0
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        began = time.process_time()
        ends[damaged_weights.outcome(name, copy, draw)] += 1
        slowest = max(slowest, time.process_time() - began)
    print(f"{name}: {sum(ends.values())} files, {dict(ends)}, slowest {slowest:.3f} s")
    changed = name in damaged_weights.KEPT and ends["changed"]
    return not changed and slowest < SECONDS


def explode(folder: pathlib.Path, n: int) -> bool:
    path, fine = folder / "cache.pkl", True
    for name, content in damaged_weights.bombs(n).items():
        path.write_bytes(content)
        began, before = time.process_time(), _peak()
        try:
            tensorflow_vocabulary.read(path)
            end = "read"
        except UserError as error:
            end = f"refused ({str(error).split(': ')[-1][:60]})"
        seconds, more = time.process_time() - began, _peak() - before
        print(f"{name}: {len(content):,} bytes, {end}, {seconds:.1f} s, {more:,} bytes")
        fine &= end != "read" and seconds < SECONDS and more < BYTES
    return fine


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bomb", type=int, default=1_000_000, help="size of pickles")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        fine = [
            damage(name, folder, args.seconds, args.seed)
            for name in damaged_weights.CLASSES
        ]
        fine.append(explode(folder, args.bomb))
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
