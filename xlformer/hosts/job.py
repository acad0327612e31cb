"""Several hosts as one job: joined, agreed, stopped and ended together.

Each host runs the same program. They find each other by flags, or by what a TPU slice
or a SLURM step says of itself, and from then on every step is one for all of them. No
wait is without a limit: see hosts/watchdog.py.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import socket
import sys
import threading
import time
import traceback
import zlib

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from xlformer import command, storage, strangers
from xlformer.errors import BAD_INPUT, HUNG, Argument, UserError, WorthAnotherTry
from xlformer.hosts.watchdog import Watchdog
from xlformer.runs import writing

# A shared directory may show a new file that much later: NFS keeps what it knows of a
# directory for 3 to 60 s.
SLOW_VIEW_S = 20


def add_flags(parser) -> None:
    several = "of several processes; needs the other two"
    parser.add_argument("--coordinator", help=f"HOST:PORT of the first {several}")
    parser.add_argument("--num_processes", type=int, help=f"how many {several}")
    parser.add_argument("--process_id", type=int, help=f"which, from 0, {several}")


def join(
    args, *, workdir: epath.Path | None, start_limit: float, heartbeat: float
) -> None:
    """Waits for the other hosts of this job, if there are any; then says who it is.

    args: with what add_flags has added. Limits are in seconds. A host that does not
    come within start_limit is named, and the process ends with exit code HUNG. With
    workdir None nothing is written, and who is missing is not known. A process that has
    joined already, for another command, stays where it is.
    """
    # Joining twice is an error in JAX.
    if jax.distributed.is_initialized():
        return
    explicit = (args.coordinator, args.num_processes, args.process_id)
    given = [x is not None for x in explicit]
    if any(given) and not all(given):
        raise UserError(
            Argument("coordinator"),
            ", ",
            Argument("num_processes"),
            " and ",
            Argument("process_id"),
            " go together",
        )
    if all(given) and not 0 <= args.process_id < args.num_processes:
        raise UserError(
            Argument("process_id", args.process_id),
            " must be from 0 to ",
            Argument("num_processes", args.num_processes),
            " - 1",
        )
    known = explicit[1:] if all(given) else _own_place()
    if known is None and not _on_tpu_vm():
        return
    if known and known[0] == 1:
        return
    with _within(start_limit, known, workdir and workdir / writing.HEARTBEATS):
        _initialize(explicit, start_limit, heartbeat)
    if jax.process_count() > 1:
        say(
            f"host {jax.process_index()} of {jax.process_count()}: "
            f"{socket.gethostname()}, pid {os.getpid()}, {jax.local_device_count()} x "
            f"{jax.local_devices()[0].device_kind}"
        )


def _own_place() -> tuple[int, int] | None:
    """(hosts, index) as a SLURM step or a TPU slice states them; None elsewhere."""
    env = os.environ
    # Of the step and not of the allocation: a shell in an allocation is no job of ours.
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        return int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_PROCID"])
    names = [n for n in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if n]
    # With MEGASCALE_NUM_SLICES the names are those of one slice of several: JAX counts.
    if names and "TPU_WORKER_ID" in env and "MEGASCALE_NUM_SLICES" not in env:
        return len(names), int(env["TPU_WORKER_ID"])
    return None


def _on_tpu_vm() -> bool:
    """Whether only the machine's metadata, which JAX asks, can tell of other hosts."""
    chips = glob.glob("/dev/accel[0-9]*")
    named = any(n in os.environ for n in ("TPU_NAME", "TPU_ACCELERATOR_TYPE"))
    groups = glob.glob("/dev/vfio/[0-9]*") if named else []
    return bool(chips or groups) and "cpu" not in os.environ.get("JAX_PLATFORMS", "")


def _initialize(explicit, start_limit, heartbeat) -> None:
    # JAX's own limits end in SIGABRT, which no Python code can catch: a stack trace,
    # and an unfinished save is lost. Ours, with a line, come first. By JAX's default
    # of 100 s the others stood in a collective for 101 s after a kill -9, with 10 s
    # they ended after 8.7 s (jax 0.10.2).
    options = {
        "initialization_timeout": int(start_limit) + 60,
        "heartbeat_timeout_seconds": int(2 * heartbeat) + 1,
    }
    try:
        jax.distributed.initialize(*explicit, **options)
    except ValueError:
        if explicit[0] is not None or _own_place():
            raise
        # A TPU VM that is no part of a slice: there is no coordinator to be found.


