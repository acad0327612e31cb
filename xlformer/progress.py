"""How far something is that takes long: a line every few seconds, with what is left."""

from __future__ import annotations

import contextlib
import contextvars
import sys
import time
from collections.abc import Callable, Iterator

from xlformer import tables

# A context variable and not an argument: what counts lies many calls below what shows,
# and another thread's count is another one.
_counting = contextvars.ContextVar("counting", default=None)


class Progress:
    """Says on standard error how far something is; it is called with the fraction done.

    The first call only starts the clock: what was before it, compiling say, tells
    nothing about the rest. False is returned, which lets Evaluator.score go on.

    Args:
      what: what is being done, as in 'evaluating'.
      seconds: the time between two lines.
    """

    def __init__(self, what: str, seconds: float = 5.0):
        self._what, self._seconds = what, seconds
        self._last, self._begun = time.perf_counter(), None

    def __call__(self, fraction: float, done_bytes: int = 0) -> bool:
        now = time.perf_counter()
        start, done = self._begun = self._begun or (now, fraction)
        if now - self._last > self._seconds and done < fraction < 1:
            self._last = now
            left = tables.duration((now - start) * (1 - fraction) / (fraction - done))
            rate = f", {done_bytes / 1e6 / (now - start):.1f} MB/s" * bool(done_bytes)
            line = f"{self._what} {fraction:.0%}{rate}, {left} left"
            print(line, file=sys.stderr, flush=True)
        return False


@contextlib.contextmanager
def counting(what: str, total: int) -> Iterator[None]:
    """Shows how many of `total` bytes have `passed` inside of it, in this thread."""
    progress, count = Progress(what), 0

    def add(amount: int) -> None:
        nonlocal count
        count += amount
        # A text may be empty.
        progress(count / max(total, 1), count)

    add(0)
    token = _counting.set(add)
    try:
        yield
    finally:
        _counting.reset(token)


@contextlib.contextmanager
def silent() -> Iterator[Callable[[], int]]:
    """Gives a function that says how much has `passed` so far, and shows nothing."""
    count = 0

    def add(amount: int) -> None:
        nonlocal count
        count += amount

    token = _counting.set(add)
    try:
        yield lambda: count
    finally:
        _counting.reset(token)


def passed(amount: int) -> None:
    """Counts `amount` for the `counting` around it, if there is any."""
    if add := _counting.get():
        add(amount)
