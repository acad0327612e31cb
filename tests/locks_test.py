"""Who may write into a work directory, with real processes."""

import json
import os

import pytest
from processes import finish, start

from xlformer.errors import UserError
from xlformer.training.locks import WorkdirLock

HOLDER = """
    import sys, time
    from xlformer.training.locks import WorkdirLock
    with WorkdirLock(sys.argv[1]):
        print("ready", flush=True)
        time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_the_directory(tmp_path):
    process = start(HOLDER, tmp_path / "run")
    try:
        with pytest.raises(UserError) as error:
            WorkdirLock(tmp_path / "run").__enter__()
        message = str(error.value)
        assert message.startswith(f"{tmp_path}/run is in use by pid {process.pid} on ")
    finally:
        process.kill()  # -9: nothing of ours runs any more
        finish(process)
    with WorkdirLock(tmp_path / "run"):
        owner = json.loads((tmp_path / "run" / "lock").read_text())
    assert owner["pid"] == os.getpid()


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


def test_object_stores_have_no_lock():
    with WorkdirLock("gs://bucket/run"):
        pass
    assert not os.path.exists("gs:")
