"""A process of its own: what it gives back, its limits, and that nothing stays."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from xlformer.instruments import apart

LIMIT = 1 << 28


def half(n):
    print("halves")
    return {"half": n / 2, "pid": os.getpid()}


def taken(many):
    return len(b"x" * many)


def taken_twice(many):
    found = []
    for n in (many, 1):
        apart.forget_peak()
        before = apart.resident_bytes()
        taken(n)
        found.append(apart.peak_bytes() - before)
    return found


def fails(line):
    raise ValueError(line)


def dies(code, line):
    os.write(2, line.encode())
    os.kill(os.getpid(), code)


def stays(path):
    pathlib.Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def test_a_value_comes_back_from_another_process():
    found = apart.run(half, {"n": 3}, memory=LIMIT, seconds=60)
    assert found.value["half"] == 1.5 and found.value["pid"] != os.getpid()
    assert (found.why, found.said) == ("", "halves\n") and found.seconds > 0


def test_the_peak_is_that_of_the_process():
    many = 1 << 27
    small, large = (apart.run(taken, {"many": n}).peak_bytes for n in (1, many))
    assert small < 1 << 26 and 0.9 * many < large - small < 1.1 * many


def test_a_peak_begins_anew():
    large, small = apart.run(taken_twice, {"many": 1 << 27}).value
    assert abs(large / (1 << 27) - 1) < 0.1 and small < 1 << 22


def test_what_asks_for_more_than_its_limit_is_out_of_memory():
    found = apart.run(taken, {"many": 2 * LIMIT}, memory=LIMIT)
    assert (found.value, found.why) == (None, apart.MEMORY)
    assert apart.run(taken, {"many": LIMIT // 2}, memory=LIMIT).value == LIMIT // 2


def test_what_takes_longer_than_its_limit_is_killed(tmp_path):
    path = tmp_path / "pid"
    found = apart.run(stays, {"path": os.fspath(path)}, seconds=1.5)
    assert (found.value, found.why) == (None, apart.TIME)
    assert 1.5 <= found.seconds < 10
    assert _gone(path)


@pytest.mark.parametrize(
    ("code", "line", "memory", "why"),
    [
        (signal.SIGKILL, "", None, apart.MEMORY),  # by the kernel
        (signal.SIGABRT, "what(): std::bad_alloc", None, apart.MEMORY),
        (signal.SIGSEGV, "", LIMIT, apart.MEMORY),
        (signal.SIGSEGV, "", None, "failed: exit code -11"),
        (signal.SIGTERM, "first\nlast\n", LIMIT, "failed: last"),
    ],
)
def test_how_a_process_died(code, line, memory, why):
    arguments = {"code": code, "line": line}
    found = apart.run(dies, arguments, memory=memory)
    assert (found.value, found.why, found.said) == (None, why, line)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("two\nlines", "failed: two lines"),
        ("INTERNAL: Out of memory allocating 256 bytes.", apart.MEMORY),
    ],
)
def test_an_error_is_one_line_and_its_trace_is_kept(line, why):
    found = apart.run(fails, {"line": line})
    assert found.why == why and "Traceback" in found.said and line in found.said


@pytest.mark.parametrize("code", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_behind(code, tmp_path):
    """Of Ctrl-C, and of a program that is killed."""
    path = tmp_path / "pid"
    program = f"""
import apart_test
from xlformer.instruments import apart
apart.run(apart_test.stays, {{"path": {os.fspath(path)!r}}})
"""
    places = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": places},
        stderr=subprocess.DEVNULL,
    )
    _until(lambda: path.exists() and path.read_text())
    parent.send_signal(code)
    assert parent.wait(20) != 0
    _until(lambda: _gone(path))


def _gone(path) -> bool:
    """Whether the process is dead; nobody may have asked yet how it ended."""
    status = pathlib.Path(f"/proc/{path.read_text()}/stat")
    return not status.exists() or ") Z " in status.read_text()


def _until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
