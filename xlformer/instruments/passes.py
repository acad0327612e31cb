"""Time and memory of one pass of a model over one segment, in a process of its own."""

from __future__ import annotations

import ctypes
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from xlformer import compiled, models
from xlformer.instruments import apart

# A gradient is a forward and a backward pass.
FORWARD, GRADIENT = WAYS = ("forward", "gradient")
LEAST, MOST = 2, 100  # timed passes


@dataclasses.dataclass(frozen=True)
class Row:
    """One pass.

    Attributes:
      length: of the one segment, in tokens.
      way: of WAYS.
      seconds: the shortest of all timed passes, which other programs disturb least.
      passes: how many those are.
      peak_bytes: the most that a pass adds to what lies in memory before it: Python,
        JAX, the program, parameters and tokens. None where Linux does not tell.
      planned_bytes: what XLA plans for it beside its arguments.
      why: "", or why there is no number (apart.Outcome).
    """

    length: int
    way: str
    seconds: float | None = None
    passes: int = 0
    peak_bytes: int | None = None
    planned_bytes: int | None = None
    why: str = ""


def apart_rows(
    model: models.Model,
    lengths: list[int],
    ways: list[str],
    *,
    memory: int,
    seconds: float,
    least_seconds: float,
) -> list[Row]:
    """A row for each length and way, all of them in one process.

    Args:
      memory, seconds: that the process may take; see `apart.run`.
      least_seconds: for which passes are timed.
    """
    arguments = {
        "model": model,
        "lengths": lengths,
        "ways": ways,
        "least_seconds": least_seconds,
    }
    found = apart.run(measured, arguments, memory=memory, seconds=seconds)
    if found.why:
        return [Row(n, way, why=found.why) for n in lengths for way in ways]
    return [Row(**fields) for fields in found.value]


def measured(model, lengths, ways, least_seconds: float) -> list[dict]:
    """The fields of a Row for each length and way, with fresh parameters."""
    compiled.keep()
    params = jax.block_until_ready(jax.jit(model.init)(jax.random.key(0)))
    rows = [_row(model, params, n, way, least_seconds) for n in lengths for way in ways]
    return [dataclasses.asdict(row) for row in rows]


def _row(model, params, length: int, way: str, least_seconds: float) -> Row:
    ids = np.random.default_rng(0).integers(model.vocab_size, size=(1, length + 1))
    inputs_BT, targets_BT = jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:])

    def loss(params, inputs_BT, targets_BT):
        state = model.init_state(1)
        nll_BT, _, aux = model.apply(params, inputs_BT, targets_BT, state)
        return nll_BT.mean() + aux.loss

    function = loss if way == FORWARD else jax.value_and_grad(loss)
    arguments = params, inputs_BT, targets_BT
    program = jax.jit(function).lower(*arguments).compile()
    # Threads start with the first pass, and keep some memory.
    jax.block_until_ready(program(*arguments))
    _give_back()
    # Else the peak would be that of what came before, such as compiling.
    before = apart.resident_bytes() if apart.forget_peak() else None
    jax.block_until_ready(program(*arguments))
    peak = apart.peak_bytes()
    times: list[float] = []
    while len(times) < LEAST or sum(times) < least_seconds and len(times) < MOST:
        begin = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - begin)
    plan = program.memory_analysis()
    return Row(
        length,
        way,
        seconds=min(times),
        passes=len(times),
        peak_bytes=None if None in (before, peak) else peak - before,
        planned_bytes=plan and plan.temp_size_in_bytes + plan.output_size_in_bytes,
    )


def _give_back() -> None:
    """Returns to Linux what was freed: a pass would hide in it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # Not glibc.
        pass
