"""Work on the shards of a text, shared with other processes on this machine.

Which process makes a shard changes nothing in it. Workers are started afresh and import
what encodes and nothing else, least of all JAX, whose threads no fork survives.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

from xlformer import progress
from xlformer.errors import WorthAnotherTry

# Processes that encode at most: each takes about 120 MB.
MOST = 8


def processes() -> int:
    """How many processes share the work: one for each core of this process's."""
    return min(len(os.sched_getaffinity(0)), MOST)


class Team:
    """This process and `count` - 1 helpers, which stay for one work after another."""

    def __init__(self, count: int):
        self._helpers, self._pool, self._is_second = count - 1, None, False

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *error) -> None:
        self._stop()

    def work(self, function: Callable, jobs: Sequence[tuple]) -> Iterator:
        """function(*job) of each job, in their order.

        Both must be picklable. What a job raises is raised here; the jobs of a helper
        that is killed are done again, once.
        """
        left, found = collections.deque(range(len(jobs))), {}
        pending: dict[concurrent.futures.Future, int] = {}
        helpers = self._helpers if len(jobs) > 1 else 0
        for number in range(len(jobs)):
            while number not in found:
                try:
                    # One more than they work on: none of them waits for this process.
                    while left and len(pending) < 2 * helpers:
                        future = self._submit(function, jobs[left[0]])
                        pending[future] = left.popleft()
                    if left:
                        mine = left.popleft()
                        found[mine] = function(*jobs[mine])
                    _collect(pending, found, wait=not left)
                except BrokenProcessPool:
                    self._begin_again()
                    left.extendleft(sorted(pending.values(), reverse=True))
                    pending.clear()
            yield found.pop(number)

    def _submit(self, function: Callable, job: tuple) -> concurrent.futures.Future:
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._helpers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
            )
        with _no_main():
            return self._pool.submit(_counted, function, job)

    def _begin_again(self) -> None:
        self._stop()
        if self._is_second:
            raise WorthAnotherTry(
                "a process that encodes the text was killed, and another in its place:"
                " is there enough memory?"
            )
        self._is_second = True

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _collect(pending: dict, found: dict, *, wait: bool) -> None:
    """Takes over what helpers have finished; waits for one of them, if asked to."""
    if wait and pending:
        first = concurrent.futures.FIRST_COMPLETED
        concurrent.futures.wait(pending, return_when=first)
    for future in [future for future in pending if future.done()]:
        result, passed = future.result()
        found[pending.pop(future)] = result
        progress.passed(passed)


def _begin() -> None:
    # One process a core: each with as many threads again would be in their own way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Of a terminal all processes get it; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Of a process that is killed nobody would stop the helpers: they would wait for
    # work for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _counted(function: Callable, job: tuple):
    """The result of a job, and how many bytes of the text it has gone through."""
    with progress.silent() as count:
        found = function(*job)
    return found, count()


@contextlib.contextmanager
def _no_main():
    """Hides the program's main module from processes that start.

    They would import it, and a script that has no guard would run again in each.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
