"""Runs N processes of one command on this machine; restarts all when one fails.

    python launch/supervise.py --processes=2 -- python -m xlformer train --config=...

Each gets --coordinator=127.0.0.1:PORT --num_processes=N --process_id=I. Process 0
writes to the terminal, the others to LOG_DIR/host-I.log. When one dies the others hang
in a collective, and JAX cannot take it back: so all are killed and started again.

Exit codes of a process are those of xlformer/errors.py: 0 complete; BAD_INPUT is never
restarted; INTERRUPTED is stopped by a signal, with everything saved; anything else is a
failure. SIGTERM and SIGINT are handed on once, as SIGTERM; then the exit code is
INTERRUPTED. A second one kills. Standard library only.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time

# Run, not imported: the Python that runs this file may know nothing of xlformer.
_CODES = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "xlformer/errors.py"))
BAD_INPUT, INTERRUPTED = _CODES["BAD_INPUT"], _CODES["INTERRUPTED"]
FAILURE_GRACE = 3.0  # seconds for the others to say why they fail too; then SIGKILL
POLL = 0.05  # seconds
LAST_LINES = 10  # of the log of a host that failed
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIBC = ctypes.CDLL(None)


class Stop:
    """Counts the signals sent to this process; `watch` acts on them."""

    def __init__(self):
        self.count, self.number = 0, 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._notice)

    def _notice(self, number, _):
        self.count, self.number = self.count + 1, number


def say(line: str) -> None:
    print(f"supervise: {line}", file=sys.stderr, flush=True)


def name(code: int) -> str:
    return f"{code} ({signal.Signals(-code).name})" if code < 0 else str(code)


def free_port() -> int:
    # Another program may take it before process 0 does: a failure like any other, and
    # the next attempt asks for another port.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def end_with_parent() -> None:
    """Runs in the child: after kill -9 of the supervisor the hosts save and end too."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start(children: list, command: list[str], processes: int, log_dir) -> None:
    """Appends the new processes to `children`, each the leader of its own group."""
    port = free_port()
    for index in range(processes):
        log = open(log_path(log_dir, index), "ab") if index else None
        flags = [
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={processes}",
            f"--process_id={index}",
        ]
        children.append(
            subprocess.Popen(
                [*command, *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        )
        if log:
            log.close()  # the child has its own


def log_path(log_dir: pathlib.Path, index: int) -> pathlib.Path:
    return log_dir / f"host-{index}.log"


def send(children: list, number: int) -> None:
    """To the groups of those that still run."""
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, number)  # not reaped yet, so the id is still its own


def well(code: int | None, told: bool) -> bool:
    # A process that was told to stop before its handler stood had nothing to save.
    return code in (None, 0, INTERRUPTED) or (told and code == -signal.SIGTERM)


def watch(children: list, stop: Stop, save_limit: float):
    """Waits for all to end.

    Returns:
      The exit codes, and which process failed first, or None.
    """
    handed_on, first, deadline = False, None, None
    while True:
        codes = [child.poll() for child in children]
        if first is None:
            bad = [i for i, code in enumerate(codes) if not well(code, handed_on)]
            if bad:
                first, deadline = bad[0], time.monotonic() + FAILURE_GRACE
        if None not in codes:
            return codes, first
        if deadline is None and any(code is not None for code in codes):
            # One is complete or has saved: so will the others, or they hang.
            deadline = time.monotonic() + save_limit
        if stop.count and not handed_on:
            handed_on = True
            say(f"{signal.Signals(stop.number).name}: handed on; once more kills")
            send(children, signal.SIGTERM)
        late = deadline is not None and time.monotonic() > deadline
        if late or stop.count > 1:
            if first is None:
                first = codes.index(None)
                why = "a second signal" if stop.count > 1 else f"{save_limit:g} s later"
                say(f"host {first} still runs: {why}; killed")
            send(children, signal.SIGKILL)
        time.sleep(POLL)


def report(index: int, codes: list[int], log_dir: pathlib.Path) -> None:
    say(f"host {index} of {len(codes)} failed with exit code {name(codes[index])}")
    if index:
        path = log_path(log_dir, index)
        lines = path.read_text(errors="replace").splitlines()[-LAST_LINES:]
        print(f"{path} ends with:", *lines, sep="\n  ", file=sys.stderr, flush=True)


def run(command, *, processes, max_restarts, log_dir, save_limit) -> int:
    """Starts, watches and restarts; returns the exit code of this program."""
    stop = Stop()
    for attempt in range(max_restarts + 1):
        children = []
        try:
            start(children, command, processes, log_dir)
            codes, first = watch(children, stop, save_limit)
        except OSError as error:
            say(f"cannot start {command[0]}: {error}")
            return BAD_INPUT
        finally:
            send(children, signal.SIGKILL)  # after an exception; else none is left
        if first is not None:
            report(first, codes, log_dir)
        if BAD_INPUT in codes:
            say("bad input is not tried again")
            return BAD_INPUT
        if set(codes) == {0}:
            return 0
        if stop.count:  # 128 + number is the shell's code: not everything was saved
            return INTERRUPTED if first is None else 128 + stop.number
        if attempt < max_restarts:
            done = "stopped" if first is None else "failed"
            say(f"{done}; restart {attempt + 1} of {max_restarts}")
    say(f"giving up after {max_restarts} restarts")
    code = INTERRUPTED if first is None else codes[first]
    return code if code > 0 else 128 - code


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    command = argv[split + 1 :]
    parser = argparse.ArgumentParser(
        prog="python launch/supervise.py",
        usage="%(prog)s --processes=N [--max_restarts=K] [--log_dir=DIR] -- COMMAND",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--max_restarts", type=int, default=10)
    parser.add_argument("--log_dir", type=pathlib.Path, help="default: a new one")
    parser.add_argument(
        "--save_limit",
        type=float,
        default=60,
        help="seconds for the others once one is complete or has saved",
    )
    args = parser.parse_args(argv[:split])
    if not command:
        parser.error("no COMMAND after --")
    if args.processes < 1 or args.max_restarts < 0:
        parser.error("--processes is at least 1, --max_restarts at least 0")
    log_dir = args.log_dir
    if args.processes > 1:
        log_dir = log_dir or pathlib.Path(tempfile.mkdtemp(prefix="xlformer-hosts-"))
        log_dir.mkdir(parents=True, exist_ok=True)
        say(f"output of hosts 1 to {args.processes - 1}: {log_dir}/host-*.log")
    return run(
        command,
        processes=args.processes,
        max_restarts=args.max_restarts,
        log_dir=log_dir,
        save_limit=args.save_limit,
    )


if __name__ == "__main__":
    sys.exit(main())