@contextlib.contextmanager
def _within(limit: float, known, directory):
    """Ends the process with one line when it takes longer than `limit` seconds."""
    if known and directory:
        count, index = known
        with Watchdog(directory, index, count, timeout_s=limit, say=say) as watchdog:
            watchdog.beat("joining", 0)
            yield
        return

    # Without a directory who is missing cannot be known, only that somebody is.
    def leave():
        say(f"not all hosts of this job have started within {limit:.0f} s")
        os._exit(HUNG)

    timer = threading.Timer(limit, leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Writes a line straight to the descriptor, whatever lock the main thread holds."""
    # Where nobody reads any more, a save that is under way matters more than the line.
    with contextlib.suppress(OSError):
        os.write(2, f"xlformer: {line}\n".encode())


# Agreement ----------------------------------------------------------------------------


def agree(workdir: epath.Path, **facts: str) -> None:
    """Raises the same UserError on all hosts, unless they see and are told the same.

    The first writes a nonce into the work directory and all must read it there. facts:
    texts by name, as config=...
    """
    if jax.process_count() == 1:
        return
    path = workdir / writing.NONCE
    # Random, so that the file of an earlier run, or of another mount, is not taken for
    # it.
    nonce = secrets.token_hex(16)
    if is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write(path, nonce)
    expected = int(multihost_utils.broadcast_one_to_all(_checksum(nonce)))
    (seen_H,) = _gathered(int(_reads(path, expected)))
    blind = [str(host) for host in np.flatnonzero(seen_H == 0)]
    if blind:
        verb = "does" if len(blind) == 1 else "do"
        raise UserError(
            f"host {', '.join(blind)} {verb} not see ",
            Argument("workdir", workdir),
            "; use gs:// or a shared mount",
        )
    same(**facts)


def same(**facts: str) -> None:
    """Raises the same UserError on all hosts, unless they are told the same facts."""
    if jax.process_count() == 1:
        return
    columns = _gathered(*(_checksum(fact) for fact in facts.values()))
    for name, column_H in zip(facts, columns, strict=True):
        other = [str(host) for host in np.flatnonzero(column_H != column_H[0])]
        if other:
            raise UserError(
                f"host {', '.join(other)} has another {name} than host 0: all hosts "
                "need the same command"
            )


def _gathered(*numbers) -> np.ndarray:
    """What each host says of each number, [numbers, hosts]."""
    # 32 bits, because JAX's arrays have no more by default.
    own = np.array(numbers, np.uint32)
    return np.asarray(multihost_utils.process_allgather(own)).T


def _checksum(text: str) -> np.uint32:
    return np.uint32(zlib.crc32(text.encode()))


def _reads(path: epath.Path, expected: int) -> bool:
    deadline = time.monotonic() + SLOW_VIEW_S
    while True:
        with contextlib.suppress(OSError, ValueError, UserError):
            if _checksum(strangers.read(path).decode()) == expected:
                return True
        # Where there is no such directory none will appear.
        if time.monotonic() > deadline or not path.parent.is_dir():
            return False
        time.sleep(0.1)


# The end ------------------------------------------------------------------------------


class Stop:
    """Whether to stop: on all hosts the same answer, at the same call.

    SIGTERM to any host reaches all through JAX's preemption service, which picks a call
    that none has made yet; so all hosts must ask at the same places.
    """

    def __init__(self, interrupt):
        self._interrupt, self._asked, self._found = interrupt, 0, None

    def requested(self) -> str | None:
        """The name of the signal that asks for it; None where there was none."""
        if jax.process_count() == 1:
            return self._interrupt.requested
        if self._found is None:
            self._asked += 1
            # The call that the service picks is several after the signal, and another
            # one in each run.
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self._found = "SIGTERM"
        return self._found


@contextlib.contextmanager
def leaving_at_once():
    """Ends the process of a host at its error, so that the others notice.

    Python's exit would wait minutes for hosts that wait for this one.
    """
    try:
        yield
    except BaseException as error:
        if jax.distributed.is_initialized() and jax.process_count() > 1:
            # Launchers start a job again after 1, and do not after BAD_INPUT.
            code = 1
            if isinstance(error, UserError):
                print(f"error: {command.line(error)}", file=sys.stderr)
                if not isinstance(error, WorthAnotherTry):
                    code = BAD_INPUT
            else:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        raise
