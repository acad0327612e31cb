"""Shards: the index, tokens that are read and not kept, resuming, 100 GB of nothing."""

import errno
import hashlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np
import pytest

from xlformer import config, prepare
from xlformer.data import corpora, counting, encoding, folders, parts, shards, symbols
from xlformer.data.stream import Stream
from xlformer.errors import UserError

WORDS = "the cat sat on a mat and na\u00efve dogs ran\n".split(" ")


@pytest.fixture
def book(tmp_path):
    draw = np.random.default_rng(7)
    path = tmp_path / "book.txt"
    path.write_text(" ".join(draw.choice(WORDS, 4001)), encoding="utf-8")
    return path


def options(path, **fields):
    data = config.default_config().data
    data.update(corpus="text", path=str(path), **fields)
    return data


@pytest.fixture
def small(monkeypatch):
    """Shards of about a kilobyte."""
    monkeypatch.setattr(parts, "SIZE", 101)
    monkeypatch.setattr(corpora, "SHARD", 997)


@pytest.mark.parametrize("unit", ["bytes", "chars", "words"])
def test_shards_are_the_same_tokens_and_the_same_card(unit, book, tmp_path):
    whole = prepare.prepare(options(book, unit=unit), directory=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "SIZE", 101)
        patch.setattr(corpora, "SHARD", 997)
        found = prepare.prepare(options(book, unit=unit), directory=tmp_path / "cut")
    assert found.card == whole.card and found.directory.name == whole.directory.name
    files = sorted(path.name for path in found.directory.glob("train*.npy"))
    assert len(files) > 10 and files[0] == "train-00000.npy"
    assert not list(found.directory.glob("*.done"))
    for split, tokens in whole.tokens.items():
        np.testing.assert_array_equal(found.tokens[split], tokens)
        assert len(found.tokens[split]) == len(tokens)
    # The card's checksum is that of one file, whatever the shards are.
    one = (whole.directory / "train.npy").read_bytes()
    assert found.card["splits"]["train"]["sha256"] == hashlib.sha256(one).hexdigest()
    assert found.vocabulary.to_json() == whole.vocabulary.to_json()


def test_a_text_of_few_shards_is_cut_into_more(book, tmp_path, monkeypatch):
    """Or one process of two would have most of the work."""
    monkeypatch.setattr(parts, "SIZE", 101)
    monkeypatch.setattr(corpora, "SMALL_SHARD", 211)
    found = prepare.prepare(options(book), directory=tmp_path)
    sizes = [len(f.read_bytes()) for f in sorted(found.directory.glob("train-*.npy"))]
    assert 13 <= len(sizes) <= 16  # Of all splits they are sixteenths.
    assert max(sizes[:-1]) - min(sizes[:-1]) < 2 * 101


def test_forgotten_words_are_said_and_stand_on_the_card(
    small, book, tmp_path, capsys, monkeypatch
):
    rare = " ".join(f"rare{i}" for i in range(500))
    book.write_text(rare + book.read_text(encoding="utf-8"), encoding="utf-8")
    whole = prepare.prepare(options(book, unit="words"), directory=tmp_path / "whole")
    assert "count_error" not in whole.card
    monkeypatch.setattr(counting, "WORDS", 100)
    found = prepare.prepare(options(book, unit="words"), directory=tmp_path / "few")
    assert found.card["count_error"] >= 1
    line = f"counts may be too low by {found.card['count_error']}"
    assert line in capsys.readouterr().err
    assert set(found.vocabulary.symbols) == set(whole.vocabulary.symbols)
    assert found.vocabulary.counts_V.sum() == whole.vocabulary.counts_V.sum()


def test_documents_cross_shards(small, tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i} " * (3 + i))
    found = prepare.prepare(options(tmp_path / "*.txt", documents=True))
    starts = found.documents["train"]
    texts = [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]
    expected = np.cumsum([0, *map(len, texts)])[:-1]
    np.testing.assert_array_equal(starts, expected[: len(starts)])
    assert len(list(found.directory.glob("train-0*.npy"))) > 3


def test_rows_cross_shards_and_a_batch_is_that_of_one_array(small, book):
    found = prepare.prepare(options(book))
    array = np.asarray(found.tokens["train"])
    for fields in ({}, {"extended_length": 5}, {"rows": [1, 2, 6]}):
        fields = {"batch_size": 7, "segment_length": 13} | fields
        one, two = Stream(array, **fields), Stream(found.tokens["train"], **fields)
        for step in (0, 1, 77, one.steps_per_epoch):
            for (name, x), y in zip(
                one.at(step).items(), two.at(step).values(), strict=True
            ):
                np.testing.assert_array_equal(x, y, err_msg=name)


