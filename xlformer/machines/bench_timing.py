"""Timings in turns, so that a machine that becomes slower does so for all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from xlformer.errors import is_out_of_memory, reason
from xlformer.machines import chips

# Rounds of one turn. How many fill the seconds is taken from one round, and of a round
# of microseconds that is mostly noise.
MOST_ROUNDS = 1000


@dataclasses.dataclass
class Timing:
    """One thing to time, and what was found.

    Attributes:
      run: does it so many times, with two calls of the device in flight at most;
        returns a difference of clocks().
      steps: of one run: batches of training, segments of evaluation, tokens a row of
        generation. All that is counted and measured is of a step.
      tokens, flops: of all rows; flops are None where the model does not count them.
      at_once: tokens that go through a layer together.
      memory: bytes that the compiled program takes on a device, None if not known.
      accessed: bytes by the compiler's count, which sees only operands of kernels.
      seconds, host_seconds: measured, one number a turn.
      out_of_memory: what the device said, if it was too small.
    """

    name: str
    run: Callable[[int], np.ndarray] | None = None
    steps: int = 1
    tokens: int = 0
    at_once: int = 0
    flops: float | None = None
    compile_seconds: float = 0.0
    memory: int | None = None
    accessed: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    host_seconds: list[float] = dataclasses.field(default_factory=list)
    out_of_memory: str = ""

    def account(self, compiled) -> None:
        """Reads memory and traffic from the compiled program of a step."""
        if compiled is None:
            return
        stats, cost = compiled.memory_analysis(), compiled.cost_analysis()
        # Outputs that take the place of donated arguments are counted with those.
        new = stats.output_size_in_bytes - stats.alias_size_in_bytes
        self.memory = stats.argument_size_in_bytes + stats.temp_size_in_bytes
        self.memory += max(0, new)
        # NVIDIA's compiler counts nothing.
        if cost and "bytes accessed" in cost:
            self.accessed = cost["bytes accessed"]


def clocks() -> np.ndarray:
    """Seconds that passed, and those that this thread worked: it feeds the device."""
    return np.array([time.perf_counter(), time.thread_time()])


@contextlib.contextmanager
def memory_may_end(timing: Timing):
    """Makes running out of memory a result of this timing alone: the others go on."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        timing.out_of_memory = reason(error)
        # With it goes all that it holds on the device, which the others may need.
        timing.run = None


def measure(
    timings: list[Timing],
    *,
    repeats: int,
    seconds: float,
    progress: Callable[[float], object] = lambda fraction: None,
) -> None:
    """Times all of them in turns: `repeats` turns of about `seconds` for each.

    progress: called with the fraction done.
    """
    rounds, turns = {}, len(timings) * (1 + repeats)
    for done, timing in enumerate(timings):
        progress(done / turns)
        if not timing.out_of_memory:
            with memory_may_end(timing):
                # The first run also loads the program onto the device.
                timing.run(1)
                once, _ = timing.run(1)
                # Each turn of a timing has as many rounds, or no median could be taken.
                fitting = round(seconds / max(once, 1e-9))
                rounds[id(timing)] = max(1, min(MOST_ROUNDS, fitting))
    # Each once, then each again: what slows the machine for a while slows all of them.
    for turn in range(1, 1 + repeats):
        for done, timing in enumerate(timings, turn * len(timings)):
            progress(done / turns)
            if timing.out_of_memory:
                continue
            with memory_may_end(timing):
                count = rounds[id(timing)]
                taken, busy = timing.run(count)
                timing.seconds.append(taken / count / timing.steps)
                timing.host_seconds.append(busy / count / timing.steps)


def report(timing: Timing, products: Timing | None, mesh) -> dict:
    """One timing in numbers, of a step; spread is (slowest - fastest) / median.

    Args:
      products: matrix products timed in the same turns, if there are any.
    """
    if timing.out_of_memory:
        return {"name": timing.name, "out_of_memory": timing.out_of_memory}
    median = statistics.median(timing.seconds)
    chip = chips.of_kind(mesh.devices.flat[0].device_kind)
    rate = None if timing.flops is None else timing.flops / median
    best = None
    if products is not None and products.seconds:
        best = products.flops / statistics.median(products.seconds)
    return {
        "name": timing.name,
        "tokens_per_second": timing.tokens / median,
        "ms": 1e3 * median,
        "spread": (max(timing.seconds) - min(timing.seconds)) / median,
        "flops": timing.flops,
        "flops_per_second": rate,
        "mfu": rate / mesh.size / chip.flops if rate and chip else None,
        "of_matrix_products": rate / best if rate and best else None,
        "memory": timing.memory,
        "bytes_accessed": timing.accessed,
        "compile_seconds": timing.compile_seconds,
        "host_ms": 1e3 * statistics.median(timing.host_seconds),
        "seconds": timing.seconds,
    }
