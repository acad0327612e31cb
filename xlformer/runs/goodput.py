"""Goodput: the share of a run's wall clock that went into steps which survived.

A run is a series of attempts: processes that are killed at any moment and started
again. Each attempt writes what it has done so far into metrics.jsonl, so one that dies
by kill -9 is known up to its last record. `summary` adds the attempts up.
"""

from __future__ import annotations

import contextlib
import os
import re
import time

from xlformer import storage, tables
from xlformer.runs import log

CATEGORIES = (
    "steps",
    "data_wait",
    "start_up",
    "compiling",
    "restoring",
    "saving",
    "validating",
    "other",
)
KIND = "goodput"  # of the records of one attempt
TOTAL = "goodput_total"  # of the summary over all attempts
# Seconds of one attempt: what is more was written by nobody who measured it.
LONGEST = 1e10

_ATTEMPT = re.compile("[0-9]{1,19}-[0-9]+")
_IMPORTED = time.time()


def process_start() -> float:
    """When this process was created (Linux), else when this module was imported."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as file:
            # The name of the program, in brackets, may hold spaces; field 22 is the
            # start in clock ticks since boot (proc_pid_stat(5)).
            ticks = int(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime", encoding="utf-8") as file:
            uptime = float(file.read().split()[0])
        return time.time() - max(uptime - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, ValueError, IndexError):
        return _IMPORTED


class Clock:
    """The time of one attempt, each second in exactly one category.

        clock = Clock(write, started=process_start())
        with clock.measure("restoring"): ...
        clock.record(step)                      # where this attempt begins
        with clock.measure("steps"):            # the loop
            with clock.measure("saving"): ...   # is not in "steps"
            clock.record(step)                  # at each line of the log, each save

    What is not measured is start_up before the first "steps" and other after it. After
    a roll-back inside of the loop call record(step) with the earlier step. Not for
    several threads.

    Args:
      write: (step, values, kind=KIND), as log.Writer.write.
      started: when the attempt began, in seconds since 1970. None is now: right where
        training is only a part of the process, as in a notebook.
    """

    def __init__(self, write, *, started: float | None = None):
        self._write = write
        now = time.time()
        started = now if started is None else started
        # From here on monotonic: a wall clock that is set does not count.
        self._since = time.monotonic() - (now - started)
        self._category = "start_up"
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        # Its start in nanoseconds, from which `summary` reads when it began, and a pid
        # for two that began at once.
        self._attempt = f"{round(started * 1e9)}-{os.getpid()}"

    @contextlib.contextmanager
    def measure(self, category: str):
        """Counts the time inside of it as `category`'s, but for measures inside it."""
        if category not in CATEGORIES:
            raise ValueError(f"{category!r} is none of {CATEGORIES}")
        # The loop is measured once: what comes after it is no start-up any more.
        outer = "other" if category == "steps" else self._category
        self._switch(category)
        try:
            yield
        finally:
            self._switch(outer)

    def move(self, category: str, seconds: float) -> None:
        """Counts seconds that have just passed as `category`'s, not as they were."""
        self._switch(self._category)
        self._seconds[self._category] -= seconds
        self._seconds[category] += seconds

    def record(self, step: int) -> None:
        """Writes how long everything took so far; `step` steps are done."""
        self._switch(self._category)
        values = {f"goodput/{name}_s": s for name, s in self._seconds.items()}
        values["goodput/attempt"] = self._attempt
        self._write(step, values, kind=KIND)

    def _switch(self, category: str) -> None:
        now = time.monotonic()
        self._seconds[self._category] += now - self._since
        self._category, self._since = category, now


def read(workdir) -> list[dict]:
    """All records of all attempts in the order of writing.

    Unlike log.read it keeps those of steps that were repeated later. Torn lines are
    skipped, and so is whatever no attempt has written.
    """
    found = log.lines(storage.path(workdir))
    return [record for record in found if record["kind"] == KIND and _is_ours(record)]


def _is_ours(record: dict) -> bool:
    """Whether it has all that `summary` asks for, in numbers that can be added."""
    attempt = record.get("goodput/attempt")
    if not (isinstance(attempt, str) and _ATTEMPT.fullmatch(attempt)):
        return False
    seconds = [_seconds(record, name) for name in CATEGORIES]
    numbers = all(type(s) is float and abs(s) < LONGEST for s in seconds)
    return numbers and "goodput/steps_s" in record


