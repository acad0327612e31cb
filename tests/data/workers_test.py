"""Workers: the same shards for any number of them, kills, errors, scripts."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import shared_jobs

from xlformer import command, config, prepare
from xlformer.data import corpora, parts, preparing, shards, symbols, workers
from xlformer.errors import UserError, WorthAnotherTry


@pytest.fixture(autouse=True)
def limit():
    """No test waits for ever for another process."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def options(path, **fields):
    data = config.default_config().data
    data.update(corpus="text", path=str(path), **fields)
    return data


def done(function, jobs):
    try:
        with workers.Team(2) as team:
            return list(team.work(function, jobs))
    finally:
        assert not multiprocessing.active_children()


def test_jobs_are_shared_and_come_in_their_order():
    jobs = [(number, os.getpid()) for number in range(9)]
    found = done(shared_jobs.of_this_process, jobs)
    assert [number for number, *_ in found] == list(range(9))
    helpers = {(pid, jax) for _, pid, jax in found if pid != os.getpid()}
    assert len(helpers) == 1 and {jax for _, jax in helpers} == {False}
    assert any(pid == os.getpid() for _, pid, _ in found)


@pytest.mark.parametrize("lives", [1, 2])
def test_a_killed_worker_is_replaced_once(lives, tmp_path, capsys):
    jobs = [(str(tmp_path), number, lives, os.getpid()) for number in range(4)]

    def main(argv):
        assert done(shared_jobs.die, jobs) == [0, 1, 2, 3]
        return 0

    assert command.run(main, []) == (0 if lives == 1 else 1)
    assert len(list(tmp_path.iterdir())) == lives
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == lives - 1
    assert all("was killed, and another in its place" in line for line in lines)


def test_what_a_job_raises_is_raised():
    with pytest.raises(UserError, match="job . is bad") as caught:
        done(shared_jobs.refuse, [(0,), (1,), (2,)])
    assert not isinstance(caught.value, WorthAnotherTry)


def test_a_helper_says_where_it_raised():
    jobs = [(os.getpid(),)] * 2
    with pytest.raises(ZeroDivisionError) as caught:
        done(shared_jobs.fail_in_a_helper, jobs)
    assert "in fail_in_a_helper" in caught.value.__notes__[0]


def test_helpers_work_on_while_large_results_wait():
    """A pipe takes a few hundred KB: what is larger waits for this process."""
    with workers.Team(3) as team:
        for _ in range(2):
            jobs = [(number, 1 << 20) for number in range(8)]
            found = list(team.work(shared_jobs.many, jobs))
            assert [x[0] for x in found] == list(range(8))
            assert {len(x) for x in found} == {1 << 20}
        next(team.work(shared_jobs.many, jobs))  # The others of them are given up.
        assert next(team.work(shared_jobs.many, jobs[3:]))[0] == 3


def test_helpers_get_ready_before_there_is_work(tmp_path):
    """What they call first may fail: a job then fails too, and says so."""
    ready = functools.partial(shared_jobs.leave_a_file_and_fail, str(tmp_path))
    with workers.Team(ready=ready) as team:
        assert not multiprocessing.active_children()
        team.grow(3)
        helpers = {process.pid for process in multiprocessing.active_children()}
        while len(found := {int(path.name) for path in tmp_path.iterdir()}) < 2:
            time.sleep(0.01)
        assert found == helpers and len(helpers) == 2
        team.grow(2)
        jobs = [(number, os.getpid()) for number in range(9)]
        pids = {pid for _, pid, _ in team.work(shared_jobs.of_this_process, jobs)}
        assert pids - {os.getpid()} == helpers


KILLED = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import shared_jobs
from xlformer.data import workers
with workers.Team(2) as team:
    jobs = [(number, os.getpid()) for number in range(4)]
    pids = {pid for _, pid, _ in team.work(shared_jobs.of_this_process, jobs)}
    print(*pids - {os.getpid()}, flush=True)
    time.sleep(60)
"""


def test_helpers_end_with_a_process_that_is_killed():
    folder = os.path.dirname(shared_jobs.__file__)
    command = [sys.executable, "-c", KILLED, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        (helper,) = map(int, process.stdout.readline().split())
        process.kill()
    end = time.monotonic() + 30
    while is_running(helper):
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


SCRIPT = """
import os, sys
sys.path.insert(0, sys.argv[1])
import shared_jobs
from xlformer.data import workers
print("begun")
with workers.Team(3) as team:
    jobs = [(number, os.getpid()) for number in range(9)]
    print(len({pid for _, pid, _ in team.work(shared_jobs.of_this_process, jobs)}))
"""


def test_a_script_needs_no_guard(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, str(path), os.path.dirname(shared_jobs.__file__)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["begun", "3"], run.stderr


def test_the_shards_are_the_same_for_any_number_of_processes(tmp_path, monkeypatch):
    draw = np.random.default_rng(5)
    words = [f"w{i}" for i in draw.zipf(1.5, 3000) % 200]
    (tmp_path / "book.txt").write_text(" ".join(words))
    monkeypatch.setattr(parts, "SIZE", 101)
    monkeypatch.setattr(corpora, "SHARD", 997)
    found = []
    for count in (1, 3):
        monkeypatch.setattr(preparing, "_processes", lambda _, count=count: count)
        data = options(tmp_path / "book.txt", unit="words", min_count=1)
        folder = prepare.prepare(data, directory=tmp_path / str(count)).directory
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[0] == found[1] and len(found[0]) > 12


def test_an_unknown_symbol_is_found_in_a_worker_too(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SIZE", 101)
    monkeypatch.setattr(corpora, "SHARD", 997)
    monkeypatch.setattr(preparing, "_processes", lambda _: 2)
    (tmp_path / "book.txt").write_text("abcd " * 2000)
    helpers, example = set(), corpora._example

    def seen(*args):
        helpers.add(len(multiprocessing.active_children()))
        return example(*args)

    monkeypatch.setattr(corpora, "_example", seen)
    whole = prepare.prepare(options(tmp_path / "book.txt", unit="chars"))
    assert helpers == {1}  # It gets ready while the text is stored.
    vocabulary = whole.vocabulary
    monkeypatch.setattr(symbols, "_count", lambda *_: (vocabulary, 0))
    (tmp_path / "book.txt").write_text("abcd " * 2000 + "xyz")
    with pytest.raises(UserError, match="text test: not in the vocabulary of 5 chars"):
        prepare.prepare(options(tmp_path / "book.txt", unit="chars"))


def test_characters_that_a_tokenizer_drops_are_said(tmp_path, monkeypatch, capsys):
    """As they are found in all processes, also by one that was killed."""
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setattr(parts, "SIZE", 101)
    monkeypatch.setattr(corpora, "SHARD", 997)
    monkeypatch.setattr(preparing, "_processes", lambda _: 2)
    known = {letter: i for i, letter in enumerate("abcd\n")}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(known, []))
    model.save(str(tmp_path / "bpe.json"))
    text = "ab cd\n" * 900 + "zab" + "ab cd\n" * 900 + "\u00efab\n"
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    data = options(tmp_path / "book.txt", tokenizer=str(tmp_path / "bpe.json"))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "write_index", killed)
        prepare.prepare(data, directory=tmp_path)
    line = "makes no token of 2 characters of the text: 'z', '\u00ef'\n"
    assert line in capsys.readouterr().err
    monkeypatch.setattr(preparing, "_processes", lambda _: 1)
    monkeypatch.setattr(shards, "writer", None)  # All shards are there.
    prepare.prepare(data, directory=tmp_path)
    assert line in capsys.readouterr().err
