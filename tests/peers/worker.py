"""One program in a process of its own: builds, warms up, then runs when it is told to.

Speaks JSON lines: first what it is, then for each line on stdin the tokens and seconds
of one round. Whatever libraries print goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np
import settings
from settings import Step

BATCHES = 4  # different ones, in turns
WARM = 6  # steps: each batch once, and compiling again for other sizes of bins
ZIPF = 1.07  # as xlformer.layers.adaptive.frequencies


def batches(setting: Step) -> list[tuple[np.ndarray, np.ndarray]]:
    """(inputs, targets), [B, T] each, the same for every program.

    Words by Zipf's law, which decides what an adaptive softmax costs; 256 or fewer
    symbols evenly.
    """
    weights = np.arange(1, setting.vocab_size + 1.0) ** -(
        ZIPF if setting.cutoffs else 0
    )
    shape = (BATCHES, setting.batch_size, setting.segment_length + 1)
    ids = np.random.default_rng(0).choice(
        setting.vocab_size, size=shape, p=weights / weights.sum()
    )
    return [(x[:, :-1], x[:, 1:]) for x in ids.astype(np.int32)]


def serve(build: Callable[[Step, str], tuple[Callable[[int], int], dict]]) -> None:
    """Runs a worker.

    Args:
      build: (setting, form) -> (run, facts). run(times) does so many steps, waits for
        the device and returns how many tokens that were; facts are printed.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--setting", required=True)
    parser.add_argument("--form", required=True)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a round")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    setting = settings.SETTINGS[args.setting]
    setting = setting.tiny() if args.tiny else setting
    # The protocol keeps the real stdout; prints of libraries go to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(found: dict) -> None:
        print(json.dumps(found), file=answers, flush=True)

    start = time.perf_counter()
    run, facts = build(setting, args.form)
    with _alone():
        run(WARM)
        _give_back_memory()
    say({**facts, "build_seconds": time.perf_counter() - start})
    times = None
    for _ in sys.stdin:
        run(1)  # gets its memory back
        if times is None:  # Only now does nothing else run on the machine.
            start = time.perf_counter()
            run(1)
            once = time.perf_counter() - start
            times = max(1, round(args.seconds / once))
        start = time.perf_counter()
        tokens = run(times)
        seconds = time.perf_counter() - start
        _give_back_memory()
        say({"tokens": tokens, "seconds": seconds})


@contextlib.contextmanager
def _alone():
    """Waits until no other program is at this point: a GPU has not memory for all."""
    path = os.environ.get("PEERS_LOCK")
    with open(path, "wb") if path else contextlib.nullcontext() as lock:
        if path:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _give_back_memory() -> None:
    """PyTorch keeps what it has freed on a GPU; the next program needs it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
