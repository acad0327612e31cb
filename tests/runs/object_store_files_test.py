"""Logs, locks and data in gs://, against an emulator of Google Cloud Storage."""

import fcntl
import logging
import re
import sys
import tarfile

import numpy as np
import object_store
import pytest
from processes import finish, start
from training_runs import refusal, text_config, write_text

from xlformer import config, prepare, storage
from xlformer.data import folders, lm1b, ranges
from xlformer.data.stream import Stream
from xlformer.runs import log
from xlformer.runs.locks import WorkdirLock

PERIOD = 0.2  # of locks
BUCKET = f"gs://{object_store.BUCKET}"


@pytest.fixture(autouse=True, scope="module")
def requests(tmp_path_factory):
    """The emulator's log of requests so far."""
    folder = tmp_path_factory.mktemp("emulator")
    with object_store.emulator(folder / "log.txt") as requests:
        yield requests


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A host of its own: its copies of tokens lie there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def place(request):
    """A name that no other test uses."""
    name = re.sub(r"\W", "-", request.node.name)
    return storage.path(f"{BUCKET}/{name}")


def test_a_reader_sees_what_another_process_writes(place):
    path = place / "file.json"
    assert not path.exists() and not list(place.glob("*"))
    writer = """
        import sys
        from etils import epath
        epath.Path(sys.argv[1]).write_text(sys.argv[2])
        print("ready", flush=True)
        """
    for text in ("1", "four"):
        finish(start(writer, path, text))
        assert list(place.iterdir()) == [path] and path.read_text() == text


@pytest.mark.parametrize("write", [storage.write, storage.put])
def test_what_cannot_be_written_is_one_line(write):
    line = refusal(write, storage.path("gs://nowhere/run/config.json"), "")
    assert line.startswith("gs://nowhere/run/config.json: cannot be written: ")
    assert "\n" not in line


@pytest.mark.parametrize("missing", ["gcsfs", "google.cloud.storage"])
def test_without_the_extra_the_line_names_it(missing, monkeypatch):
    storage._prepare.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, missing, None)  # as if not installed
        line = refusal(storage.path, f"{BUCKET}/run")
    assert line == f"gs:// needs {missing}: pip install 'xlformer[gcs]'"
    storage.path(f"{BUCKET}/run")
    # It logs the traces of what it raises too, which we say in one line.
    assert not logging.getLogger("gcsfs").isEnabledFor(logging.ERROR)


# Logs ---------------------------------------------------------------------------------


def test_parts_are_numbered_visible_before_the_end_and_never_written_over(
    place, monkeypatch
):
    numbers = []
    for start_at in (0, 10, 20):
        writer = log.Writer(place)
        for step in range(start_at, start_at + 3):
            writer.write(step, {"train/bpc": step})
        assert [r["step"] for r in log.read(place)] == numbers
        writer.flush()
        numbers += range(start_at, start_at + 3)
        assert [r["step"] for r in log.read(place)] == numbers
        writer.write(99, {"train/bpc": 0})  # lost: killed before the next upload
    names = [path.name for path in log.parts(place)]
    assert [name[:15] for name in names] == [f"metrics-00000{i}-" for i in (1, 2, 3)]
    # A writer that is taken for dead starts where another one does.
    writers = [log.Writer(place) for _ in range(2)]
    for step, each in enumerate(writers, 30):
        each.write(step, {"train/bpc": step})
        each.close()
    assert [r["step"] for r in log.read(place)] == [*numbers, 30, 31]


def test_a_part_is_uploaded_after_some_time_and_ends_at_some_size(
    place, monkeypatch, requests
):
    monkeypatch.setattr(log, "FLUSH_S", 0.0)
    monkeypatch.setattr(log, "PART_SIZE", 500)
    with log.Writer(place) as writer:
        for step in range(20):
            writer.write(step, {"train/bpc": step})
            assert len(log.read(place)) == step + 1
    assert 2 < len(log.parts(place)) < 9
    monkeypatch.setattr(log, "FLUSH_S", 3600.0)
    before = len(requests())
    with log.Writer(place) as writer:
        for step in range(20):
            writer.write(step, {"train/bpc": step})
        assert len([x for x in requests()[before:] if x.startswith("POST")]) == 0


# Corpora ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["archive", "files"])
def test_a_manual_directory_may_be_a_bucket(form, place, tmp_path):
    name, folder = lm1b.CORPUS.archive.file, tmp_path / "here"
    train = "training-monolingual.tokenized.shuffled/news.en-00001-of-00100"
    test = "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050"
    for path, text in ((train, "a b a\na a b b\n"), (test, "a b\n")):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)
        if form == "files":
            (place / "unpacked" / path).write_text(text)
    if form == "archive":
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            archive.add(folder, "benchmark")
        (place / name).write_bytes((tmp_path / name).read_bytes())
    data = config.load("lm1b_base").data
    data.update(manual_dir=str(place), directory=str(tmp_path / "out"))
    found = prepare.prepare(data)
    assert found.vocabulary.decode(found.tokens["test"][:]) == "\na b\n"
    data.manual_dir = str(place / "nothing")
    data.directory = str(tmp_path / "other")
    assert f"manual_dir={place}/nothing: no such dir" in refusal(prepare.prepare, data)


