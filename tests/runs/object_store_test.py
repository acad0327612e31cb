"""Runs in gs://, against an emulator of Google Cloud Storage."""

import contextlib
import functools
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import fsspec
import object_store
import pytest
from training_runs import (
    SYMBOLS,
    assert_same,
    bag,
    everything,
    final_state,
    refusal,
    text_config,
    write_text,
)

import xlformer.training.run
from xlformer import evaluate, generate, runs, storage
from xlformer.data import recipes
from xlformer.runs import goodput, log, writing
from xlformer.runs.checkpoints import Checkpoints
from xlformer.runs.locks import WorkdirLock
from xlformer.train import train

# Orbax abandons coroutines when one of several reads fails; each then complains.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

TOTAL = 24
PERIOD = 0.2  # of locks
BUCKET = f"gs://{object_store.BUCKET}"


@pytest.fixture(autouse=True, scope="module")
def emulator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    with object_store.emulator(folder / "log.txt"):
        with pytest.MonkeyPatch.context() as patch:
            lock = functools.partial(WorkdirLock, period=PERIOD)
            patch.setattr(xlformer.training.run, "WorkdirLock", lock)
            patch.setenv("HOME", str(folder))  # of a host that has no tokens
            yield folder


@pytest.fixture
def place(request):
    """A name that no other test uses."""
    name = re.sub(r"\W", "-", request.node.name)
    return storage.path(f"{BUCKET}/{name}")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def config(text):
    found = everything(text_config(text))
    found.data.directory = f"{BUCKET}/prepared"
    return found


@pytest.fixture(scope="module")
def local(config, tmp_path_factory):
    """The work directory of the same run on local disk, on the host that prepares."""
    folder = tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        train(config, folder / "run", model=model())
    assert list(folder.rglob("train*.npy"))
    return folder / "run"


def model():
    return bag(vocab_size=SYMBOLS, dropout=0.1)


def losses(workdir):
    measured = ("time", "perf/", "goodput/")
    return [
        {k: v for k, v in record.items() if not k.startswith(measured)}
        for record in log.read(workdir)
        if record["kind"] in ("train", "eval")
    ]


def assert_same_run(workdir, local, config):
    assert losses(workdir) == losses(local)
    found, expected = (final_state(d, config, model()) for d in (workdir, local))
    assert found[0] == expected[0] == TOTAL
    assert_same(found[1], expected[1])
    a, b = (Checkpoints(d / "checkpoints", read_only=True) for d in (workdir, local))
    assert a.steps() == b.steps() and a.best() == b.best()


COMMAND = """
import functools, sys, time
sys.path.insert(0, sys.argv.pop(1))
import object_store_test
import xlformer.training.run
from training_runs import everything, text_config
text, workdir = sys.argv[1:]
config = everything(text_config(text))
config.data.directory = object_store_test.BUCKET + "/prepared"
xlformer.training.run.WorkdirLock = functools.partial(
    xlformer.training.run.WorkdirLock, period=object_store_test.PERIOD)
from xlformer.data.stream import Stream
at = Stream.at
# However slow the killer is: the run is not over.
Stream.at = lambda self, step: time.sleep(60) if step == 20 else at(self, step)
xlformer.training.run.train(
    config, workdir, model=object_store_test.model())
"""


def run_and_kill(text, workdir, output, *, when):
    """Kills a process -9 when it logs that."""
    here = pathlib.Path(__file__).parent
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, here, text, str(workdir)],
            env=os.environ | {"PYTHONPATH": f"{here.parents[1]}:{here.parent}"},
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 60
        while not re.search(when, output.read_text()):
            assert process.poll() is None and time.monotonic() < end, output.read_text()
            time.sleep(0.003)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def survivor(text, config, local, tmp_path_factory):
    """(work directory, step left by a kill -9, steps logged until then, log of the
    resumed run) of a run that was killed and resumed; not to be changed."""
    place, said = storage.path(f"{BUCKET}/survivor"), io.StringIO()
    killed = tmp_path_factory.mktemp("killed") / "log.txt"
    run_and_kill(text, place, killed, when=r"step +1[4-9]/24")
    left = Checkpoints(place / "checkpoints", read_only=True).latest()
    seen = [r["step"] for r in log.read(place)]
    with contextlib.redirect_stderr(said):
        train(config, place, model=model())
    return place, left, seen, said.getvalue()


