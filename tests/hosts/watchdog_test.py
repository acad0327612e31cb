"""Hosts that hang: who notices, whom they name, and that real processes leave."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from xlformer.hosts.watchdog import HUNG, Watchdog

TIMEOUT = 60.0


class Hosts:
    """Watchdogs of several hosts, without threads: one clock moves all of them."""

    def __init__(self, directory, count=3):
        self.now, self.left, self.lines = 1000.0, [], []
        self.dogs = [self.dog(directory, i, count) for i in range(count)]

    def dog(self, directory, index, count):
        return Watchdog(
            directory,
            index,
            count,
            timeout_s=TIMEOUT,
            say=self.lines.append,
            leave=lambda code: self.left.append((index, code)),
            clock=lambda: self.now,
        )

    def beat(self, step, *, but=()):
        for index, dog in enumerate(self.dogs):
            if index not in but:
                dog.beat("step", step)

    def wait(self, seconds, *, dead=()):
        """As the threads do it, four times in a timeout; ends when one has left."""
        end = self.now + seconds
        while self.now < end and not self.left:
            self.now += TIMEOUT / 4
            live = [d for i, d in enumerate(self.dogs) if i not in dead]
            for dog in live:
                dog.tell()
            for dog in live:
                dog.watch()


@pytest.fixture
def hosts(tmp_path):
    return Hosts(tmp_path / "heartbeats")


# Who is named ---------------------------------------------------------------------


def test_hosts_that_beat_are_left_alone(hosts):
    for step in range(20):
        hosts.beat(step)
        hosts.wait(45)
    assert not hosts.left and not hosts.lines


def test_the_host_that_is_behind_is_named_by_all(hosts):
    for step in range(120):
        hosts.beat(step)
    hosts.wait(30)
    hosts.beat(120, but=[2])  # The others go on, and wait for it.
    hosts.wait(75)
    assert hosts.left == [(2, HUNG)]  # Its own thread is the first to see it.
    hosts.left.clear()
    hosts.wait(75, dead=[2])
    assert hosts.left == [(0, HUNG), (1, HUNG)]
    own, other, _ = hosts.lines
    name = f"host 2 ({os.uname().nodename}, pid {os.getpid()})"
    assert own.startswith(f"{name} has made no step for 75 s: last seen in step 119; ")
    assert other.startswith(name) and "step 119" in other
    assert "host 0 has waited 75 s in step 120 and leaves with code 43" in other
    assert all("\n" not in line and "host 1 (" not in line for line in hosts.lines)


def test_several_that_are_behind_are_named_in_order(hosts):
    hosts.beat(7)
    hosts.beat(8, but=[0, 1])
    hosts.wait(75)
    line = hosts.lines[1]
    assert line.count(" has made no step for 75 s: last seen in step 7; ") == 2
    assert 0 == line.index("host 0 (") < line.index("host 1 (") and "host 2" not in line


def test_a_dead_host_is_named_although_all_stand_in_the_same_step(hosts):
    hosts.beat(7)
    hosts.wait(15)
    hosts.wait(75, dead=[1])
    assert sorted(hosts.left) == [(0, HUNG), (2, HUNG)]
    for line in hosts.lines:
        assert line.startswith("host 1 (") and "dead or stopped" in line
        assert "last seen in step 7" in line


def test_a_host_that_never_came_is_named(hosts, tmp_path):
    hosts.beat(0)
    hosts.wait(75, dead=[1, 2])
    assert hosts.left == [(0, HUNG)]
    assert f"host 1, host 2: no heartbeat in {tmp_path}" in hosts.lines[0]


def test_what_an_earlier_attempt_left_is_no_sign_of_life(hosts, tmp_path):
    hosts.beat(500)
    hosts.wait(15)
    again = Hosts(tmp_path / "heartbeats")
    again.beat(3)
    again.wait(75, dead=[2])
    assert len(again.left) == 2
    assert all(line.startswith("host 2 (") for line in again.lines)


def test_where_nobody_is_behind_nobody_is_accused(hosts):
    hosts.beat(7)
    hosts.wait(75)
    assert len(hosts.left) == 3
    assert all("all 3 hosts stand in the same place" in line for line in hosts.lines)


def test_clocks_that_differ_accuse_nobody(hosts, tmp_path):
    """Host 1 lives an hour behind: its file looks old and is written all the same."""
    hosts.beat(7)
    hosts.beat(8, but=[2])
    for _ in range(10):
        hosts.wait(15)
        path = tmp_path / "heartbeats" / "1.json"
        found = json.loads(path.read_text())
        found["time"] -= 3600
        found["beat_time"] -= 3600
        path.write_text(json.dumps(found))
    assert hosts.lines and all(line.startswith("host 2") for line in hosts.lines)


# When ------------------------------------------------------------------------------


def test_a_long_phase_has_a_limit_of_its_own(hosts):
    allowed = [dog.allow(600, "compiling") for dog in hosts.dogs]
    for one in allowed:
        one.__enter__()
    hosts.wait(600)
    assert not hosts.left
    for one in allowed:
        one.__exit__(None, None, None)
    hosts.wait(60)  # Back to the limit of a step, from here on.
    assert not hosts.left
    hosts.wait(15)
    assert len(hosts.left) == 3


def test_a_long_phase_ends_too(hosts):
    hosts.beat(4)
    hosts.dogs[0].beat("saving", 4, limit_s=300)
    with hosts.dogs[1].allow(300, "saving"), hosts.dogs[2].allow(300, "saving"):
        hosts.wait(300)
        assert not hosts.left
        hosts.wait(15)
    assert len(hosts.left) == 3 and "in saving at step 4" in hosts.lines[0]


def test_a_phase_within_another_gives_the_limit_back(hosts):
    for dog in hosts.dogs:
        dog.beat("validating", 4, limit_s=300)
        with dog.allow(30, "saving"):
            pass
    hosts.wait(300)
    assert not hosts.left
    hosts.wait(15)
    assert "in validating at step 4" in hosts.lines[0]


def test_one_process_has_no_one_to_wait_for(tmp_path):
    threads = len(sys._current_frames())
    with Watchdog(tmp_path, 0, 1, timeout_s=0.001, say=None, leave=None) as dog:
        dog.beat("step", 1)
        with dog.allow(1, "saving"):
            assert len(sys._current_frames()) == threads
    assert not list(tmp_path.iterdir())


# Storage that fails ----------------------------------------------------------------


def test_a_directory_that_cannot_be_written_is_named_and_raises_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    hosts = Hosts(tmp_path / "file" / "heartbeats")
    hosts.beat(1)
    hosts.wait(75)
    assert len(hosts.left) == 3
    assert "heartbeats cannot be written for 75 s" in hosts.lines[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"process": 1}', '{"beats": "x"}'])
def test_a_file_that_cannot_be_read_counts_as_none(hosts, tmp_path, text):
    hosts.beat(1)
    hosts.wait(15)
    (tmp_path / "heartbeats" / "1.json").write_text(text)
    hosts.wait(75, dead=[1])
    assert len(hosts.left) == 2
    assert hosts.lines[0].startswith("host 1: no heartbeat in")


def test_storage_that_hangs_does_not_stop_the_watch(tmp_path, monkeypatch):
    """With threads: the one that writes never comes back."""
    import threading

    stuck, left = threading.Event(), threading.Event()
    with Watchdog(
        tmp_path, 0, 2, timeout_s=0.2, say=print, leave=lambda code: left.set()
    ) as dog:
        monkeypatch.setattr(dog._hosts, "write", lambda *_, **__: stuck.wait(20))
        dog.beat("step", 1)
        assert left.wait(10)
        stuck.set()


# Real processes --------------------------------------------------------------------

# Each step ends when the file of the other host's step is there: a collective.
LOOP = """if True:
    import pathlib, sys, time
    from xlformer.hosts.watchdog import Watchdog
    directory, index, sleeps = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

    def say(line):
        print(line, flush=True)

    with Watchdog(directory / "beats", index, 2, timeout_s=1, say=say) as watchdog:
        for step in range(10**6):
            watchdog.beat("batch", step)
            if step == 20:
                say("step 20")
                if sleeps == "sleeps":
                    time.sleep(600)
            watchdog.beat("step", step)
            (directory / f"{step}.{index}").touch()
            while not (directory / f"{step}.{1 - index}").exists():
                time.sleep(0.01)
            time.sleep(0.01)