# Locks --------------------------------------------------------------------------------

HOLDER = """
    import sys, time
    from xlformer.runs.locks import WorkdirLock
    with WorkdirLock(sys.argv[1], period=float(sys.argv[2])):
        print("ready", flush=True)
        time.sleep(60)
"""


def test_a_lock_is_refused_then_taken_over_from_the_dead(place, capsys):
    process = start(HOLDER, place, PERIOD)
    try:
        line = refusal(WorkdirLock(place, period=PERIOD).__enter__)
        assert f"{place} is in use by pid {process.pid} on host" in line
    finally:
        process.kill()  # -9
        finish(process)
    assert (place / "lock").exists()
    capsys.readouterr()
    with WorkdirLock(place, period=PERIOD) as lock:
        lock.check()
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "taking over" in x]
    assert f"pid {process.pid} on host" in line
    assert not (place / "lock").exists()


# Data ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def data(text, place):
    found = text_config(text).data
    found.directory = str(place)
    return found


@pytest.fixture
def small(monkeypatch):
    """Blocks of less than a hundred bytes."""
    monkeypatch.setattr(ranges, "BLOCK", 97)


def downloads(requests, name="train.npy"):
    return sum(name in x and "alt=media" in x for x in requests())


PREPARE = """
    import fcntl, sys
    from xlformer import config, prepare
    from xlformer.data import folders
    print("ready", flush=True)
    with open(sys.argv[2]) as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # wait until both are there
    copy = folders._copy
    folders._copy = lambda *args, **options: (
        print("copied", file=sys.stderr), copy(*args, **options))
    found = prepare.prepare(config.load(sys.argv[1]).data)
    print(len(found.tokens["train"]), file=sys.stderr)
"""


def test_two_processes_copy_what_is_small_once_and_no_tokens(
    text, data, place, requests, monkeypatch, tmp_path
):
    prepared = prepare.prepare(data)
    monkeypatch.setenv("HOME", str(tmp_path / "another-host"))
    monkeypatch.setenv("XLFORMER_DATA", str(place))
    before = downloads(requests), downloads(requests, "vocabulary.json")
    name = f"text:path={text},unit=chars,debug"
    with open(tmp_path / "gate", "w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        processes = [start(PREPARE, name, tmp_path / "gate") for _ in range(2)]
    ends = [finish(process) for process in processes]
    assert [code for code, _ in ends] == [0, 0], ends
    said = [errors.split() for _, errors in ends]
    assert [x[-1] for x in said] == [str(len(prepared.tokens["train"]))] * 2
    assert sum("copied" in x for x in said) == 1
    after = downloads(requests), downloads(requests, "vocabulary.json")
    assert (after[0] - before[0], after[1] - before[1]) == (0, 1)


def test_steps_read_from_the_store_are_those_of_a_disk(
    data, place, small, home, monkeypatch
):
    local = prepare.prepare(data)
    monkeypatch.setenv("HOME", str(home / "another-host"))
    found = prepare.prepare(data)
    assert not list(found.directory.glob("train*.npy"))
    fields = {"batch_size": 7, "segment_length": 13}
    streams = [Stream(x.tokens["train"], **fields) for x in (local, found)]
    for step in (0, 1, 2, 40, 7, streams[0].steps_per_epoch, 0):
        one, two = (stream.at(step) for stream in streams)
        for name in one:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    assert streams[0].waited == 0 < streams[1].waited
    for split in ("validation", "test"):
        np.testing.assert_array_equal(found.tokens[split], local.tokens[split])


def test_a_damaged_copy_is_made_again_with_one_line(data, place, capsys, requests):
    prepared = prepare.prepare(data)
    copied = prepared.directory / "train.npy"
    intact, tokens = copied.read_bytes(), np.asarray(prepared.tokens["train"])
    for damaged in (intact[:-1] + bytes([intact[-1] ^ 1]), b""):
        copied.write_bytes(damaged)
        capsys.readouterr()
        found = prepare.prepare(data)
        # It is no longer needed where it was made.
        assert not copied.exists()
        np.testing.assert_array_equal(found.tokens["train"], tokens)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"xlformer: {copied} does not match its card")
    before = downloads(requests)
    prepare.prepare(data)
    assert downloads(requests) == before and capsys.readouterr().err == ""


def test_damaged_tokens_in_the_store_are_refused(data, place, home, monkeypatch, small):
    folder = place / prepare.prepare(data).directory.name
    path = folder / "validation.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    monkeypatch.setenv("HOME", str(home / "another-host"))
    tokens = prepare.prepare(data).tokens["validation"]
    line = refusal(tokens.__getitem__, slice(len(tokens)))
    assert re.match(rf"{path}: bytes \d+ to {len(content)} do not match their", line)
    assert str(folder) in line
    left = [path.name for path in (home / "another-host").rglob("*")]
    assert not [n for n in left if n.endswith(".npy") or folders.INCOMPLETE in n]