def test_tokens_are_picked_as_from_an_array(small, book):
    tokens = prepare.prepare(options(book)).tokens["train"]
    array = np.asarray(tokens)
    draw = np.random.default_rng(1)
    index = np.concatenate([draw.integers(0, len(array), (3, 11)), [np.arange(5, 16)]])
    np.testing.assert_array_equal(tokens[index], array[index])
    assert tokens[index[:0]].shape == (0, 11) and tokens[-1] == array[-1]
    np.testing.assert_array_equal(tokens[990:2010:3], array[990:2010:3])
    # From the end, as numpy counts, and not from wherever a file begins.
    np.testing.assert_array_equal(tokens[index - 1500], array[index - 1500])
    for bad in ([0, -len(array) - 1], [len(array), 0]):
        with pytest.raises(IndexError, match=f"of {len(array)} tokens"):
            tokens[bad]
    table = np.arange(256)[::-1].astype(np.int32)
    other = tokens.head(1500).translated(table)
    assert len(other) == 1500 and other.dtype == np.int32
    np.testing.assert_array_equal(other, table[array[:1500]])


def spoil_cut(folder):
    path = folder / "train-00003.npy"
    os.truncate(path, path.stat().st_size - 1)


def spoil_index(change):
    def spoil(folder):
        index = json.loads((folder / shards.INDEX).read_text())
        change(index["splits"]["train"], index)
        (folder / shards.INDEX).write_text(json.dumps(index))

    return spoil


def first(field, value):
    return spoil_index(lambda train, _: train["shards"][0].update({field: value}))