def summary(records: list[dict], *, now: float | None = None) -> dict[str, float]:
    """What became of the wall clock, by name; ready for log.Writer.write.

    From the start of the first attempt to its end: `now`, or the last record. Steps of
    an attempt beyond the step where the next one began are repeated; what lies between
    two records is interpolated. `between_s` is everything that no record covers:
    between attempts, what a killed one did after its last record, and attempts that
    died before their first record, which are not counted as restarts either.

        wall_s = the sum of all categories + between_s
        steps_s = productive_s + repeated_s
        ratio = productive_s / wall_s
    """
    # Records are running totals, so an attempt's last one has all of it, however it
    # ended; the differences between them say how long which steps took.
    latest = {}  # attempt -> its last record
    survived = _Survived()
    for record in records:
        attempt, step = record["goodput/attempt"], record["step"]
        before = latest.get(attempt)
        steps_s = before["goodput/steps_s"] if before else 0.0
        survived.record(step, record["goodput/steps_s"] - steps_s)
        latest[attempt] = record
    total = {
        name: sum(_seconds(record, name) for record in latest.values())
        for name in CATEGORIES
    }
    ends = [_start(record) + _elapsed(record) for record in latest.values()]
    end = max(ends, default=0.0) if now is None else now
    wall = end - min(map(_start, latest.values()), default=end)
    productive = total["steps"] - survived.repeated_s
    values = {
        "ratio": productive / wall if wall > 0 else 0.0,
        "wall_s": wall,
        "productive_s": productive,
        "repeated_steps": survived.repeated_steps,
        "repeated_s": survived.repeated_s,
        "restarts": max(len(latest) - 1, 0),
        # Not below zero where the clocks of two hosts disagree.
        "between_s": max(wall - sum(total.values()), 0.0),
    }
    values |= {f"{name}_s": seconds for name, seconds in total.items()}
    return {f"goodput/{name}": value for name, value in values.items()}


def line(summary: dict[str, float]) -> str:
    """'goodput 87.3 % of 1:02:03: steps 0:54:12, start-up 40.1 s, ...'."""
    get = {name.removeprefix("goodput/"): value for name, value in summary.items()}
    parts = [f"steps {_duration(get['productive_s'])}"]
    for name in CATEGORIES[1:]:
        parts.append(f"{name.replace('_', '-')} {_duration(get[f'{name}_s'])}")
    steps, restarts = int(get["repeated_steps"]), int(get["restarts"])
    parts += [
        f"repeated {steps} steps {_duration(get['repeated_s'])}",
        f"restarts {restarts}",
        f"between attempts {_duration(get['between_s'])}",
    ]
    wall = _duration(get["wall_s"])
    return f"goodput {100 * get['ratio']:.1f} % of {wall}: {', '.join(parts)}"


class _Survived:
    """Spans of steps on top of each other, of which a restart takes the last away."""

    def __init__(self):
        self._spans = []  # (first step, last step, seconds), ascending
        self._step = 0
        self.repeated_steps, self.repeated_s = 0, 0.0

    def record(self, step: int, seconds: float) -> None:
        """`step` steps are done, `seconds` after the last record."""
        if step >= self._step:
            self._spans.append((self._step, step, seconds))
        else:  # a restart, or a roll-back
            self._cut(step)
            self.repeated_s += seconds
        self._step = step

    def _cut(self, step: int) -> None:
        """Takes away what lies beyond `step`, because it is done again.

        Within a span all steps are taken to be equally long.
        """
        while self._spans and self._spans[-1][1] > step:
            first, last, seconds = self._spans.pop()
            kept = max(step - first, 0)
            share = kept / (last - first) if kept else 0.0
            if kept:
                self._spans.append((first, step, seconds * share))
            self.repeated_steps += last - first - kept
            self.repeated_s += seconds * (1 - share)


def _start(record) -> float:
    return int(record["goodput/attempt"].partition("-")[0]) / 1e9


def _elapsed(record) -> float:
    return sum(_seconds(record, name) for name in CATEGORIES)


def _seconds(record, name: str) -> float:
    # Before 0.2.0 nothing waited for data.
    return record.get(f"goodput/{name}_s", 0.0)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else tables.duration(seconds)
