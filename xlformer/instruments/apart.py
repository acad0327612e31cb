"""One measurement in a process of its own, which may run out of memory or of time.

What it took is then known, and whoever asked goes on.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pathlib
import re
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from xlformer.data import workers
from xlformer.errors import reason

MEMORY, TIME = "out of memory", "out of time"
# What programs in C++ say before they end, of memory that they do not get.
_SAID = re.compile(
    "RESOURCE_EXHAUSTED|bad_alloc|out of memory|cannot allocate memory|"
    "resource temporarily unavailable",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
      value: what the function returned; None where it did not.
      why: "" if it did, MEMORY, TIME, or "failed: " and the reason.
      peak_bytes: the most that lay in memory at once, Python and JAX too, to some 100
        kB, as Linux counts; None where it is not told, or the process died of itself.
      seconds: from its start, imports too.
      said: what it wrote to standard output and standard error.
    """

    value: Any
    why: str
    peak_bytes: int | None
    seconds: float
    said: str = ""


def run(
    function: Callable,
    arguments: Mapping[str, Any],
    *,
    memory: int | None = None,
    seconds: float | None = None,
) -> Outcome:
    """function(**arguments) in a fresh Python, and what became of it.

    Args:
      function: of the top level of a module; arguments and what it returns are plain
        values. The process has the environment of this one, and starts JAX itself.
      memory: bytes that the process may ask for (RLIMIT_DATA; Linux holds it). Of
        these JAX takes some hundred millions before anything is computed.
      seconds: until it is killed, its start included.
    """
    begin = time.monotonic()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        said = pathlib.Path(folder) / "said"
        said.touch()
        # A daemon: it ends with this program, also where that does not get to `kill`.
        process = context.Process(
            target=_serve, args=(theirs, os.fspath(said), memory), daemon=True
        )
        try:
            with workers.no_main():
                process.start()
            theirs.close()
            value, why, peak = _outcome(ours, process, (function, arguments), seconds)
            text = said.read_text(errors="replace")
        finally:
            if process.pid is not None:
                process.kill()
                process.join(workers.PATIENCE)
            ours.close()
    if why is None:
        why = _why_it_died(process.exitcode, text, memory is not None)
    return Outcome(value, why, peak, time.monotonic() - begin, text)


def peak_bytes(pid: int | str = "self") -> int | None:
    """The most of a process that lay in memory at once; None where it is not told."""
    # Not getrusage, which begins with what the parent had when it started this one.
    return _field(pid, "VmHWM")


def resident_bytes() -> int | None:
    """What lies in memory of this process now."""
    return _field("self", "VmRSS")


def forget_peak() -> bool:
    """Lets `peak_bytes` of this process begin anew; whether Linux allows it."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _field(pid: int | str, name: str) -> int | None:
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{name}:\s*(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _outcome(connection, process, work: tuple, seconds: float | None) -> tuple:
    """(value, why, peak); why is None of a process that died."""
    end = None if seconds is None else time.monotonic() + seconds
    try:
        connection.send(work)
        if not connection.poll(None if end is None else max(end - time.monotonic(), 0)):
            return None, TIME, peak_bytes(process.pid)
        return connection.recv()
    except (EOFError, OSError):
        process.join(workers.PATIENCE)
        return None, None, None


def _why_it_died(code: int | None, text: str, limited: bool) -> str:
    # The kernel kills what fills the machine. Beneath a limit libraries that do not ask
    # whether they got what they wanted end by a signal: so does Eigen's product.
    signals = (signal.SIGKILL, *(signal.SIGSEGV, signal.SIGABRT) * limited)
    if _SAID.search(text) or code in [-number for number in signals]:
        return MEMORY
    lines = text.strip().splitlines()
    return f"failed: {lines[-1] if lines else f'exit code {code}'}"


# In the process -----------------------------------------------------------------------


def _serve(connection, said: str, memory: int | None) -> None:
    """Does the one work that comes through a pipe."""
    # Of a terminal all processes get it; the first one ends the other.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=workers.end_with_parent, daemon=True).start()
    # The streams of C++ too: XLA says there why it ends.
    with open(said, "ab", buffering=0) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    if memory is not None:
        _limit(memory)
    connection.send(_done(*connection.recv()))


def _limit(memory: int) -> None:
    try:
        import resource  # Windows has none.
    except ImportError:
        return
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, most))


def _done(function: Callable, arguments: Mapping[str, Any]) -> tuple:
    try:
        return function(**arguments), "", peak_bytes()
    except Exception as error:
        traceback.print_exc()
        # JAX says it also where the status is INTERNAL.
        if isinstance(error, MemoryError) or _SAID.search(str(error)):
            return None, MEMORY, peak_bytes()
        return None, f"failed: {reason(error)}", peak_bytes()
