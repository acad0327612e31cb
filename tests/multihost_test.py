"""Several hosts are one run: the same numbers, joined, stopped and resumed together."""

import re
import signal
import time

import jax
import numpy as np
import pytest
from cluster import Cluster, free_port
from training_runs import SYMBOLS, bag, final_state, quick_jit, text_config, write_text

from xlformer import train as train_lib
from xlformer.training import faults, metrics
from xlformer.training.checkpoints import Checkpoints
from xlformer.training.watchdog import HUNG

B, STEPS = 8, 200
FIELDS = {"batch_size": B, "steps": STEPS, "save_every": 50, "eval_every": 100}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def make_config(text, **fields):
    config = text_config(text, **(FIELDS | fields))
    config.data.directory = f"{text}-prepared"
    config.mesh.data = 4
    return config


@pytest.fixture(scope="module")
def model():
    return bag(vocab_size=SYMBOLS, dropout=0.1)


@pytest.fixture(scope="module")
def one_host(text, model, tmp_path_factory):
    """(work directory, result) of one process with four devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    with quick_jit():
        return workdir, train_lib.train(make_config(text), workdir, model)


def assert_same_end(text, model, workdir, reference):
    """The whole state: also what is carried, and the place in the data."""
    config = make_config(text)
    step, found, _ = final_state(workdir, config, model)
    expected_step, expected, _ = final_state(reference, config, model)
    assert step == expected_step
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found),
        jax.tree.leaves(expected),
        strict=True,
    ):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6, err_msg=where)


def test_two_hosts_give_the_numbers_of_one(text, model, one_host, tmp_path):
    reference, expected = one_host
    with Cluster(text, tmp_path / "run", devices=2, train=FIELDS) as cluster:
        found = cluster.finish()
        assert re.search(r"host 1 of 2: \S+, pid \d+, 2 x cpu", cluster.text(1))
        assert "mesh data 4 x fsdp 1 x tensor 1" in cluster.text(0)
        assert "mesh" not in cluster.text(
            1
        )  # after its first line only process 0 talks
    assert found["step"] == STEPS
    assert found["train/loss_nats"] == pytest.approx(
        expected["train/loss_nats"], rel=1e-4
    )
    assert found["eval/nats_per_token"] == pytest.approx(
        expected["eval/nats_per_token"], rel=1e-4
    )
    assert_same_end(text, model, tmp_path / "run", reference)
    assert len(list((tmp_path / "run").glob("metrics*.jsonl"))) == 1


def test_saved_on_four_hosts_resumed_on_one_on_two_and_on_four(
    text, model, one_host, tmp_path
):
    workdir = tmp_path / "run"
    for count, devices, steps in [(4, 1, 50), (1, 4, 100), (2, 1, 150), (4, 1, 200)]:
        mesh = {"fsdp": 2} if count == 2 else {}
        fields = FIELDS | {"steps": steps}
        with Cluster(
            text, workdir, count=count, devices=devices, train=fields, mesh=mesh
        ) as cluster:
            cluster.finish()
            if steps > 50:
                resumed = f"resuming from the checkpoint of step {steps - 50}"
                assert resumed in cluster.text()
    assert_same_end(text, model, workdir, one_host[0])


def test_sigterm_to_any_host_saves_all_at_one_step(text, model, one_host, tmp_path):
    workdir = tmp_path / "run"
    fields = FIELDS | {"save_every": 0, "eval_every": 0, "log_every": 1}
    with Cluster(text, workdir, train=fields) as cluster:
        cluster.wait_for(r"step +\d+/200")
        cluster.signal(signal.SIGTERM, 1)
        assert cluster.codes() == [faults.INTERRUPTED] * 2, cluster.everything()
        saved = int(cluster.found(r"SIGTERM: saved at step (\d+)")[1])
    assert Checkpoints(workdir / "checkpoints", read_only=True).steps() == [saved]
    with Cluster(text, workdir, train=fields) as cluster:
        cluster.finish()
        assert f"resuming from the checkpoint of step {saved}" in cluster.text()
    assert_same_end(text, model, workdir, one_host[0])


@pytest.mark.parametrize("victim", [0, 1])
def test_kill_9_of_any_host_ends_the_others_and_costs_one_save_interval(
    text, model, one_host, tmp_path, victim
):
    workdir = tmp_path / "run"
    fields = FIELDS | {"log_every": 1}
    hosts = {"heartbeat": 5.0}
    with Cluster(text, workdir, train=fields, hosts=hosts) as cluster:
        cluster.wait_for(r"step +1\d\d/200")
        while not (workdir / "checkpoints" / "100").exists():  # until it is committed
            time.sleep(0.01)
        cluster.signal(signal.SIGKILL, victim)
        start = time.monotonic()
        codes = cluster.codes()
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] != 0
        assert time.monotonic() - start < 30
    steps = [r["step"] for r in metrics.read(workdir, kind="train")]
    with Cluster(text, workdir, train=fields) as cluster:
        cluster.finish()
        resumed = cluster.found(r"resuming from the checkpoint of step (\d+)")
        assert 100 <= int(resumed[1]) and max(steps) - int(resumed[1]) <= 50
    assert_same_end(text, model, workdir, one_host[0])


# What ends in one line ----------------------------------------------------------------


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
    with Cluster(text, workdir, train=FIELDS, hosts=hosts, full_at=60) as cluster:
        codes = cluster.codes()
        assert codes[1] == 2 and codes[0] not in (0, 42), cluster.everything()
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
