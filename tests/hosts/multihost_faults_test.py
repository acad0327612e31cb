"""Hosts that are missing, differ, hang or fail: named in one line, and all end."""

import re
import signal
import time

import pytest
from cluster import Cluster, free_port
from training_runs import write_text

from xlformer import train as train_lib
from xlformer.hosts.watchdog import HUNG
from xlformer.runs.checkpoints import Checkpoints

FIELDS = {"batch_size": 8, "steps": 200, "save_every": 50, "eval_every": 100}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def errors(cluster):
    logs = [cluster.text(host) for host in range(len(cluster.logs))]
    return [re.findall("^error: .*", log, re.MULTILINE) for log in logs]


def test_a_host_that_does_not_see_the_work_directory_is_named(text, tmp_path):
    with Cluster(text, [tmp_path / "a", tmp_path / "b"], train=FIELDS) as cluster:
        assert cluster.codes() == [2, 2], cluster.everything()
        for host, lines in enumerate(errors(cluster)):
            workdir = tmp_path / "ab"[host]
            assert lines == [
                f"error: host 1 does not see --workdir={workdir}; use gs:// or a "
                "shared mount"
            ]
            assert "Traceback" not in cluster.text(host)


def test_a_host_with_another_config_is_named(text, tmp_path):
    trains = [FIELDS, FIELDS | {"half_loss": True}]
    with Cluster(text, tmp_path / "run", train=trains) as cluster:
        assert cluster.codes() == [2, 2], cluster.everything()
        assert "error: host 1 has another config than host 0" in cluster.text(1)


def test_a_host_that_never_comes_is_named(text, tmp_path):
    hosts = {"start_limit": 4.0}
    with Cluster(
        text, tmp_path / "run", count=3, only=[0, 2], train=FIELDS, hosts=hosts
    ) as cluster:
        assert cluster.codes() == [HUNG] * 2, cluster.everything()
        for host in (0, 1):
            assert "host 1: no heartbeat in" in cluster.text(host)


def test_a_coordinator_that_cannot_be_reached_is_named(text, tmp_path):
    hosts = {"start_limit": 4.0}
    with Cluster(
        text, tmp_path / "run", only=[1], train=FIELDS, hosts=hosts
    ) as cluster:
        assert cluster.codes() == [HUNG], cluster.everything()
        assert "host 0: no heartbeat in" in cluster.text(0)


def test_a_host_that_starts_late_is_waited_for(text, tmp_path):
    port, fields = free_port(), FIELDS | {"steps": 10}
    workdir = tmp_path / "run"
    with Cluster(text, workdir, only=[0], port=port, train=fields) as first:
        while not (workdir / "hosts" / "0.json").exists():
            assert first.processes[0].poll() is None, first.everything()
            time.sleep(0.05)
        time.sleep(1)
        with Cluster(text, workdir, only=[1], port=port, train=fields) as late:
            assert late.codes() == [0], late.everything()
        assert first.finish()["step"] == 10


@pytest.mark.parametrize("stopped", [False, True], ids=["in its data", "stopped"])
def test_a_host_that_hangs_is_named_within_the_heartbeat(text, tmp_path, stopped):
    fields, hosts = FIELDS | {"log_every": 1, "steps": 10**6}, {"heartbeat": 3.0}
    with Cluster(
        text,
        tmp_path / "run",
        train=fields,
        hosts=hosts,
        hang_at=None if stopped else 20,
    ) as cluster:
        if stopped:
            cluster.wait_for(r"step +\d+/")
            cluster.signal(signal.SIGSTOP, 1)
        else:
            cluster.wait_for("hanging", host=1)
        start = time.monotonic()
        code = cluster.processes[0].wait(timeout=30)
        assert time.monotonic() - start < 8
        what = "is dead or stopped" if stopped else "has made no step for"
        # Of a host whose threads still run it may be itself that notices first.
        codes = [code] if stopped else cluster.codes()
        assert HUNG in codes and 0 not in codes, cluster.everything()
        line = rf"host 1 \(\S+, pid \d+\) {what}.* last seen in .*step \d+"
        cluster.found(line, codes.index(HUNG))


def test_a_disk_that_is_full_on_one_host_ends_all_and_costs_no_checkpoint(
    text, tmp_path
):
    workdir = tmp_path / "run"
    hosts = {"heartbeat": 4.0}
    # Paced, so that the save of step 50 is over before the disk is full.
    late = {"full_at": 99, "pace_s": 0.04}
    with Cluster(text, workdir, train=FIELDS, hosts=hosts, **late) as cluster:
        codes = cluster.codes()
        # 1: worth another try, the death of another host looks the same.
        assert codes[1] == 1 and codes[0] not in (0, 2, 42), cluster.everything()
        (line,) = errors(cluster)[1]
        assert "saving failed" in line and "the latest checkpoint is step 50" in line
    assert Checkpoints(workdir / "checkpoints", read_only=True).latest() == 50


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--coordinator=x:1"], "go together"),
        (
            ["--coordinator=x:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2 must be from 0 to --num_processes=2 - 1",
        ),
    ],
)
def test_flags_that_do_not_fit_are_one_line(flags, line, tmp_path, capsys):
    argv = ["--config=quickstart:debug", f"--workdir={tmp_path / 'w'}", *flags]
    assert train_lib.main(argv) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