def test_killed_and_resumed_it_ends_bit_by_bit_like_a_local_run(
    survivor, config, local
):
    place, left, _, said = survivor
    assert left in (6, 8, 12, 16, 18)  # every 6, and every 8 with a validation
    assert len(re.findall("xlformer: .* taking over its lock", said)) == 1
    assert f"resuming from the checkpoint of step {left}" in said
    assert_same_run(place, local, config)
    names = {path.name for path in place.iterdir()}
    assert {"config.json", "vocabulary.json", "data.json", "checkpoints"} <= names
    assert "lock" not in names
    assert not list(pathlib.Path().glob("gs:*"))


def test_its_tokens_were_read_where_they_lie_and_it_says_how_long_it_waited(
    survivor, local, emulator
):
    assert not list(emulator.rglob("train*.npy"))
    for workdir, waited in ((survivor[0], True), (local, False)):
        last = log.read(workdir, kind=goodput.TOTAL)[-1]
        assert (last["goodput/data_wait_s"] > 0) == waited


def test_what_a_checkpoint_knows_was_logged_before_the_kill(survivor):
    place, left, seen, _ = survivor
    assert max(seen) >= left - 1
    parts = [path.name for path in log.parts(place)]  # of two processes
    assert [name.split("-")[1] for name in parts] == ["000001", "000002"]


def objects(place):
    names = fsspec.filesystem("gcs").find(str(place))
    return [storage.path(f"gs://{name}") for name in names]


@pytest.fixture
def copied(survivor, place):
    """The same run, to be damaged."""
    for path in objects(survivor[0]):
        path.copy(place / path.relative_to(survivor[0]), overwrite=True)
    return place


@pytest.mark.parametrize("item", ["state", "digest", "config"])
def test_a_damaged_object_is_refused_and_the_step_before_is_used(
    copied, config, item, caplog
):
    steps = Checkpoints(copied / "checkpoints", read_only=True).steps()
    damaged = 0
    for path in objects(copied / "checkpoints" / str(TOTAL) / item):
        data = bytearray(path.read_bytes())
        if data and (item != "state" or path.parent.name == "d"):
            data[len(data) // 2] ^= 255
            path.write_bytes(bytes(data))
            damaged += 1
    assert damaged
    step, *_ = final_state(copied, config, model())
    assert step == steps[-2] and f"checkpoint refused: step {TOTAL}" in caplog.text


def test_a_step_that_was_not_committed_is_made_again(copied, config, local, capsys):
    (copied / "checkpoints" / str(TOTAL) / "commit_success.txt").unlink()
    found = Checkpoints(copied / "checkpoints", read_only=True)
    assert TOTAL not in found.steps() and found.latest() == 18
    train(config, copied, model=model())
    assert "resuming from the checkpoint of step 18" in capsys.readouterr().err
    assert_same_run(copied, local, config)


# The commands that read ---------------------------------------------------------------


@pytest.fixture(scope="module")
def transformer(text):
    """A trained Transformer-XL, of one step."""
    config = text_config(text, steps=1)
    config.data.directory = f"{BUCKET}/prepared"
    place = f"{BUCKET}/transformer"
    train(config, place)
    return place


def test_evaluate_and_generate_read_from_the_store(transformer, capsys, monkeypatch):
    # What was prepared is found there by its checksum, wherever the text lies.
    monkeypatch.setattr(recipes, "raw_text", lambda _: None)
    argv = [f"--workdir={transformer}", "--split=test"]
    assert evaluate.main(argv) == 0
    card = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert card["step"] == 1 and card["nats_per_token"] > 0
    written = storage.path(transformer) / "evaluation-test.json"
    assert json.loads(written.read_text())["nats_per_token"] == card["nats_per_token"]
    cards = storage.path(transformer) / runs.EVALUATIONS
    (entry,) = json.loads((cards / "index.json").read_text())
    assert json.loads((cards / entry["file"]).read_text()) == card
    argv = [f"--workdir={transformer}", "--prompt=the cat", "--num_tokens=5"]
    assert generate.main(argv) == 0
    assert capsys.readouterr().out.startswith("the cat")
    assert runs.load(transformer).step == 1


@pytest.mark.parametrize("where", ["gs://nowhere/run", "s3://bucket/run"])
def test_a_place_that_does_not_exist_is_one_line(where, config):
    assert where in refusal(train, config, where, model=model())
    assert where in refusal(runs.load, where)


def test_a_run_elsewhere_is_not_mistaken_for_an_empty_directory(config, place):
    (place / "metrics-000001-0123abcd.jsonl").write_text("")  # killed at its start
    (place / "lock").write_text("")
    writing.refuse_foreign(place)
    (place / "photo.jpg").write_text("x")
    line = refusal(train, config, place, model=model())
    assert "is no run and not empty (it has 'photo.jpg')" in line
