"""Several hosts are one run: the same numbers, joined, stopped and resumed together."""

import json
import re
import signal
import time

import pytest
from cluster import Cluster
from training_runs import (
    SYMBOLS,
    assert_close,
    bag,
    final_state,
    text_config,
    write_text,
)

from xlformer import evaluate, generate, models
from xlformer import train as train_lib
from xlformer.hosts import faults
from xlformer.runs import log
from xlformer.runs.checkpoints import Checkpoints

B, STEPS = 8, 200
FIELDS = {"batch_size": B, "steps": STEPS, "save_every": 50, "eval_every": 100}
# Or a run is over before it is killed.
PACED = {"hosts": {"heartbeat": 5.0}, "pace_s": 0.04}


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
    return workdir, train_lib.train(make_config(text), workdir, model)


def assert_same_end(text, model, workdir, reference):
    """The whole state: also what is carried, and the place in the data."""
    config = make_config(text)
    step, found, _ = final_state(workdir, config, model)
    expected_step, expected, _ = final_state(reference, config, model)
    assert step == expected_step
    assert_close(found, expected, rtol=1e-4)


PROMPT = ["--prompt=the cat", "--num_samples=3", "--num_tokens=21"]


def test_two_hosts_give_the_numbers_of_one(
    text, model, one_host, tmp_path, monkeypatch, capsys
):
    reference, expected = one_host
    then = [["evaluate", "--follow"], ["generate", *PROMPT]]
    with Cluster(text, tmp_path / "run", devices=2, train=FIELDS, then=then) as cluster:
        assert cluster.codes() == [0, 0], cluster.everything()
        trained, scored, continued = map(
            _printed, re.split("^-- .*\n", cluster.text(), flags=re.M)
        )
        silent = re.split("^-- .*\n", cluster.text(1), flags=re.M)
        assert [_printed(part) for part in silent[1:]] == ["", ""]
        found = json.loads(trained.splitlines()[-1])
        assert re.search(r"host 1 of 2: \S+, pid \d+, 2 x cpu", cluster.text(1))
        assert "mesh data 4 x fsdp 1 x tensor 1" in cluster.text(0)
        # After its first line only process 0 talks.
        assert "mesh" not in cluster.text(1)
    assert found["step"] == STEPS
    assert found["train/loss_nats"] == pytest.approx(
        expected["train/loss_nats"], rel=1e-4
    )
    assert found["eval/nats_per_token"] == pytest.approx(
        expected["eval/nats_per_token"], rel=1e-4
    )
    assert_same_end(text, model, tmp_path / "run", reference)
    assert len(list((tmp_path / "run").glob("metrics*.jsonl"))) == 1
    # Reading it too.
    monkeypatch.setattr(models, "build", lambda *_, **__: model)
    cards = [json.loads(line) for line in scored.splitlines() if line[0] == "{"]
    kept = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps()
    assert [card["step"] for card in cards] == kept and len(kept) > 1
    assert len(list((tmp_path / "run" / "evaluations").iterdir())) == 1 + len(kept)
    for card in cards:
        alone = evaluate.evaluate(tmp_path / "run", checkpoint=str(card["step"]))
        assert card["device"] == "cpu x4" and alone["device"] == "cpu x8"
        assert card["nats"] == pytest.approx(alone["nats"], rel=1e-5)
    capsys.readouterr()
    assert generate.main([f"--workdir={tmp_path / 'run'}", *PROMPT]) == 0
    assert continued == capsys.readouterr().out


def _printed(text):
    """Without the lines that commands say on the other stream."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("xlformer: "))


def test_saved_on_two_hosts_resumed_on_four_and_on_one(
    text, model, one_host, tmp_path, capfd
):
    workdir = tmp_path / "run"
    for count, steps in [(2, 50), (4, 100)]:
        mesh = {"fsdp": 2} if count == 2 else {}
        fields = FIELDS | {"steps": steps}
        with Cluster(text, workdir, count=count, train=fields, mesh=mesh) as cluster:
            cluster.finish()
            assert count == 2 or resumed(50) in cluster.text()
    finish_on_one(text, model, workdir, capfd, 100)
    assert_same_end(text, model, workdir, one_host[0])


def resumed(step):
    return f"resuming from the checkpoint of step {step}"


def finish_on_one(text, model, workdir, capfd, step):
    """In this process, with four devices, from that step on."""
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", lambda *_, **__: model)
        train_lib.train(make_config(text), workdir)
    assert resumed(step) in capfd.readouterr().err


def test_sigterm_to_any_host_saves_all_at_one_step_and_kill_9_costs_one_save_interval(
    text, model, one_host, tmp_path, capfd
):
    """One run, stopped once and killed twice: the start of hosts is what this costs."""
    workdir = tmp_path / "run"
    fields = FIELDS | {"save_every": 0, "eval_every": 0, "log_every": 1}
    with Cluster(text, workdir, train=fields, **PACED) as cluster:
        cluster.wait_for(r"step +\d+/200")
        cluster.signal(signal.SIGTERM, 1)
        assert cluster.codes() == [faults.INTERRUPTED] * 2, cluster.everything()
        saved = int(cluster.found(r"SIGTERM: saved at step (\d+)")[1])
    assert Checkpoints(workdir / "checkpoints", read_only=True).steps() == [saved]
    fields = FIELDS | {"log_every": 1}
    for victim in (0, 1):
        with Cluster(text, workdir, train=fields, **PACED) as cluster:
            cluster.wait_for(resumed(saved))
            saved = saved // 50 * 50 + 50
            committed = workdir / "checkpoints" / str(saved)
            while not committed.exists():
                assert cluster.processes[0].poll() is None, cluster.everything()
                time.sleep(0.01)
            cluster.signal(signal.SIGKILL, victim)
            start = time.monotonic()
            codes = cluster.codes()
            assert codes[victim] == -signal.SIGKILL and codes[1 - victim] != 0
            assert time.monotonic() - start < 30
        last = max(r["step"] for r in log.read(workdir, kind="train"))
        latest = Checkpoints(workdir / "checkpoints", read_only=True).latest()
        assert saved <= latest and last - latest <= 50
        saved = latest
    finish_on_one(text, model, workdir, capfd, saved)
    assert_same_end(text, model, workdir, one_host[0])
