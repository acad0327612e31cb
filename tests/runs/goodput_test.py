"""Where the wall clock of a run went, over kills and restarts; all sums by hand."""

import json
import os
import random
import subprocess
import sys
import time

import pytest

from xlformer.runs import goodput, log

ORIGIN = 1_700_000_000  # seconds since 1970


def attempt(start, *points, pid=1, **seconds):
    """Records of one attempt: points are (step, steps_s); the rest does not change."""
    name = f"{(ORIGIN + start) * 10**9}-{pid}"
    seconds = dict.fromkeys(goodput.CATEGORIES, 0.0) | seconds
    common = {f"goodput/{k}_s": v for k, v in seconds.items()}
    common |= {"kind": goodput.KIND, "goodput/attempt": name}
    return [common | {"step": step, "goodput/steps_s": s} for step, s in points]


def summary(*attempts, **kwargs):
    found = goodput.summary([r for a in attempts for r in a], **kwargs)
    return {name.removeprefix("goodput/"): value for name, value in found.items()}


def assert_adds_up(found):
    categories = sum(found[f"{name}_s"] for name in goodput.CATEGORIES)
    assert found["wall_s"] == pytest.approx(categories + found["between_s"])
    assert found["steps_s"] == pytest.approx(
        found["productive_s"] + found["repeated_s"]
    )


# The sum --------------------------------------------------------------------------


def test_one_attempt():
    found = summary(attempt(0, (0, 0), (10, 40), (20, 80), start_up=15, saving=5))
    assert (found["wall_s"], found["productive_s"]) == (100, 80)
    assert found["ratio"] == 0.8
    assert (found["start_up_s"], found["saving_s"]) == (15, 5)
    zero = ("repeated_steps", "repeated_s", "restarts", "between_s", "restoring_s")
    assert [found[name] for name in zero] == [0] * 5
    assert_adds_up(found)


def test_two_attempts_and_what_the_kill_cost():
    """The first is known to step 30 (its second 75), the second begins with step 20."""
    found = summary(
        attempt(0, (0, 0), (10, 20), (20, 40), (30, 70), start_up=5),
        attempt(90, (20, 0), (40, 60), start_up=5, restoring=5, compiling=10, pid=2),
    )
    assert (found["repeated_steps"], found["repeated_s"]) == (10, 30)
    assert (found["productive_s"], found["wall_s"]) == (40 + 60, 90 + 80)
    assert found["ratio"] == pytest.approx(100 / 170)
    assert (found["between_s"], found["restarts"]) == (15, 1)
    assert (found["start_up_s"], found["restoring_s"]) == (10, 5)
    assert (found["compiling_s"], found["steps_s"]) == (10, 130)
    assert_adds_up(found)


def test_a_resume_between_two_records_is_interpolated():
    found = summary(attempt(0, (0, 0), (10, 100)), attempt(100, (7, 0), pid=2))
    assert (found["repeated_steps"], found["repeated_s"]) == (3, pytest.approx(30))
    assert found["productive_s"] == pytest.approx(70)
    assert_adds_up(found)


def test_an_attempt_that_wrote_nothing_lies_between_the_others():
    """It lived from second 30 to 50 and nobody knows."""
    found = summary(attempt(0, (0, 0), (5, 25)), attempt(50, (5, 0), (10, 25), pid=3))
    assert (found["restarts"], found["between_s"]) == (1, 25)
    assert (found["repeated_steps"], found["productive_s"]) == (0, 50)
    assert_adds_up(found)


def test_several_restarts_take_away_what_earlier_ones_had_saved():
    """Corrupt checkpoints: the third attempt falls back to before the second."""
    found = summary(
        attempt(0, (0, 0), (10, 10), (20, 20), pid=1),
        attempt(20, (15, 0), (30, 15), pid=2),
        attempt(35, (5, 0), (6, 1), pid=3),
    )
    assert found["repeated_steps"] == 5 + 25
    assert found["productive_s"] == 5 + 1
    assert_adds_up(found)


