"""launch/supervise.py with real, tiny processes: restarts, limits, signals, orphans."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

SUPERVISE = pathlib.Path(__file__).parents[2] / "launch" / "supervise.py"
TIMEOUT = 30

# What every child starts with: `host` and `attempt` (from 0), and a line in `calls`.
CHILD = """
import os, pathlib, signal, sys, time
flags = dict(item.split("=", 1) for item in sys.argv[-3:])
host = int(flags["--process_id"])
mine = pathlib.Path(f"calls-{host}")
attempt = len(mine.read_text().splitlines()) if mine.exists() else 0
with mine.open("a") as file:
    print(os.getpid(), *sys.argv[1:], file=file)
"""
FOREVER = """
open(f"ready-{host}", "w").close()
while True: time.sleep(0.02)
"""
SAVES = 'signal.signal(signal.SIGTERM, lambda *_: (print("TERM"), sys.exit(42)))'
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


class Supervised:
    """The supervisor of `program`, its output in files of `directory`."""

    def __init__(self, directory, program, *flags, processes=2, arguments=()):
        self.directory = directory
        child = [sys.executable, "-S", "-E", "-c", CHILD + textwrap.dedent(program)]
        flags = [f"--processes={processes}", f"--log_dir={directory}/logs", *flags]
        command = [sys.executable, str(SUPERVISE), *flags, "--", *child, *arguments]
        with (
            open(directory / "stdout", "wb") as stdout,
            open(directory / "stderr", "wb") as stderr,
        ):
            self.process = subprocess.Popen(
                command,
                cwd=directory,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    def wait(self):
        try:
            return self.process.wait(TIMEOUT)
        finally:
            self.end()

    def end(self):
        """Whatever happened, nothing that was started stays; asks who was left."""
        self.process.kill()
        self.process.wait()
        left = [pid for pid in self.pids() if alive(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left

    def until(self, *names):
        end = time.monotonic() + TIMEOUT
        while not all((self.directory / name).exists() for name in names):
            assert time.monotonic() < end and self.process.poll() is None, self.errors()
            time.sleep(0.01)

    def calls(self, host):
        return (self.directory / f"calls-{host}").read_text().splitlines()

    def pids(self):
        return [
            int(line.split()[0])
            for path in self.directory.glob("calls-*")
            for line in path.read_text().splitlines()
        ]

    def errors(self):
        return (self.directory / "stderr").read_text()

    def log(self, host):
        return (self.directory / "logs" / f"host-{host}.log").read_text()


def alive(pid):
    try:
        # A zombie whose parent has gone too is nobody's any more, and runs no code.
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except (OSError, IndexError):
        return False


def test_all_complete_and_what_each_is_given(tmp_path):
    arguments = ["--config=a b", "--", "$(x)"]
    run = Supervised(tmp_path, "print('host', host)", processes=3, arguments=arguments)
    assert run.wait() == 0
    ports = set()
    for host in range(3):
        (call,) = run.calls(host)
        rest, _, process_id = call.rpartition(" ")
        rest, _, count = rest.rpartition(" ")
        rest, _, coordinator = rest.rpartition(" ")
        assert rest.endswith("--config=a b -- $(x)")
        assert (process_id, count) == (f"--process_id={host}", "--num_processes=3")
        assert coordinator.startswith("--coordinator=127.0.0.1:")
        ports.add(coordinator)
    assert len(ports) == 1
    assert (tmp_path / "stdout").read_text() == "host 0\n"
    assert run.log(1) == "host 1\n" and "host-*.log" in run.errors()


def test_one_crash_restarts_all_with_another_port(tmp_path):
    program = """
    if attempt == 0 and host == 1:
        sys.exit("Traceback: out of luck")
    if attempt == 0:
        time.sleep(60)  # hangs in a collective
    """
    run = Supervised(tmp_path, program)
    start = time.monotonic()
    assert run.wait() == 0
    assert 3 <= time.monotonic() - start < 20
    assert len(run.calls(0)) == len(run.calls(1)) == 2
    first, second = (call.split()[1] for call in run.calls(0))
    assert first != second
    assert "host 1 of 2 failed with exit code 1" in run.errors()
    assert "host-1.log ends with:\n  Traceback: out of luck" in run.errors()
    assert "restart 1 of 10" in run.errors()


def test_success_of_some_does_not_hide_a_failure_and_the_limit_holds(tmp_path):
    program = "sys.exit(43 if host == 1 else 0)"
    run = Supervised(tmp_path, program, "--max_restarts=2")
    assert run.wait() == 43
    assert len(run.calls(0)) == len(run.calls(1)) == 3
    assert "giving up after 2 restarts" in run.errors()


def test_killed_by_a_signal_is_named(tmp_path):
    program = "os.kill(os.getpid(), signal.SIGABRT)"
    run = Supervised(tmp_path, program, "--max_restarts=0", processes=1)
    assert run.wait() == 128 + signal.SIGABRT
    assert "host 0 of 1 failed with exit code -6 (SIGABRT)" in run.errors()


def test_bad_input_is_never_restarted(tmp_path):
    run = Supervised(tmp_path, "host and time.sleep(60)\nsys.exit(2)")
    assert run.wait() == 2
    assert len(run.calls(0)) == len(run.calls(1)) == 1


def test_saved_without_being_told_waits_for_the_others_and_restarts(tmp_path):
    program = """
    if attempt == 0:
        time.sleep(0.5 * host)
        print("saved", flush=True)
        sys.exit(42)
    """
    run = Supervised(tmp_path, program)
    assert run.wait() == 0
    assert len(run.calls(0)) == 2
    assert run.log(1) == "saved\n"
    assert "failed" not in run.errors() and "stopped; restart 1" in run.errors()


@pytest.mark.parametrize("code", [0, 42])
def test_who_hangs_after_the_others_ended_is_killed(tmp_path, code):
    program = f"host and time.sleep(60)\nsys.exit({code})"
    limits = ["--max_restarts=0", "--save_limit=0.3"]
    run = Supervised(tmp_path, program, *limits)
    assert run.wait() == 128 + signal.SIGKILL
    assert "host 1 still runs: 0.3 s later; killed" in run.errors()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on_once_and_ends_in_42(tmp_path, number):
    run = Supervised(tmp_path, SAVES + FOREVER)
    run.until("ready-0", "ready-1")
    run.process.send_signal(number)
    assert run.wait() == 42
    assert run.log(1) == (tmp_path / "stdout").read_text() == "TERM\n"
    assert len(run.calls(0)) == 1
    assert f"{number.name}: handed on" in run.errors()


def test_a_second_signal_kills_who_does_not_listen(tmp_path):
    run = Supervised(tmp_path, DEAF + FOREVER)
    run.until("ready-0", "ready-1")
    run.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + TIMEOUT
    while "handed on" not in run.errors() and time.monotonic() < end:
        time.sleep(0.01)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM
    assert len(run.calls(0)) == 1


def test_told_to_stop_but_one_fails_is_not_42(tmp_path):
    fails = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1 if host else 42))"
    run = Supervised(tmp_path, fails + FOREVER)
    run.until("ready-0", "ready-1")
    run.process.terminate()
    assert run.wait() == 128 + signal.SIGTERM
    assert "host 1 of 2 failed" in run.errors()


def test_kill_9_of_the_supervisor_stops_the_hosts_in_good_order(tmp_path):
    run = Supervised(tmp_path, SAVES + FOREVER)
    run.until("ready-0", "ready-1")
    run.process.kill()
    end = time.monotonic() + TIMEOUT
    while any(map(alive, run.pids())) and time.monotonic() < end:
        time.sleep(0.01)
    assert run.wait() == -signal.SIGKILL
    assert run.log(1) == "TERM\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--processes=0", "--", "true"],
        ["--processes=2"],
        ["--processes=2", "--max_restart=1", "--", "true"],
        ["--processes=1", "--", "/no/such/program"],
    ],
)
def test_wrong_usage_ends_in_2(arguments):
    command = [sys.executable, str(SUPERVISE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
