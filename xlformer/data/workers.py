"""Work on the shards of a text, shared with other processes on this machine.

Which process makes a shard changes nothing in it. Workers are started afresh and import
what encodes and nothing else, least of all JAX, whose threads no fork survives. Each
has a pipe of its own to this process and shares no lock with anyone, so that one which
is killed leaves nobody waiting: its pipe ends.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Sequence

from xlformer import progress
from xlformer.errors import WorthAnotherTry

# Processes that encode at most: each takes about 120 MB.
MOST = 8
# Jobs that a helper has: while it hands over what it found, the next one is there.
AHEAD = 2
# Seconds until a process that was killed is gone; a disk may hold it for a while.
PATIENCE = 10


def processes() -> int:
    """How many processes share the work: one for each core of this process's."""
    if multiprocessing.current_process().daemon:
        return 1  # multiprocessing allows it no children
    return min(cores(), MOST)


def cores() -> int:
    """Cores that this process may use."""
    # macOS has no affinity.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Team:
    """This process and `count` - 1 helpers, which stay for one work after another.

    Args:
      count: of processes.
      ready: what each helper calls first, and whose errors it keeps to itself.
    """

    def __init__(self, count: int = 1, ready: Callable = int):
        self._count, self._ready = count - 1, ready
        self._helpers, self._is_second = [], False

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *error) -> None:
        self._stop()

    def grow(self, count: int) -> None:
        """Starts helpers for `count` processes: they get ready until there is work."""
        self._count = max(self._count, count - 1)
        self._start(self._count)

    def work(self, function: Callable, jobs: Sequence[tuple]) -> Iterator:
        """function(*job) of each job, in their order.

        Both must be picklable, and a job small: it waits in a pipe. What a job raises
        is raised here; the jobs of a helper that is killed are done again, once.
        """
        left, found = collections.deque(range(len(jobs))), {}
        try:
            for number in range(len(jobs)):
                while number not in found:
                    self._give(function, jobs, left)
                    if left:
                        mine = left.popleft()
                        found[mine] = function(*jobs[mine])
                    self._collect(left, found, wait=not left)
                yield found.pop(number)
        except BaseException:
            # What others are still at is nobody's any more.
            self._stop()
            raise

    def _give(self, function: Callable, jobs: Sequence, left: collections.deque):
        self._start(min(self._count, len(jobs) - 1))
        for number in range(AHEAD):
            for helper in self._helpers:
                # This process needs one too, before a helper has a second.
                if len(left) > min(number, 1) and len(helper.jobs) == number:
                    helper.give(left[0], function, jobs[left.popleft()])

    def _start(self, count: int) -> None:
        while len(self._helpers) < count:
            self._helpers.append(_Helper(self._ready))

    def _collect(self, left: collections.deque, found: dict, *, wait: bool) -> None:
        """Takes over what helpers have finished; waits for one of them, if asked to."""
        timeout = None if wait else 0
        while busy := {h.connection: h for h in self._helpers if h.jobs}:
            ready = multiprocessing.connection.wait(busy, timeout)
            if not ready:
                return
            timeout = 0
            for helper in map(busy.get, ready):
                try:
                    error, result, passed = helper.connection.recv()
                except (EOFError, OSError):
                    self._bury(helper)
                    left.extendleft(reversed(helper.jobs))
                    continue
                number = helper.jobs.popleft()
                if error is not None:
                    raise error
                found[number] = result
                progress.passed(passed)

    def _bury(self, helper: _Helper) -> None:
        helper.end()
        self._helpers.remove(helper)
        if self._is_second:
            raise WorthAnotherTry(
                "a process that encodes the text was killed, and another in its place:"
                " is there enough memory?"
            )
        self._is_second = True

    def _stop(self) -> None:
        while self._helpers:
            self._helpers.pop().end()


class _Helper:
    """A process that does the jobs that it is given, one after another."""

    def __init__(self, ready: Callable):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.jobs = collections.deque()  # The numbers of those that it has not done.
        # A daemon: it ends with the program, whatever becomes of this object.
        args = other, ready
        self._process = context.Process(target=_serve, args=args, daemon=True)
        with no_main():
            self._process.start()
        # What the process holds is the only one: the pipe ends with it.
        other.close()

    def give(self, number: int, function: Callable, job: tuple) -> None:
        self.jobs.append(number)
        # One that is gone is noticed where its pipe is read.
        with contextlib.suppress(OSError):
            self.connection.send((function, job))

    def end(self) -> None:
        # Killed in whatever it does: a shard is there when all of it is.
        self._process.kill()
        self._process.join(PATIENCE)
        self.connection.close()


def _serve(connection, ready: Callable) -> None:
    """Does what comes through a pipe, until it ends."""
    # One process a core: each with as many threads again would be in their own way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Of a terminal all processes get it; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    # What fails here fails again in a job, which says so.
    with contextlib.suppress(Exception):
        ready()
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(_done(*connection.recv()))


def end_with_parent() -> None:
    # Of a process that is killed nobody would stop the helpers, and one that goes on
    # would write what the next process writes.
    multiprocessing.parent_process().join()
    os._exit(1)


def _done(function: Callable, job: tuple) -> tuple:
    """What a job raises, what it returns, how many bytes of text it went through."""
    with progress.silent() as count:
        try:
            return None, function(*job), count()
        except Exception as error:
            # It travels without its traceback, but with its notes, which are shown.
            error.add_note(traceback.format_exc())
            return error, None, count()


@contextlib.contextmanager
def no_main():
    """Hides the program's main module from processes that start.

    They would import it, and a script that has no guard would run again in each.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
