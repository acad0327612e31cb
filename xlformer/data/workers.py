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
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

from xlformer import progress
from xlformer.errors import WorthAnotherTry

# Processes that encode at most: each takes about 150 MB.
MOST = 8


def processes() -> int:
    """How many processes share the work: one for each core of this process's."""
    return min(len(os.sched_getaffinity(0)), MOST)


def shared(function: Callable, jobs: Sequence[tuple], *, count: int) -> Iterator:
    """function(*job) of each job, in their order, by `count` processes with this one.

    Both must be picklable. What a job raises is raised here; the jobs of a worker that
    is killed are done again, once.
    """
    if count < 2 or len(jobs) < 2:
        for job in jobs:
            yield function(*job)
        return
    team = _Team(function, jobs, min(count, len(jobs)) - 1)
    try:
        for number in range(len(jobs)):
            yield team.result(number)
    finally:
        team.close()


class _Team:
    """This process and its helpers; jobs are begun in their order."""

    def __init__(self, function: Callable, jobs: Sequence[tuple], helpers: int):
        self._function, self._jobs, self._helpers = function, jobs, helpers
        self._left, self._found = collections.deque(range(len(jobs))), {}
        self._pending: dict[concurrent.futures.Future, int] = {}
        self._pool, self._is_second = self._started(), False

    def result(self, number: int):
        """What a job gives; every job before it has been asked for."""
        while number not in self._found:
            try:
                # One more than they work on: none of them waits for this process.
                while self._left and len(self._pending) < 2 * self._helpers:
                    self._submit()
                if self._left:
                    mine = self._left.popleft()
                    self._found[mine] = self._function(*self._jobs[mine])
                self._collect()
            except BrokenProcessPool:
                self._begin_again()
        return self._found.pop(number)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _started(self) -> concurrent.futures.ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return concurrent.futures.ProcessPoolExecutor(
            self._helpers, mp_context=context, initializer=_begin
        )

    def _submit(self) -> None:
        number = self._left[0]
        with _no_main():
            future = self._pool.submit(_counted, self._function, self._jobs[number])
        self._pending[future] = self._left.popleft()

    def _collect(self) -> None:
        if not self._left and self._pending:
            first = concurrent.futures.FIRST_COMPLETED
            concurrent.futures.wait(self._pending, return_when=first)
        for future in [future for future in self._pending if future.done()]:
            found, passed = future.result()
            self._found[self._pending.pop(future)] = found
            progress.passed(passed)

    def _begin_again(self) -> None:
        if self._is_second:
            raise WorthAnotherTry(
                "a process that encodes the text was killed, and another in its place:"
                " is there enough memory?"
            )
        self.close()
        self._left.extendleft(sorted(self._pending.values(), reverse=True))
        self._pending.clear()
        self._pool, self._is_second = self._started(), True


def _begin() -> None:
    # One process a core: each with as many threads again would be in their own way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


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
