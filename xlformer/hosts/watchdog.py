"""A host that hangs is named, and all hosts leave, so that the launcher starts again.

JAX's own heartbeat comes from a thread that goes on when the main thread hangs (in a
file system, a data loader, a lock). The other hosts then wait in a collective for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from typing import NamedTuple

from etils import epath

from xlformer import storage
from xlformer.errors import HUNG

# Shares of the timeout. A live host writes its file every TICK; one whose file has been
# the same for more than STALE, one and a half of them, is not alive. LOOK_EARLY leaves
# time for three looks before the limit is over.
TICK, STALE, LOOK_EARLY = 0.25, 0.375, 0.75


class Beat(NamedTuple):
    """What the main thread did last, when (monotonic), and how long it may last."""

    phase: str
    step: int
    beats: int
    time: float
    limit_s: float


class Watchdog:
    """Ends this process when its main thread has not beaten for too long.

        with Watchdog(directory, index, count, timeout_s=60, say=say) as watchdog:
            with watchdog.allow(1800, "compiling"): ...
            for step in ...:
                watchdog.beat("batch", step)  # here a host may hang alone
                watchdog.beat("step", step)   # here the others wait for it

    When one host hangs, all others soon wait for it. So each notices by itself, and
    reads from the files of the others which one it was: the one with the fewest beats.
    Every host must therefore beat at the same events, also between what may hang alone
    and what all do together. A host whose file is not written any more is dead or
    stopped. In a run of one process all of this does nothing.

    Args:
      directory: for `<index>.json` of each process; seen by all, local or gs://.
      timeout_s: for a phase that names no limit of its own.
      say: takes the one line. It must not wait for what the main thread may hold.
      leave: takes the exit code; it ends the process although the main thread hangs.
    """

    def __init__(
        self,
        directory,
        process_index: int,
        process_count: int,
        *,
        timeout_s: float,
        say,
        leave=os._exit,
        clock=time.monotonic,
    ):
        self._directory = storage.path(directory)
        self._index, self._count = process_index, process_count
        self._timeout_s = timeout_s
        self._say, self._leave, self._clock = say, leave, clock
        self._last = Beat("start", 0, 0, clock(), timeout_s)
        self._hosts = _Hosts(self._directory, process_index, process_count)
        self._told = clock()  # when its file was written last
        self._closed = threading.Event()
        self._threads = []

    # The main thread -----------------------------------------------------------------

    def beat(self, phase: str, step: int, *, limit_s: float | None = None) -> None:
        """Says that the main thread lives and that `phase` begins.

        The next beat must come within limit_s seconds.
        """
        limit_s = self._timeout_s if limit_s is None else limit_s
        # One assignment: the other threads see all of it or nothing.
        self._last = Beat(phase, step, self._last.beats + 1, self._clock(), limit_s)

    @contextlib.contextmanager
    def allow(self, limit_s: float, phase: str):
        """Gives a long phase (compiling, saving, restoring) a limit of its own."""
        before = self._last
        self.beat(phase, before.step, limit_s=limit_s)
        try:
            yield
        finally:
            self.beat(before.phase, self._last.step, limit_s=before.limit_s)

    def __enter__(self):
        if self._count > 1:
            # Two, because a file system that hangs must not stop the watch.
            for job in (self.tell, self.watch):
                thread = threading.Thread(
                    target=self._repeat, args=(job,), name="watchdog", daemon=True
                )
                thread.start()
                self._threads.append(thread)
        return self

    def __exit__(self, *error):
        self._closed.set()
        for thread in self._threads:
            # Not for ever, because it may hang in a file system.
            thread.join(self._timeout_s * TICK)
        self._threads = []

    # The other threads ---------------------------------------------------------------

    def _repeat(self, job) -> None:
        while not self._closed.is_set():
            job()
            self._closed.wait(self._timeout_s * TICK)

    def tell(self) -> None:
        """Writes this host's file; looks at the others' once something seems wrong."""
        last, now = self._last, self._clock()
        try:
            self._hosts.write(last, quiet_s=now - last.time)
            if now - last.time > last.limit_s - self._timeout_s * LOOK_EARLY:
                self._hosts.look(now)
            else:
                self._hosts.forget()
            self._told = now
        except Exception:
            # The directory is full, gone or not to be reached: `watch` says since when.
            pass

    def watch(self) -> None:
        """Leaves if the main thread has not beaten within the limit of its phase."""
        last, now = self._last, self._clock()
        if now - last.time <= last.limit_s:
            return
        try:
            self._say(self._line(last, now))
        finally:
            # One line is enough, should `leave` come back, as a test's does.
            self._closed.set()
            self._leave(HUNG)

    def _line(self, last: Beat, now: float) -> str:
        quiet_s = now - last.time
        # A directory that cannot be written makes every host look dead to the others.
        if now - self._told > self._timeout_s:
            silent_s = now - self._told
            why = f"{self._directory} cannot be written for {silent_s:.0f} s"
        else:
            why = self._hosts.blame(
                last, quiet_s=quiet_s, stale_s=self._timeout_s * STALE
            )
        return (
            f"{why}; host {self._index} has waited {quiet_s:.0f} s in"
            f" {_place(last._asdict())} and leaves with code {HUNG}, so that the"
            " launcher starts all hosts again"
        )


class _Hosts:
    """The files of all hosts, and since when each of the others has been as it is."""

    def __init__(self, directory: epath.Path, index: int, count: int):
        self._directory, self._index, self._count = directory, index, count
        self._name, self._pid = socket.gethostname(), os.getpid()
        self._made = False
        # Ages are measured by this host's clock, from when a content was first seen:
        # clocks of hosts differ.
        self._seen = {}  # index -> (content or None, since when, last look)

    def _record(self, last: Beat, quiet_s: float) -> dict:
        now = time.time()
        return {
            "process": self._index,
            "host": self._name,
            "pid": self._pid,
            "phase": last.phase,
            "step": last.step,
            "beats": last.beats,
            "beat_time": now - quiet_s,
            "time": now,
        }

    def write(self, last: Beat, *, quiet_s: float) -> None:
        if not self._made:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._made = True
        path = self._directory / f"{self._index}.json"
        storage.write(path, json.dumps(self._record(last, quiet_s)))

    def look(self, now: float) -> None:
        seen = {}
        for index in range(self._count):
            if index != self._index:
                found = self._read(index)
                before, since, _ = self._seen.get(index, (found, now, now))
                seen[index] = (found, since if found == before else now, now)
        self._seen = seen

    def forget(self) -> None:
        self._seen = {}

    def _read(self, index: int) -> dict | None:
        """What a host's file says; None where there is none that can be read."""
        try:
            found = json.loads((self._directory / f"{index}.json").read_text())
            # A file may be half written, or of another release: it counts as not there.
            return {name: kind(found[name]) for name, kind in _FIELDS.items()}
        except Exception:
            return None

    def blame(self, last: Beat, *, quiet_s: float, stale_s: float) -> str:
        """Who is missing, and where it was seen last."""
        seen = self._seen
        if not seen:
            return "nothing is known of the other hosts yet"
        absent = [i for i, (found, *_) in seen.items() if found is None]
        if absent:
            hosts = ", ".join(f"host {i}" for i in absent)
            return f"{hosts}: no heartbeat in {self._directory}"
        hosts = {i: found for i, (found, *_) in seen.items()}
        dead = [i for i, (_, since, look) in seen.items() if look - since > stale_s]
        if dead:
            return "; ".join(
                f"{_host(i, hosts[i])} is dead or stopped: last seen in"
                f" {_place(hosts[i])}"
                for i in dead
            )
        hosts[self._index] = self._record(last, quiet_s)
        # All beat at the same events, so who hangs has the fewest; the others are one
        # ahead.
        fewest = min(found["beats"] for found in hosts.values())
        behind = [i for i in sorted(hosts) if hosts[i]["beats"] == fewest]
        # A collective that hangs by itself: no host is to blame, and none is named.
        if len(behind) == len(hosts):
            return f"all {len(hosts)} hosts stand in the same place, none is behind"
        return "; ".join(
            f"{_host(i, hosts[i])} has made no step for {_quiet(hosts[i]):.0f} s: last"
            f" seen in {_place(hosts[i])}"
            for i in behind
        )


_FIELDS = {
    "process": int,
    "host": str,
    "pid": int,
    "phase": str,
    "step": int,
    "beats": int,
    "beat_time": float,
    "time": float,
}


def _host(index: int, found: dict) -> str:
    return f"host {index} ({found['host']}, pid {found['pid']})"


def _quiet(found: dict) -> float:
    """Seconds since its last beat by the host's own clock: clocks of hosts differ."""
    return found["time"] - found["beat_time"]


def _place(found: dict) -> str:
    phase, step = found["phase"], found["step"]
    return f"step {step}" if phase == "step" else f"{phase} at step {step}"
