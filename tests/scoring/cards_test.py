"""Cards as tables and files: every one is kept, whoever else writes meanwhile."""

import json
import math
import os
import threading

import numpy as np
import pytest

from xlformer import progress, runs, storage
from xlformer.scoring import cards, results


def derived(nats, targets, size, words):
    """What a card derives of so many nats."""
    tally = results.Tally()
    nll_N = np.full(targets, nats / targets)
    tally.add(results.Scored(np.arange(targets), np.zeros(targets, int), nll_N))
    return tally.results(size, words)


def card(split="test", **fields):
    found = derived(6 * math.log(2), 3, 8, 2)
    return {"split": split, "date": "2026-11-25", "warmup": "none", **found} | fields


def index(workdir):
    return json.loads((workdir / runs.EVALUATIONS / cards.INDEX).read_text())


def files(workdir):
    folder = workdir / runs.EVALUATIONS
    return sorted(p.name for p in folder.iterdir() if p.name != cards.INDEX)


def test_every_card_is_kept_and_the_newest_is_where_it_was(tmp_path):
    cards.write(tmp_path, [card(step=1, window=None)])
    cards.write(tmp_path, [card(step=2, nats_per_token=math.nan)])
    cards.write(tmp_path, [card("validation", memory_length=n) for n in (5, 7)])
    entries = index(tmp_path)
    assert [entry["file"] for entry in entries] == files(tmp_path)
    assert [entry["split"] for entry in entries] == ["test"] * 2 + ["validation"] * 2
    assert [entry["step"] for entry in entries] == [1, 2, None, None]
    assert [entry["memory_length"] for entry in entries] == [None, None, 5, 7]
    assert [e["nats_per_token"] for e in entries[:2]] == [2 * math.log(2), None]
    newest = json.loads((tmp_path / "evaluation-test.json").read_text())
    last = (tmp_path / runs.EVALUATIONS / entries[1]["file"]).read_text()
    assert newest == json.loads(last) == cards.finite(card(step=2, nats_per_token=None))
    both = json.loads((tmp_path / "evaluation-validation.json").read_text())
    assert [c["memory_length"] for c in both] == [5, 7]
    table = (tmp_path / "evaluation-validation.txt").read_text()
    assert "\nmemory_length   5           7\n" in table


