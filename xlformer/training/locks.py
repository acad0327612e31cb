"""Two runs in one work directory: the second is refused, by the name of the first."""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import socket
import time

from xlformer.errors import UserError


class WorkdirLock:
    """Holds a work directory for one process; the kernel lets go when it dies.

    Only for local directories: in gs:// there is no lock, and it does nothing.
    """

    def __init__(self, workdir):
        self._workdir = os.fspath(workdir)
        self._file = None

    def __enter__(self):
        if "://" in self._workdir:
            return self
        path = pathlib.Path(self._workdir, "lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self._workdir}: cannot be written: {error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise UserError(
                    f"{self._workdir} is in use by {_owner(file)}"
                ) from None
        except OSError:
            pass  # a file system without flock: run unprotected rather than not at all
        file.truncate(0)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        file.write(json.dumps(owner) + "\n")
        file.flush()
        self._file = file  # open for as long as the lock is held
        return self

    def __exit__(self, *error):
        # The file stays: to remove it would let a third process lock another inode.
        if self._file:
            self._file.close()
            self._file = None


def _owner(file) -> str:
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return f"pid {owner['pid']} on host {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has locked it, but not yet written its name
