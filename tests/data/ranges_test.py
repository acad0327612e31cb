"""Tokens of an object store: the same batches, few bytes, errors that go by or stay."""

import json
import shutil
import threading
import time
import zlib

import numpy as np
import pytest

from xlformer import command, config, prepare, storage
from xlformer.data import (
    corpora,
    folders,
    parts,
    prepared,
    ranges,
    shards,
)
from xlformer.data.stream import Stream
from xlformer.errors import UserError, WorthAnotherTry

TOKENS = np.random.default_rng(3).integers(0, 251, 9973).astype(np.uint16)
SHARDS = (2003, 4001, 3969)
BLOCK = 257


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ranges, "BLOCK", BLOCK)
    monkeypatch.setattr(ranges, "ROOM", 4 * BLOCK)
    monkeypatch.setattr(ranges, "TOGETHER", 3)
    monkeypatch.setattr(ranges, "HELD", 5)


class Store:
    """Files in memory, whose ranges are counted; `spoil` is called before each."""

    def __init__(self):
        self.files, self.ranges = {}, []
        self.spoil = lambda path, data: data

    def fetch(self, path, start, stop):
        self.ranges.append((path, start, stop))
        return self.spoil(path, self.files[path][start:stop])

    def tokens(self, symbols=251):
        """TOKENS in shards."""
        dtype, begin, listed, stored = TOKENS.dtype, 0, [], []
        for number, size in enumerate(SHARDS):
            head = shards.header(dtype, size)
            data = head + TOKENS[begin : begin + size].tobytes()
            path, begin = f"gs://bucket/{number}.npy", begin + size
            self.files[path] = data
            blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
            stored.append(ranges.Stored(path, len(data), ranges.checksums(blocks)))
            listed.append((path, len(head), size))
        self.reader = ranges.Remote(stored, self.fetch)
        return shards.Tokens(listed, dtype, symbols, self.reader)

    def settle(self):
        """Waits for what was asked for ahead."""
        for future in list(self.reader._blocks.values()):
            future.exception()


@pytest.fixture
def store():
    return Store()


def stream(tokens, **fields):
    return Stream(tokens, **({"batch_size": 6, "segment_length": 13} | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"extended_length": 5},
        {"rows": [1, 4]},
        {"variable_length": True},
        {"segment_length": 400},
    ],
)
def test_a_batch_is_that_of_the_array_in_any_order(fields, store):
    one, two = stream(TOKENS, **fields), stream(store.tokens(), **fields)
    steps = [0, 1, 2, one.steps_per_epoch - 1, one.steps_per_epoch, 3, 1, 0]
    for step in steps:
        for (name, x), y in zip(
            one.at(step).items(), two.at(step).values(), strict=True
        ):
            np.testing.assert_array_equal(x, y, err_msg=name)


def test_all_that_reads_tokens_reads_these(store):
    tokens = store.tokens()
    np.testing.assert_array_equal(tokens, TOKENS)
    np.testing.assert_array_equal(np.concatenate([*shards.blocks(tokens)]), TOKENS)
    index = np.random.default_rng(1).integers(0, len(TOKENS), (3, 11))
    np.testing.assert_array_equal(tokens[index], TOKENS[index])
    np.testing.assert_array_equal(tokens[990:2010:3], TOKENS[990:2010:3])
    assert tokens[-1] == TOKENS[-1] and len(tokens[5:5]) == 0
    table = np.arange(251)[::-1].astype(np.int32)
    other = tokens.head(1500).translated(table)
    np.testing.assert_array_equal(other, table[TOKENS[:1500]])
    with pytest.raises(UserError, match="0.npy: token id out of range: 250"):
        np.asarray(store.tokens(symbols=250))


def test_the_next_steps_are_fetched_before_they_are_read(store, monkeypatch):
    monkeypatch.setattr("xlformer.data.stream.WINDOW", 26)
    found = stream(store.tokens())
    found.at(0)
    waited = found.waited
    assert waited > 0
    store.settle()
    for step in range(1, found.steps_per_epoch + 3):  # into the next epoch
        found.at(step)
        assert found.waited == waited
        store.settle()
    assert stream(TOKENS).waited == 0


def test_the_buffer_is_bounded_but_has_room_for_all_rows(store, monkeypatch):
    np.asarray(store.tokens())
    assert len(store.reader._blocks) == 2 * len(SHARDS)
    monkeypatch.setattr("xlformer.data.stream.WINDOW", 26)
    found = stream(store.tokens(), batch_size=50)
    for step in range(found.steps_per_epoch):
        found.at(step)
    # Nothing that was read ahead was gone before it was used.
    assert store.reader.fetched == sum(map(len, store.files.values()))


