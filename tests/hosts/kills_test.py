"""The short form of soak/kills.py, with the real supervisor and two processes."""

from soak import kills


def test_kill_9_of_random_processes_loses_nothing_that_was_committed(tmp_path):
    seed = kills.time.time_ns() % 10**6
    found = kills.soak(tmp_path, kills=3, processes=2, devices=1, steps=300, seed=seed)
    print(found)  # shown if this fails
    assert found["kills"] >= 2  # a late one may meet a run that is over
    assert found["attempts"] >= 3  # one that dies before it restores is not counted
    assert found["leaves_that_differ"] == []
    assert 0 < found["goodput"] < 1