SPOILED = {
    "missing": (lambda f: (f / "train-00003.npy").unlink(), "train-00003.npy: .*No"),
    "cut": (spoil_cut, "train-00003.npy: "),
    "grown": (
        lambda f: os.truncate(
            f / "train-00003.npy", (f / "train-00003.npy").stat().st_size + 1
        ),
        r"train-00003.npy: expected \d+ bytes, found \d+",
    ),
    "no index": (lambda f: (f / shards.INDEX).unlink(), "train.npy: "),
    "empty": (lambda f: (f / shards.INDEX).write_text(""), "index.json: "),
    "deep": (lambda f: (f / shards.INDEX).write_text("[" * 9999), "index.json: "),
    "a list": (lambda f: (f / shards.INDEX).write_text("[]"), "index.json: "),
    "format": (spoil_index(lambda _, i: i.update(format=2)), "format 2, expected 1"),
    "another": (
        spoil_index(lambda train, _: train.update(sha256="0" * 64)),
        "index.json: ValueError: it is the index of another corpus",
    ),
    "elsewhere": (first("file", "../../train.npy"), "is no name of a shard"),
    "size": (first("tokens", "9"), "is no number"),
    "sum": (first("tokens", 9), "the shards of train are not all"),
    "field": (first("command", "rm"), "index.json: TypeError"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_not_whole_is_one_line(name, small, book, tmp_path):
    folder = prepare.prepare(options(book), directory=tmp_path / "out").directory
    spoil, message = SPOILED[name]
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        prepare.load(folder)
    assert "prepare again" in str(caught.value)
    assert folders.damaged(folder)


def test_a_folder_without_an_index_is_read(book, tmp_path):
    """As 0.1.0 and 0.2.0 left them."""
    found = prepare.prepare(options(book), directory=tmp_path / "out")
    expected = np.asarray(found.tokens["train"])
    (found.directory / shards.INDEX).unlink()
    again = prepare.load(found.directory)
    np.testing.assert_array_equal(again.tokens["train"], expected)
    assert not folders.damaged(found.directory)


def test_it_goes_on_from_the_last_finished_shard(small, book, tmp_path, monkeypatch):
    whole = prepare.prepare(options(book, unit="words"), directory=tmp_path / "whole")
    encode, made = encoding.encode, []

    def killed(job, vocabulary, path, counts):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(path)
        return encode(job, vocabulary, path, counts)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(options(book, unit="words"), directory=tmp_path / "out")
    (left,) = (tmp_path / "out").glob("*incomplete*")
    # What does not agree with its checksum is made again.
    with open(left / "train-00002.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x07")
    writer, again = shards.writer, []

    def written(path, dtype):
        again.append(path)
        return writer(path, dtype)

    monkeypatch.setattr(shards, "writer", written)
    monkeypatch.setattr(symbols, "_count", None)  # the words are known
    found = prepare.prepare(options(book, unit="words"), directory=tmp_path / "out")
    names = [os.path.basename(path) for path in again]
    assert names[:2] == ["train-00002.npy", "train-00005.npy"]
    assert found.card == whole.card
    for split, tokens in whole.tokens.items():
        np.testing.assert_array_equal(found.tokens[split], tokens)
    assert [path.name for path in (tmp_path / "out").glob("*incomplete*")] == []


@pytest.mark.parametrize("last", ["everything", "facts", "half a file"])
def test_a_kill_at_the_end_changes_no_card(last, small, book, tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "WORDS", 7)
    text = options(book, unit="words", min_count=1)
    whole = prepare.prepare(text, directory=tmp_path / "whole")
    assert whole.card["count_error"]
    out, write = tmp_path / "out", pathlib.Path.write_text

    def killed(*_):
        raise KeyboardInterrupt

    def cut(path, text, **options):
        write(path, text[:9], **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if last == "half a file":
            patch.setattr(pathlib.Path, "write_text", cut)
        else:
            patch.setattr(shards, "write_index", killed)
        prepare.prepare(text, directory=out)
    (left,) = out.glob("*incomplete*")
    if last == "facts":  # They were the first to be deleted, before there was a card.
        (left / symbols.ABOUT).unlink()
    found = prepare.prepare(text, directory=out)
    assert found.card == whole.card
    assert found.vocabulary.to_json() == whole.vocabulary.to_json()


@pytest.mark.parametrize("what", ["the text", "the tokens"])
def test_no_room_on_the_disk_is_said_before(what, book, tmp_path, monkeypatch, capsys):
    class Usage:
        free = 10

    if what == "the tokens":
        prepare.prepare(options(book), directory=tmp_path)
    monkeypatch.setattr("xlformer.storage.shutil.disk_usage", lambda _: Usage)
    with pytest.raises(UserError, match=f"no room for {what}: it needs"):
        prepare.prepare(options(book, documents=True), directory=tmp_path)
    assert not [path for path in tmp_path.rglob("*incomplete*")]


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_disk_that_is_full_leaves_nothing(number, kind, book, tmp_path, monkeypatch):
    def full(*_):
        # The second as the array_record library says it.
        line = f"write() failed: {os.strerror(number)}; writing train"
        raise OSError(number, os.strerror(number)) if kind is OSError else kind(line)

    monkeypatch.setattr(shards, "writer", full)
    with pytest.raises(UserError, match=f"{tmp_path}: {os.strerror(number)}"):
        prepare.prepare(options(book), directory=tmp_path)
    assert not list(tmp_path.glob("text-*"))


def test_a_step_of_100_gigabytes_costs_what_one_of_10_megabytes_costs(tmp_path):
    """Of sparse files, which take no room."""

    def stream(size):
        files = []
        for i in range(50):
            path = tmp_path / f"{size}-{i}.npy"
            beginning = shards.header(np.dtype(np.uint16), size // 100)
            path.write_bytes(beginning)
            os.truncate(path, len(beginning) + 2 * (size // 100))
            files.append((path, len(beginning), size // 100))
        tokens = shards.Tokens(files, np.uint16, 50_000)
        assert len(tokens) == size // 2
        return Stream(tokens, batch_size=32, segment_length=128)

    def cost(stream):
        times = []
        for step in np.linspace(0, stream.steps_per_epoch - 1, 60).astype(int).tolist():
            begin = time.perf_counter()
            stream.at(step)
            times.append(time.perf_counter() - begin)
        # Other work of a machine only adds: beside a text of 2 GB that another process
        # read, the median was 1.6 ms, and the least 0.1.
        return min(times)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    small, large = stream(10_000_000), stream(100_000_000_000)
    assert cost(large) < 3 * cost(small) + 1e-3
    with pytest.raises(UserError, match="batch_size=16 makes rows of 3,125,000,000"):
        Stream(large._tokens, batch_size=16, segment_length=128)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20_000  # KiB


MEMORY = """
import resource, sys
from xlformer import config, prepare
from xlformer.data import vocabularies
from xlformer.scoring import results, texts, units

def run(path, unit):
    data = config.default_config().data
    data.update(corpus="text", path=path, unit=unit)
    found = prepare.prepare(data, directory=path + ".prepared")
    tokens, _, facts = texts.own_text(found.vocabulary, path)
    results.unigram_entropy(tokens, found.vocabulary.size)
    whole = units.Count(facts["bytes"], facts["words"])
    spans = [(1, len(tokens))]
    units.scored(found.vocabulary, tokens, spans, whole, lines=unit == "words")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large = sys.argv[1:]
print(*[max(run(path, unit) for unit in ("bytes", "words")) for path in (small, large)])
"""


def test_memory_does_not_grow_with_the_text(tmp_path):
    """tests/soak/text_memory.py is its long form."""
    line = " ".join(w.strip() for w in WORDS) + "\n"
    (tmp_path / "small.txt").write_text(line * 9)
    # One long line, so that nothing depends on their ends.
    text = line * 50_000 + line.replace("\n", " ") * 400_000
    (tmp_path / "large.txt").write_text(text)
    size = len(text.encode())
    command = [sys.executable, "-c", MEMORY]
    command += [str(tmp_path / f"{name}.txt") for name in ("small", "large")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    small, large = map(int, run.stdout.split()[-2:])
    assert large - small < 4 * size, (small, large, size)
