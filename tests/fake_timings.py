"""What bench_test.py and bench_presets_test.py share: timings whose time is known."""

import numpy as np

from xlformer.machines.bench_timing import Timing

FAST = ["--config=quickstart:debug", "--repeats=2", "--seconds=0.01"]


def fake(name, seconds, log):
    def run(times):
        log.append((name, times))
        return np.array([seconds, seconds / 5]) * times

    return Timing(name, run, tokens=100, at_once=10, flops=2e9)


def timed(name, seconds):
    """One that has been timed once."""
    timing = fake(name, seconds, [])
    timing.seconds = timing.host_seconds = [seconds]
    return timing