def test_a_host_fetches_its_rows_and_no_others(store, monkeypatch):
    monkeypatch.setattr("xlformer.data.stream.WINDOW", 260)
    fetched, needed = [], []
    for rows in ([0, 1, 2], [3, 4, 5], range(6)):
        found = stream(store.tokens(), rows=np.array(rows))
        for step in range(found.steps_per_epoch):
            found.at(step)
        store.settle()
        fetched.append(store.reader.fetched)
        needed.append(2 * len(rows) * found.row_length)
        # The first and the last block of a row are also others', and so are those at
        # the end of a shard; the next epoch's first is fetched by the end of this one.
        assert needed[-1] < fetched[-1] < needed[-1] + 5 * BLOCK * len(rows)
        if len(fetched) == 1:  # up to the block where the third row ends
            end = 128 + 2 * (3 * found.row_length - SHARDS[0])
            assert max(store.ranges)[0] == "gs://bucket/1.npy"
            assert max(store.ranges)[2] == -(-end // BLOCK) * BLOCK
    assert abs(fetched[0] / fetched[2] - 0.5) < 0.1
    assert abs(fetched[1] / fetched[2] - 0.5) < 0.1


def test_blocks_side_by_side_are_one_range(store):
    tokens = store.tokens()
    tokens.read(0, 3 * BLOCK // 2 - 64)  # with the header: three blocks
    assert store.ranges == [("gs://bucket/0.npy", 0, 3 * BLOCK)]


def test_what_fails_twice_is_fetched_with_growing_pauses(store, monkeypatch):
    pauses, left = [], [OSError("reset"), RuntimeError("503")]
    monkeypatch.setattr(ranges.time, "sleep", pauses.append)

    def spoil(path, data):
        if left:
            raise left.pop()
        return data

    tokens = store.tokens()
    store.spoil = spoil
    np.testing.assert_array_equal(tokens.read(0, 20), TOKENS[:20])
    assert len(store.ranges) == 3 and pauses == [0.5, 1.0]
    # An answer that is cut is no answer.
    cut = [1, 1]
    store.spoil = lambda path, data: data[:-1] if cut and cut.pop() else data
    np.testing.assert_array_equal(tokens.read(900, 920), TOKENS[900:920])
    assert not cut and len(pauses) == 4


def test_what_always_fails_is_one_line_and_exit_code_1(store, monkeypatch, capsys):
    pauses = []
    monkeypatch.setattr(ranges.time, "sleep", pauses.append)

    def spoil(path, data):
        raise OSError("connection\nreset")

    found = stream(store.tokens(), rows=[0])
    store.spoil = spoil
    assert command.run(lambda _: found.at(0) and 0) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: gs://bucket/0.npy: bytes 0 to ")
    assert line.endswith("cannot be read, tried 5 times: connection reset")
    assert pauses[:4] == [0.5, 1.0, 2.0, 4.0]
    # It is not remembered, and no other range is tried for minutes.
    store.spoil = lambda path, data: data
    np.testing.assert_array_equal(found.at(0)["inputs_BT"][0], TOKENS[:13])
    monkeypatch.setattr(ranges, "LONGEST", -1.0)
    store.spoil = spoil
    with pytest.raises(WorthAnotherTry, match="tried 1 times"):
        store.tokens().read(0, 1)


def test_a_spoilt_block_is_fetched_once_more_then_one_line(store):
    tokens, spoilt = store.tokens(), [1]

    def spoil(path, data):
        if not spoilt or not spoilt.pop():
            return data
        return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]

    store.spoil = spoil
    np.testing.assert_array_equal(tokens.read(0, 400), TOKENS[:400])
    assert len(store.ranges) == 3 and not spoilt
    data = bytearray(store.files["gs://bucket/1.npy"])
    data[BLOCK + 3] ^= 4
    store.files["gs://bucket/1.npy"] = bytes(data)
    with pytest.raises(UserError, match="1.npy: bytes 257 to 514 do not") as caught:
        tokens.read(2100, 2110)
    assert not isinstance(caught.value, WorthAnotherTry)
    assert "delete gs://bucket and prepare again" in str(caught.value)


def test_a_file_that_goes_is_not_tried_again(store):
    tokens = store.tokens()

    def gone(path, data):
        raise FileNotFoundError(path)

    store.spoil = gone
    with pytest.raises(UserError, match="0.npy is not there any more"):
        tokens.read(0, 1)
    assert len(store.ranges) == 1


def test_what_somebody_waits_for_goes_before_what_is_read_ahead(store, monkeypatch):
    monkeypatch.setattr(ranges, "_begin", lambda: None)
    jobs = ranges.queue.PriorityQueue()
    monkeypatch.setattr(ranges, "_jobs", jobs)
    tokens = store.tokens()
    tokens.ahead([3000], 10)
    reading = threading.Thread(target=tokens.read, args=(0, 10))
    reading.start()
    while jobs.qsize() < 2:
        time.sleep(0.001)
    for _ in range(2):
        jobs.get()[-1]()
    reading.join()
    assert [path[-5:] for path, *_ in store.ranges] == ["0.npy", "1.npy"]


# Prepared folders ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a corpus of several shards."""
    folder = tmp_path_factory.mktemp("made")
    path = folder / "book.txt"
    path.write_text("to be or not to be\n" * 200)
    data = config.default_config().data
    data.update(corpus="text", path=str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "BLOCK", BLOCK)
        patch.setattr(parts, "SIZE", 101)
        patch.setattr(corpora, "SHARD", 997)
        return prepare.prepare(data, directory=folder).directory


@pytest.fixture
def book(made, tmp_path):
    """A copy of it, which stands for what lies in a bucket."""
    folder = tmp_path / "bucket" / "corpus"
    shutil.copytree(made, folder)
    return prepared.load(folder)


def copied(book, tmp_path):
    copy = folders.complete(tmp_path / "copy" / "corpus", None, book.directory)
    return copy, prepared.load(copy, book.directory)


def test_the_index_has_a_checksum_of_each_block(book):
    index = json.loads((book.directory / shards.INDEX).read_text())
    for shard in index["splits"]["train"]["shards"]:
        data = (book.directory / shard["file"]).read_bytes()
        sums = [zlib.crc32(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)]
        assert shard["crc32"] == "".join(f"{x:08x}" for x in sums)


def test_shards_are_read_where_they_lie(book, tmp_path, capsys):
    copy, found = copied(book, tmp_path)
    names = {path.name for path in copy.iterdir()}
    assert names == {"card.json", "index.json", "vocabulary.json"}
    assert not folders.damaged(copy, by_ranges=True)
    for split, tokens in book.tokens.items():
        np.testing.assert_array_equal(found.tokens[split], tokens)
    # A host that has made them reads its own.
    again = prepared.load(book.directory, "gs://bucket/elsewhere")
    np.testing.assert_array_equal(again.tokens["train"], book.tokens["train"])
    assert capsys.readouterr().err == ""


def without_sums(folder):
    index = json.loads((folder / shards.INDEX).read_text())
    for about in index["splits"].values():
        for shard in about["shards"]:
            del shard["crc32"]
    (folder / shards.INDEX).write_text(json.dumps(index))


def test_what_has_no_checksums_of_blocks_is_copied_with_one_line(
    book, tmp_path, capsys
):
    without_sums(book.directory)
    for _ in range(2):  # the second finds it copied
        copy, found = copied(book, tmp_path)
        np.testing.assert_array_equal(found.tokens["train"], book.tokens["train"])
        assert len(list(copy.glob("train-*.npy"))) > 3
    line = f"xlformer: {book.directory} has no checksums of blocks: it is copied whole"
    assert capsys.readouterr().err.splitlines() == [line]
    (copy / "train-00001.npy").unlink()
    copied(book, tmp_path)
    assert (copy / "train-00001.npy").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "train-00001.npy").unlink(), "train-00001.npy: .* no such"),
        (lambda f: cut(f / "train-00001.npy"), r"train-00001.npy: .*\d+ bytes, found"),
        (shutil.rmtree, "no such file"),
    ],
)
def test_what_is_not_there_is_said_at_the_start(spoil, message, book, tmp_path):
    copied(book, tmp_path)
    spoil(book.directory)
    with pytest.raises(UserError, match=message) as caught:
        copied(book, tmp_path)
    assert not isinstance(caught.value, WorthAnotherTry)


