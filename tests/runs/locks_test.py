"""Who may write into a work directory, with real processes."""

import errno
import fcntl
import json
import os
import time

import pytest
from processes import finish, start

from xlformer.errors import UserError
from xlformer.runs import locks
from xlformer.runs.locks import WorkdirLock

HOLDER = """
    import sys, time
    from xlformer.runs.locks import WorkdirLock
    with WorkdirLock(sys.argv[1]):
        print("ready", flush=True)
        time.sleep(60)
"""
PERIOD = 0.1
DEAD = PERIOD * locks.PATIENCE
STRANGE = ["{", "[]", '{"pid": 3}', '{"time": "x"}', "[" * 100_000]
STRANGE += [f'{{"time": 1{"0" * 400}}}']


def owner(workdir):
    return json.loads((workdir / "lock").read_text())


@pytest.fixture
def no_flock(monkeypatch):
    """A file system whose kernel driver has no locks, as some network mounts."""

    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", refuse)


def beating(workdir):
    return WorkdirLock(workdir, period=PERIOD)


def write_owner(workdir, **fields):
    fields = {"pid": 17, "host": "elsewhere", "time": time.time(), "id": "x"} | fields
    workdir.mkdir(exist_ok=True)
    (workdir / "lock").write_text(json.dumps(fields))


# Where the kernel locks ---------------------------------------------------------------


def test_a_second_process_is_told_who_holds_the_directory(tmp_path, capsys):
    process = start(HOLDER, tmp_path / "run")
    try:
        with pytest.raises(UserError) as error:
            WorkdirLock(tmp_path / "run").__enter__()
        message = str(error.value)
        assert message.startswith(f"{tmp_path}/run is in use by pid {process.pid} on ")
    finally:
        process.kill()  # -9: nothing of ours runs any more
        finish(process)
    assert capsys.readouterr().err == ""
    with WorkdirLock(tmp_path / "run") as lock:
        assert owner(tmp_path / "run")["pid"] == os.getpid()
        lock.check()
    (line,) = capsys.readouterr().err.splitlines()  # one loud line names the dead
    assert line.startswith(f"xlformer: {tmp_path}/run: pid {process.pid} on host ")
    assert line.endswith("ended without releasing its lock; taking it over")


def test_a_clean_end_leaves_no_name_and_the_next_has_nothing_to_say(tmp_path, capsys):
    for _ in range(2):
        with WorkdirLock(tmp_path):
            pass
        assert (tmp_path / "lock").read_text() == ""
    assert capsys.readouterr().err == ""


def test_the_same_process_cannot_lock_twice_but_again_after_release(tmp_path):
    with WorkdirLock(tmp_path):
        with pytest.raises(UserError, match=f"pid {os.getpid()} on host"):
            WorkdirLock(tmp_path).__enter__()
    with WorkdirLock(tmp_path):
        pass


def test_a_work_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        WorkdirLock(tmp_path / "file").__enter__()


# Elsewhere ----------------------------------------------------------------------------


def test_a_heartbeat_refuses_by_name_and_ends_without_a_trace(
    tmp_path, no_flock, capsys
):
    with beating(tmp_path) as lock:
        first = owner(tmp_path)
        begin = time.monotonic()
        with pytest.raises(UserError, match=f"in use by pid {os.getpid()} on host"):
            beating(tmp_path).__enter__()
        assert time.monotonic() - begin < DEAD  # the first sign of life is enough
        assert owner(tmp_path)["time"] > first["time"]
        lock.check()
    assert not (tmp_path / "lock").exists()
    capsys.readouterr()
    with beating(tmp_path):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("age", [0, -3600, 10_000])  # its clock may go wrong
def test_who_shows_no_life_is_taken_over_by_one_line(tmp_path, no_flock, capsys, age):
    write_owner(tmp_path, time=time.time() - age)
    begin = time.monotonic()
    with beating(tmp_path) as lock:
        took = time.monotonic() - begin
        assert owner(tmp_path)["pid"] == os.getpid()
        lock.check()
    assert took < DEAD if age > 9999 else DEAD <= took < DEAD + 2
    lines = capsys.readouterr().err.splitlines()
    assert len([x for x in lines if "taking over" in x]) == 1
    assert "pid 17 on host elsewhere has shown no life" in lines[-1]


def test_a_lock_that_is_released_while_one_waits_is_free(tmp_path, no_flock, capsys):
    write_owner(tmp_path)
    waiting = beating(tmp_path)
    waited = []
    read = locks._Heartbeat._read

    def release_it(self):
        waited.append(self)
        if len(waited) == 3:
            (tmp_path / "lock").unlink()
        return read(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks._Heartbeat, "_read", release_it)
        waiting.__enter__()
    waiting.__exit__()
    assert "taking over" not in capsys.readouterr().err


def test_of_two_who_take_over_at_once_the_first_to_write_notices(
    tmp_path, no_flock, monkeypatch
):
    write = locks._Heartbeat._write

    def and_another_one_too(self):
        write(self)
        write_owner(tmp_path, pid=18)

    monkeypatch.setattr(locks._Heartbeat, "_write", and_another_one_too)
    with pytest.raises(UserError, match="in use by pid 18 on host elsewhere"):
        beating(tmp_path).__enter__()


def test_an_owner_that_was_given_up_notices_and_leaves_the_other_alone(
    tmp_path, no_flock, capsys
):
    with beating(tmp_path) as lock:
        lock.check()
        write_owner(tmp_path, pid=18)
        end = time.monotonic() + 20
        while "taken over by pid 18" not in capsys.readouterr().err:
            lock._heartbeat._thread.join(PERIOD)
            assert time.monotonic() < end
        with pytest.raises(UserError, match="taken over by pid 18 on host elsewhere"):
            lock.check()
    assert owner(tmp_path)["pid"] == 18


def test_a_process_that_was_stopped_looks_before_it_goes_on(
    tmp_path, no_flock, monkeypatch
):
    with WorkdirLock(tmp_path, period=1.0) as lock:
        write_owner(tmp_path, pid=18)  # the thread does not know it yet
        lock.check()
        late = time.monotonic() + locks.PATIENCE + 1
        monkeypatch.setattr(locks.time, "monotonic", lambda: late)
        with pytest.raises(UserError, match="taken over by pid 18"):
            lock.check()
        monkeypatch.undo()


def test_an_owner_whose_disk_is_away_goes_on_and_says_so(
    tmp_path, no_flock, monkeypatch, capsys
):
    with beating(tmp_path) as lock:
        with monkeypatch.context() as patch:

            def fail(*_):
                raise OSError("unreachable")

            patch.setattr(locks.storage, "write", fail)
            lock._heartbeat._renew()
        assert "was not renewed: OSError('unreachable')" in capsys.readouterr().err
        lock._heartbeat._renew()
        lock.check()


def test_a_damaged_lock_is_of_somebody(tmp_path, no_flock, capsys):
    for text in STRANGE:
        (tmp_path / "lock").write_text(text)
        with beating(tmp_path):
            pass
        assert "another process" in capsys.readouterr().err


def test_a_damaged_lock_of_the_kernel_is_of_somebody(tmp_path, capsys):
    for text in STRANGE:
        (tmp_path / "lock").write_text(text)
        with WorkdirLock(tmp_path):
            pass
        assert "another process ended without" in capsys.readouterr().err