def test_steps_between_the_last_record_and_the_kill_count_without_their_time():
    """A checkpoint of step 20 survived, then only that of step 15."""
    known = (attempt(0, (0, 0), (10, 10)), attempt(40, (20, 0), pid=2))
    found = summary(*known)
    assert (found["repeated_steps"], found["productive_s"]) == (0, 10)
    assert found["between_s"] == 30
    found = summary(*known, attempt(50, (15, 0), pid=3))
    assert (found["repeated_steps"], found["repeated_s"]) == (5, 0)


def test_a_roll_back_inside_an_attempt():
    """Steps 11 to 18 are undone; a second of them passed after the last record."""
    points = [(0, 0), (10, 10), (18, 18), (10, 19), (20, 29)]
    found = summary(attempt(0, *points))
    assert (found["repeated_steps"], found["repeated_s"]) == (8, 9)
    assert (found["productive_s"], found["restarts"]) == (20, 0)
    assert_adds_up(found)


def test_several_records_at_one_step():
    first = attempt(0, (0, 0), (10, 10), (10, 11), (10, 12))
    assert summary(first, attempt(12, (10, 0), pid=2))["productive_s"] == 12
    first = attempt(0, (0, 0), (10, 10), (10, 11), (10, 12))
    found = summary(first, attempt(12, (0, 0), pid=2))
    assert (found["productive_s"], found["repeated_s"]) == (0, 12)


def test_the_end_of_the_run_may_be_later_than_the_last_record():
    found = summary(attempt(0, (0, 0), (1, 10)), now=ORIGIN + 40)
    assert (found["wall_s"], found["between_s"], found["ratio"]) == (40, 30, 0.25)


def test_hosts_whose_clocks_disagree_leave_no_negative_gap():
    found = summary(attempt(0, (0, 0), (1, 50)), attempt(45, (1, 0), (2, 50), pid=2))
    assert (found["wall_s"], found["between_s"]) == (95, 0)


def test_no_records():
    assert set(summary().values()) == {0}


def test_random_histories_add_up_and_count_every_step_once():
    draw = random.Random(0)
    for _ in range(50):
        attempts, step, start, done = [], 0, 0, 0
        for pid in range(draw.randint(1, 6)):
            points, seconds = [(step, 0)], 0
            for _ in range(draw.randint(0, 5)):
                advance = draw.randint(0, 9)
                step, seconds, done = step + advance, seconds + advance, done + advance
                points.append((step, seconds))
            attempts.append(attempt(start, *points, pid=pid))
            start += seconds + draw.randint(0, 9)
            end, step = step, draw.randint(0, step)
        found = summary(*attempts)
        assert_adds_up(found)  # A step takes one second:
        assert found["productive_s"] == pytest.approx(end)
        assert found["repeated_steps"] == done - end


# For people -----------------------------------------------------------------------


def test_the_line_names_everything():
    found = goodput.summary(
        [
            *attempt(0, (0, 0), (100, 3000), start_up=40, compiling=20.5, pid=1),
            *attempt(3100, (97, 0), (200, 3090), restoring=2, saving=61, pid=2),
        ]
    )
    assert goodput.line(found) == (
        "goodput 96.0 % of 1:44:13: steps 1:40:00, data-wait 0.0 s, start-up 40.0 s, "
        "compiling 20.5 s, restoring 2.0 s, saving 0:01:01, validating 0.0 s, "
        "other 0.0 s, repeated 3 steps 0:01:30, restarts 1, between attempts 39.5 s"
    )