def test_a_store_that_does_not_answer_is_worth_another_try(book, tmp_path, monkeypatch):
    def fail(_):
        raise RuntimeError("503")

    monkeypatch.setattr(storage, "sizes", fail)
    with pytest.raises(WorthAnotherTry, match="bucket/corpus: not listed: 503"):
        copied(book, tmp_path)


@pytest.mark.parametrize(
    "error, kind",
    [
        (RuntimeError("503"), WorthAnotherTry),
        (FileNotFoundError("train"), UserError),
        (OSError(28, "No space left on device"), UserError),
    ],
)
def test_copying_fails_with_one_line(error, kind, book, tmp_path, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr(storage, "is_remote", lambda _: True)
    monkeypatch.setattr(folders, "_by_ranges", fail)
    with pytest.raises(kind, match="bucket/corpus: not copied to .*: ") as caught:
        copied(book, tmp_path)
    assert type(caught.value) is kind and str(error) in str(caught.value)


@pytest.mark.parametrize("sums", [7, "0", "0" * 8, "G" * 8, None])
def test_checksums_that_are_none_are_damage(sums, book):
    index = json.loads((book.directory / shards.INDEX).read_text())
    index["splits"]["test"]["shards"][0]["crc32"] = sums
    (book.directory / shards.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="index.json: "):
        prepared.load(book.directory)
