"""Two runs in one work directory: the second is refused, by the name of the first.

On a local file system the kernel keeps the lock (flock) and frees it when its owner
dies. Elsewhere - gs://, file systems without flock - the file `lock` has the owner's
name and a time that a thread renews: who does not renew it is taken for dead. There
nothing is exclusive for certain; of two owners at least one notices (`check`).
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid

from xlformer import storage, streams
from xlformer.errors import UserError, reason

FILE = "lock"
# In periods: so long without a sign of life means dead, by default 30 s. A save may
# keep the network busy for some seconds, hence not two or three.
PATIENCE = 6
# In patiences: so old a time means dead at once, after 5 minutes by default. Clocks of
# two machines do differ, but not by minutes.
ANCIENT = 10


class InUse(UserError):
    """Another process has the work directory."""


class WorkdirLock:
    """Holds a work directory for one process.

    period: seconds between two signs of life, where the kernel keeps no lock. A killed
    owner is then waited for, PATIENCE periods long.
    """

    def __init__(self, workdir, *, period: float = 5.0):
        self._workdir, self._period = workdir, period
        self._file = self._heartbeat = None

    def __enter__(self):
        path = storage.path(self._workdir) / FILE
        if storage.is_remote(path) or not self._flock(path):
            self._heartbeat = _Heartbeat(path, self._period)
            self._heartbeat.acquire()
        return self

    def check(self) -> None:
        """Raises UserError once another process has taken the directory over.

        For the training loop: cheap, it only reads what the thread has noticed.
        """
        if self._heartbeat:
            self._heartbeat.check()

    def __exit__(self, *error):
        if self._heartbeat:
            self._heartbeat.release()
        if self._file:
            # The file stays: to remove it would let a third process lock another
            # inode. Empty: its owner has ended as it should.
            self._file.truncate(0)
            self._file.close()
        self._file = self._heartbeat = None

    def _flock(self, path) -> bool:
        """Whether the kernel gave the lock; False where it has none to give."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+b", buffering=0)  # a full disk shows in write
        except OSError as error:
            raise self._unwritable(error) from error
        # Without waiting: nobody means to queue behind a run that may last for days.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(file)
            file.close()
            raise InUse(f"{self._workdir} is in use by {_name(owner)}") from None
        except OSError:
            file.close()
            return False
        if dead := _owner(file):
            streams.say(
                f"{self._workdir}: {_name(dead)} ended without releasing its lock; "
                "taking it over"
            )
        try:
            file.truncate(0)
            file.write(_to_json(_me()))
        except OSError as error:
            file.close()
            raise self._unwritable(error) from error
        self._file = file  # open for as long as the lock is held
        return True

    def _unwritable(self, error) -> UserError:
        return UserError(f"{self._workdir}: cannot be written: {error}")


class _Heartbeat:
    """The owner's name in a file, renewed by a thread."""

    def __init__(self, path, period):
        self._path, self._period = path, period
        # Host and pid are for people. In containers every pid is 1, so an id of its own
        # tells this owner from all others.
        self._me = _me() | {"id": uuid.uuid4().hex}
        self._patience = PATIENCE * period
        self._taken_by = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lock", daemon=True)

    def acquire(self) -> None:
        if owner := self._read():
            self._outlast(owner)
        self._write()
        # Whoever found it free at the same moment has written by now: the last wins.
        time.sleep(self._period / 5)
        if (owner := self._read()) and not self._mine(owner):
            raise self._refusal(owner)
        self._seen = time.monotonic()
        self._thread.start()

    def check(self) -> None:
        # This process was stopped, or the network was away, for so long that others may
        # have taken it for dead: look now, before anything more is written.
        if time.monotonic() - self._seen > self._patience:
            self._renew()
        if self._taken_by:
            raise UserError(
                f"{self._path.parent} was taken over by {_name(self._taken_by)}: "
                "this run ends"
            )

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        try:
            if self._mine(self._read()):
                self._path.unlink()
        except Exception as error:  # It only costs the next run its patience.
            streams.say(f"{self._path} was not removed: {error!r}")

    def _outlast(self, owner) -> None:
        """Returns when the owner shows no life; raises UserError if it does.

        Judged by whether the file changes, not by its time: clocks differ.
        """
        # The owner's clock decides one thing only: whether it is worth waiting at all.
        age = time.time() - owner["time"]
        end = time.monotonic() + self._patience
        if age > ANCIENT * self._patience:
            end = 0.0
        else:
            streams.say(
                f"{self._path.parent}: held by {_name(owner)}; waiting up to "
                f"{self._patience:.0f} s to see whether that is alive"
            )
        while time.monotonic() < end:
            time.sleep(self._period / 4)
            now = self._read()
            if not now:
                return  # Released.
            if now != owner:
                raise self._refusal(now)
        streams.say(
            f"{self._path.parent}: {_name(owner)} has shown no life for "
            f"{max(age, self._patience):.0f} s; taking over its lock"
        )

    def _run(self) -> None:
        while not self._taken_by and not self._stop.wait(self._period):
            self._renew()

    def _renew(self) -> None:
        """Reads before it writes: another's name is never written over."""
        try:
            owner = self._read()
            if owner and not self._mine(owner):
                if not self._taken_by:
                    self._taken_by = owner
                    streams.say(f"{self._path.parent} was taken over by {_name(owner)}")
                return
            self._write()
            self._seen = time.monotonic()
        except Exception as error:  # The next time it may work.
            streams.say(f"{self._path} was not renewed: {error!r}")

    def _mine(self, owner) -> bool:
        return bool(owner) and owner.get("id") == self._me["id"]

    def _read(self) -> dict | None:
        try:
            return _parse(self._path.read_bytes().decode(errors="replace"))
        except FileNotFoundError:
            return None
        except Exception as error:  # Of the network, of credentials: no common class.
            line = f"{self._path}: cannot be read: {reason(error)}"
            raise UserError(line) from error

    def _write(self) -> None:
        text = _to_json(self._me | {"time": time.time()}).decode()
        storage.write(self._path, text)

    def _refusal(self, owner) -> UserError:
        return InUse(f"{self._path.parent} is in use by {_name(owner)}")


def _me() -> dict:
    return {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}


def _to_json(owner: dict) -> bytes:
    return json.dumps(owner).encode() + b"\n"


def _owner(file) -> dict | None:
    file.seek(0)
    return _parse(file.read().decode(errors="replace"))


def _parse(text: str) -> dict | None:
    """The owner that a lock file names; None if it is empty, as after a clean end."""
    if not text.strip():
        return None
    try:
        owner = json.loads(text)
        return owner | {"time": float(owner["time"])}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return {"time": 0.0}  # damaged: of somebody


def _name(owner: dict | None) -> str:
    if not owner or "pid" not in owner:
        return "another process"  # which has locked it, but not yet written its name
    return f"pid {owner['pid']} on host {owner.get('host')}"