def test_cards_of_one_moment_are_all_in_the_index(tmp_path):
    barrier = threading.Barrier(8)

    def write(number):
        barrier.wait()
        for again in range(3):
            cards.write(tmp_path, [card(step=10 * number + again)])

    threads = [threading.Thread(target=write, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps = [entry["step"] for entry in index(tmp_path)]
    assert sorted(steps) == [10 * i + k for i in range(8) for k in range(3)]
    assert len(files(tmp_path)) == 24
    assert {p.name for p in tmp_path.iterdir()} == {
        "evaluation-test.json", "evaluation-test.txt", runs.EVALUATIONS
    }  # fmt: skip


def test_whoever_writes_the_index_last_finds_the_others_cards(tmp_path, monkeypatch):
    put, others = storage.put, [card(step=2)]

    def put_late(path, text):
        if path.name == cards.INDEX and others:  # another process, in between
            cards.write(tmp_path, [others.pop()])
        put(path, text)

    monkeypatch.setattr(cards.storage, "put", put_late)
    cards.write(tmp_path, [card(step=1)])
    assert [entry["step"] for entry in index(tmp_path)] == [1, 2]


def test_what_is_no_card_is_passed_over(tmp_path):
    folder = tmp_path / runs.EVALUATIONS
    folder.mkdir()
    for name, text in {"0.json": "[", "1.json": "[1]", "2.json": "7"}.items():
        (folder / name).write_text(text)
    deep = "[" * 900 + "]" * 900
    (folder / "3.json").write_text(f'{{"step": {deep}}}')
    (folder / "4.json").write_text("{}" + " " * cards.BIGGEST)
    (folder / "5.json").mkdir()
    os.mkfifo(folder / "6.json")
    os.mkfifo(folder / cards.INDEX)
    cards.write(tmp_path, [card(step=4)])
    assert [entry["step"] for entry in index(tmp_path)] == [4]
    found = [cards.read(path) for path in cards.archived(folder)]
    assert len(found) == 8 and [x["step"] for x in found if x] == [4]


def test_an_index_is_made_anew_where_it_is_lost(tmp_path):
    cards.write(tmp_path, [card(step=1)])
    path = tmp_path / runs.EVALUATIONS / cards.INDEX
    for step, damage in enumerate(("", "[", "{}", "[1]", "7", '[{"file": []}]'), 2):
        path.write_text(damage)
        cards.write(tmp_path, [card(step=step)])
        assert [e["step"] for e in index(tmp_path)] == [*range(1, step + 1)]


def test_what_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / runs.EVALUATIONS).write_text("a file")
    cards.write(tmp_path, [card()])
    assert capsys.readouterr().err.startswith("warning: the card was not written: ")
    cards.write(tmp_path / "nowhere", [card()])
    (line,) = capsys.readouterr().err.splitlines()
    assert "nowhere" in line
    assert not (tmp_path / "nowhere").exists()


def test_a_store_that_may_not_be_written_is_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise RuntimeError("403, no storage.objects.create")

    monkeypatch.setattr(cards.storage, "put", lambda *_: None)
    monkeypatch.setattr(cards.storage, "path", lambda place: place)
    monkeypatch.setattr(cards.storage, "is_remote", lambda place: True)
    monkeypatch.setattr(type(tmp_path), "mkdir", refuse)
    cards.write(tmp_path, [card()])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the card was not written: ") and "403" in line


def test_results_of_literal_numbers():
    found = derived(6 * math.log(2), 3, 8, 2)
    assert found["bpc"] == pytest.approx(2) and found["ppl"] == pytest.approx(4)
    assert found["bits_per_byte"] == pytest.approx(6 / 8)
    assert found["word_ppl"] == pytest.approx(2**3)
    huge = derived(1e6, 3, None, 1)
    assert huge["bits_per_byte"] is huge["word_ppl"] is huge["ppl"] is None
    of_bytes = derived(1.2345, 7, 7, None)  # equal to the last bit
    assert of_bytes["bits_per_byte"] == of_bytes["bpc"]


def test_a_table_has_every_field_of_every_card():
    one, two = card(note="a"), card(window=3, warning="b")
    rows = [row.split() for row in cards.table([one, two]).splitlines()]
    assert ["note", "a", "None"] in rows and ["window", "None", "3"] in rows
    assert "warning" not in [row[0] for row in rows]


def test_warnings_say_what_is_wrong():
    assert results.warning({"nats_per_token": 1.0}, 1.5) is None
    found = results.warning({"nats_per_token": 2.0}, 1.5)
    assert found.startswith("the loss 2.0000 exceeds the unigram entropy 1.5000")
    for loss in (math.nan, math.inf):
        found = results.warning({"nats_per_token": loss, "dtype": "bfloat16"}, 1.5)
        assert found.startswith(f"the loss is {loss}: the parameters are not finite")
        assert found.endswith("in bfloat16")


def test_progress_says_how_long_it_will_take(monkeypatch, capsys):
    now = iter([0.0, 20.0, 30.0, 34.0, 40.0, 60.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    say = progress.Progress("evaluating 1 of 2:")
    for fraction in (0.1, 0.2, 0.3, 0.4, 1.0):  # the first call has compiled
        assert say(fraction) is False
    assert capsys.readouterr().err.splitlines() == [
        "evaluating 1 of 2: 20%, 0:01:20 left",
        "evaluating 1 of 2: 40%, 0:00:40 left",
    ]


def test_a_short_evaluation_says_nothing(monkeypatch, capsys):
    now = iter([0.0, 1.0, 2.0, 4.9])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    say = progress.Progress("evaluating")
    for fraction in (0.3, 0.6, 1.0):
        say(fraction)
    assert capsys.readouterr().err == ""
