"""Prepared folders are complete or absent: kills half-way, races, remote copies."""

import fcntl
import os
import subprocess
import sys
import threading

import pytest
from training_runs import refusal

from xlformer import config, prepare
from xlformer.data import folders, local
from xlformer.errors import WorthAnotherTry


def own_text(path):
    data = config.default_config().data
    data.update(corpus="text", path=str(path))
    return data


def text_of(found):
    parts = (found.vocabulary.decode(ids) for ids in found.tokens.values())
    return b"".join(parts)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"to be or not to be\n" * 97)
    return path


WORKER = """
import sys, time
from xlformer import config, prepare
from xlformer.data import encoding, folders, local, preparing
stage, path, root = sys.argv[1:]
class Slow(list):
    def __iter__(self):
        print("half", file=sys.__stdout__, flush=True)
        time.sleep(100)
def hang(*arguments, **options):
    Slow().__iter__()
build, encode, read = preparing._build, encoding.encode, local.read_files
if stage == "tfds":
    def read_slowly(*arguments):
        text = read(*arguments)
        return type(text)(dict(text.splits, test=Slow(text.splits["test"])), {})
    local.read_files = read_slowly
    local.fingerprint = lambda text: "f"
if stage == "tokens":
    encoding.encode = lambda *arguments: (encode(*arguments), hang())
if stage == "race":
    def build_slowly(*arguments, **options):
        print("built", flush=True)
        time.sleep(0.7)
        build(*arguments, **options)
    preparing._build = build_slowly
    print("ready", flush=True)
    sys.stdin.readline()
data = config.default_config().data
data.update(corpus="text", path=path)
print(prepare.prepare(data, directory=root).directory, flush=True)
"""


def worker(stage, book, root):
    command = [sys.executable, "-c", WORKER, stage, str(book), str(root)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.parametrize("stage", ["tfds", "tokens"])
def test_a_kill_half_way_leaves_nothing_broken(stage, book, tmp_path, monkeypatch):
    root = tmp_path / "out"
    with worker(stage, book, root) as process:
        assert process.stdout.readline() == "half\n"
        process.kill()
    left = [p for p in root.rglob("*") if "incomplete" in p.name]
    assert left and not list(root.glob("text-bytes-????????????????"))
    if stage == "tfds":
        monkeypatch.setattr(local, "fingerprint", lambda text: "f")
    found = prepare.prepare(own_text(book), directory=root)
    assert text_of(found) == book.read_bytes()
    assert not [p for p in root.rglob("*") if "incomplete" in p.name]


def test_of_two_processes_one_works_and_both_read(book, tmp_path):
    workers = [worker("race", book, tmp_path / "out") for _ in range(2)]
    for process in workers:
        assert process.stdout.readline() == "ready\n"
    for process in workers:
        process.stdin.write("go\n")
        process.stdin.flush()
    lines = [process.communicate(timeout=60)[0].split() for process in workers]
    assert [process.returncode for process in workers] == [0, 0]
    assert sum(line.count("built") for line in lines) == 1
    assert lines[0][-1] == lines[1][-1]
    found = prepare.load(lines[0][-1])
    assert text_of(found) == book.read_bytes()


def test_who_waits_for_another_process_says_so(book, tmp_path, capsys):
    root = tmp_path / "out"
    root.mkdir()
    with open(root / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        timer = threading.Timer(0.2, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        found = prepare.prepare(own_text(book), directory=root)
        timer.join()
    assert text_of(found) == book.read_bytes()
    line = f"xlformer: another process is preparing in {root}: waiting for it\n"
    assert capsys.readouterr().err == line


def test_a_pipe_in_the_place_of_the_lock_is_not_waited_for(book, tmp_path):
    os.mkfifo(tmp_path / ".lock")
    kept = os.open(tmp_path / ".lock", os.O_RDWR)  # nor by a test of broken code
    line = refusal(prepare.prepare, own_text(book), directory=tmp_path)
    os.close(kept)
    assert line.startswith(f"{tmp_path}/.lock is a pipe or a device")


def test_what_is_finished_stays_for_another_try(tmp_path):
    """Of helpers that were killed, say: a launcher starts again."""

    def build(folder):
        (folder / f"{len(list(folder.iterdir()))}").touch()
        if len(list(folder.iterdir())) < 3:
            raise WorthAnotherTry("killed")
        (folder / "card.json").write_text("{}")

    for _ in range(2):
        with pytest.raises(WorthAnotherTry):
            folders.complete(tmp_path / "corpus", build)
        assert not (tmp_path / "corpus").exists()
    folder = folders.complete(tmp_path / "corpus", build)
    assert {path.name for path in folder.iterdir()} == {"0", "1", "2", "card.json"}


def test_threads_may_race_too(book, tmp_path):
    found, options = [], own_text(book)

    def run():
        found.append(prepare.prepare(options, directory=tmp_path / "out"))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({f.directory for f in found}) == 1 and len(found) == 3


def test_a_remote_directory_is_filled_once_and_copied(tmp_path):
    built = []

    def build(folder):
        built.append(folder)
        (folder / "train.npy").write_bytes(b"tokens")
        (folder / "card.json").write_text("{}")

    remote = tmp_path / "bucket" / "corpus"
    for host in ("one", "two"):
        folder = folders.complete(tmp_path / host / "corpus", build, remote)
        assert (folder / "train.npy").read_bytes() == b"tokens"
        assert (folder / "card.json").exists()
    assert len(built) == 1 and (remote / "train.npy").read_bytes() == b"tokens"