# One attempt ----------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch):
    """Both clocks, to be moved by hand."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: ORIGIN + now[0])
    return now


def test_each_second_is_in_one_category(now):
    written = []
    clock = goodput.Clock(
        lambda step, values, kind: written.append((step, values, kind)),
        started=ORIGIN - 3.0,
    )
    now[0] += 1  # 4 with those before the clock: start-up
    with clock.measure("restoring"):
        now[0] += 2
    clock.record(7)
    with clock.measure("steps"):
        now[0] += 8
        clock.move("data_wait", 3)
        with clock.measure("saving"):
            now[0] += 16
            with clock.measure("validating"):
                now[0] += 32
            now[0] += 64
        now[0] += 128
        with pytest.raises(KeyError), clock.measure("compiling"):
            now[0] += 256
            raise KeyError
        clock.record(9)
    now[0] += 512
    clock.record(10)
    expected = {
        "start_up": 4,
        "restoring": 2,
        "steps": 5 + 128,
        "data_wait": 3,
        "saving": 16 + 64,
        "validating": 32,
        "compiling": 256,
        "other": 512,
    }
    assert [(step, kind) for step, _, kind in written] == [
        (step, goodput.KIND) for step in (7, 9, 10)
    ]
    last = written[-1][1]
    assert last["goodput/attempt"] == f"{(ORIGIN - 3) * 10**9}-{os.getpid()}"
    assert {k: last[f"goodput/{k}_s"] for k in expected} == expected
    assert set(expected) == set(goodput.CATEGORIES)
    assert written[0][1]["goodput/steps_s"] == written[1][1]["goodput/other_s"] == 0


def test_an_unknown_category_is_refused():
    with pytest.raises(ValueError, match="none of"):
        with goodput.Clock(None).measure("sleeping"):
            pass


def test_records_of_repeated_steps_are_read_and_torn_lines_are_not(tmp_path, now):
    for moment in (0, 100):
        now[0] = moment
        with log.Writer(tmp_path) as writer:
            clock = goodput.Clock(writer.write)
            clock.record(0)
            with clock.measure("steps"):
                now[0] += 10
                writer.write(5, {"train/loss_nats": 1.0})
                clock.record(5)
        with (tmp_path / log.FILE).open("a") as file:
            file.write('{"step": 7, "kind": "good')
    records = goodput.read(tmp_path)
    assert [r["step"] for r in records] == [0, 5, 0, 5]
    found = summary(records)
    assert (found["wall_s"], found["productive_s"]) == (110, 10)
    assert (found["repeated_steps"], found["repeated_s"]) == (5, 10)
    assert (found["between_s"], found["restarts"]) == (90, 1)
    with log.Writer(tmp_path) as writer:  # The summary is no record of its own.
        writer.write(5, goodput.summary(records), kind=goodput.TOTAL)
    assert goodput.read(tmp_path) == records
    (total,) = log.read(tmp_path, kind=goodput.TOTAL)
    assert total["goodput/ratio"] == pytest.approx(10 / 110)


@pytest.mark.parametrize(
    "change",
    [
        {"goodput/attempt": None},
        {"goodput/attempt": 7},
        {"goodput/attempt": "x"},
        {"goodput/attempt": "9" * 5000 + "-1"},
        {"goodput/steps_s": None},
        {"goodput/steps_s": "nan"},
        {"goodput/saving_s": "a text"},
        {"goodput/saving_s": 10**400},
        {"goodput/saving_s": 1.7e308},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_record_that_no_attempt_wrote_is_passed_over(change, tmp_path, now):
    with log.Writer(tmp_path) as writer:
        goodput.Clock(writer.write).record(3)
    records = goodput.read(tmp_path)
    (record,) = records
    strange = {k: v for k, v in (record | change).items() if v is not None}
    with (tmp_path / log.FILE).open("a") as file:
        file.write(json.dumps(strange) + "\n")
        file.write('{"step": 1, "kind": "goodput", "time": 0}\n')
    assert goodput.read(tmp_path) == records
    assert goodput.line(goodput.summary(records)).startswith("goodput 0.0 % of 0.0 s")


def test_an_attempt_begins_with_its_process():
    code = """if True:
        from xlformer.runs import goodput
        print(goodput.process_start(), goodput._IMPORTED)"""
    before = time.time()
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    start, imported = map(float, found.stdout.split())
    # The kernel counts in ticks of 10 ms.
    assert before - 0.05 <= start < imported - 0.05


def test_without_proc_an_attempt_begins_with_the_import(monkeypatch):
    monkeypatch.setattr(
        "builtins.open", lambda *_, **__: (_ for _ in ()).throw(OSError)
    )
    assert goodput.process_start() == goodput._IMPORTED