"""


@pytest.fixture
def pair(tmp_path):
    """start(who sleeps) -> the processes of two hosts, which end with the test."""
    processes = []

    def start(*sleepers):
        for index in range(2):
            with open(tmp_path / f"{index}.log", "w") as log:
                args = [tmp_path, index, "sleeps" if index in sleepers else "works"]
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", LOOP, *map(str, args)],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        return processes

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(log, text, process, seconds=15):
    end = time.monotonic() + seconds
    while text not in log.read_text():
        assert time.monotonic() < end and process.poll() is None, log.read_text()
        time.sleep(0.02)


def last_line(log):
    return log.read_text().splitlines()[-1]


def test_a_stopped_process_is_named_by_the_other(pair, tmp_path):
    processes = pair()
    wait_for(tmp_path / "1.log", "step 20", processes[1])
    os.kill(processes[1].pid, signal.SIGSTOP)
    begin = time.monotonic()
    assert processes[0].wait(15) == HUNG
    assert time.monotonic() - begin < 6  # 1.25 timeouts, on a busy machine
    line = last_line(tmp_path / "0.log")
    assert f", pid {processes[1].pid}) is dead or stopped: last seen in" in line
    assert processes[1].poll() is None


def test_a_main_thread_that_hangs_is_named_by_both(pair, tmp_path):
    processes = pair(0)
    assert [process.wait(15) for process in processes] == [HUNG, HUNG]
    for index in range(2):
        line = last_line(tmp_path / f"{index}.log")
        assert line.startswith("host 0 (") and "last seen in batch at step 20" in line
        assert "has made no step for" in line and f"pid {processes[0].pid}" in line
