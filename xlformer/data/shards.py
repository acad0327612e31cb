"""Token files: written and read block by block, in shards that an index lists.

A shard is an .npy file of numbers. A split of one shard is called train.npy, as all
were before 0.2.0; of more they are train-00000.npy, train-00001.npy, ... The index says
what belongs to a split, with sizes and checksums, and to which corpus it belongs.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from xlformer import strangers
from xlformer.data import ranges
from xlformer.data.documents import temporary
from xlformer.errors import UserError

INDEX = "index.json"
# The format of the index and of what it lists: another number cannot be read.
FORMAT = 1
BLOCK = 1 << 20  # tokens that are read at a time
# Tokens between two that are picked: so few are read along.
NEAR = 64
# Tokens of a text to score that stay in memory.
IN_MEMORY = 1 << 24
UNKNOWN = -1  # the size of a file that no index lists
# What reading JSON that is damaged raises.
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)
SUMS = re.compile("([0-9a-f]{8})*")
NAME = re.compile(r"\w+(-\d{5,})?\.npy")


class Shard(NamedTuple):
    """A file of tokens, as the index lists it."""

    file: str
    tokens: int
    size: int  # bytes
    sha256: str
    # Of each block, so that a part can be read alone; '' in what has only the whole.
    crc32: str = ""


def name(split: str, number: int, count: int) -> str:
    return f"{split}.npy" if count == 1 else f"{split}-{number:05}.npy"


def header(dtype: np.dtype, tokens: int) -> bytes:
    """The beginning of an .npy file, of the same length for any number of tokens."""
    buffer = io.BytesIO()
    about = {"descr": dtype.str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(buffer, about)
    return buffer.getvalue()


@contextlib.contextmanager
def writer(path, dtype: np.dtype):
    """Gives a function that appends ids to a new .npy file; it is there when all are.

    OSError where it cannot be written.
    """
    unfinished, size = f"{path}.part", 0
    with open(unfinished, "wb") as file:
        file.write(header(dtype, 0))

        def write(ids: np.ndarray) -> None:
            nonlocal size
            file.write(np.ascontiguousarray(ids, dtype).data)
            size += len(ids)

        yield write
        file.seek(0)
        file.write(header(dtype, size))
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def checksum(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(path) -> tuple[str, str]:
    """The sha256 of a file, and the crc32 of each of its blocks."""
    digest, sums = hashlib.sha256(), []
    with open(path, "rb") as file:
        while block := file.read(ranges.BLOCK):
            digest.update(block)
            sums.append(ranges.checksums([block]))
    return digest.hexdigest(), "".join(sums)


def write_index(folder, card: dict, shards: dict[str, list[Shard]]) -> None:
    """Lists the shards of each split; the card's checksums say of which corpus."""
    splits = {
        split: {
            "sha256": card["splits"][split]["sha256"],
            "shards": [shard._asdict() for shard in found],
        }
        for split, found in shards.items()
    }
    text = json.dumps({"format": FORMAT, "splits": splits}, indent=1)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def read_index(folder, card: dict) -> dict[str, list[Shard]]:
    """The shards of each split; ValueError or another error where it is damaged.

    Before 0.2.0 there was no index, and one file for each split.
    """
    if not (folder / INDEX).exists():
        about = {split: card["splits"][split] for split in card["splits"]}
        return {
            split: [Shard(f"{split}.npy", x["tokens"], UNKNOWN, x.get("sha256", ""))]
            for split, x in about.items()
        }
    index = strangers.read_json(folder / INDEX, strangers.MOST_OF_TEXT)
    if index["format"] != FORMAT:
        raise ValueError(f"format {index['format']!r}, expected {FORMAT}")
    splits = {}
    for split, about in card["splits"].items():
        if index["splits"][split]["sha256"] != about["sha256"]:
            raise ValueError("it is the index of another corpus")
        splits[split] = [Shard(**shard) for shard in index["splits"][split]["shards"]]
        for shard in splits[split]:
            if not NAME.fullmatch(shard.file):
                raise ValueError(f"{shard.file!r} is no name of a shard")
            if not all(type(x) is int and x >= 0 for x in (shard.tokens, shard.size)):
                raise ValueError(f"the size of {shard.file} is no number")
            blocks = -(-shard.size // ranges.BLOCK)
            found = SUMS.fullmatch(shard.crc32) and len(shard.crc32) // 8
            if found not in (0, blocks):
                raise ValueError(f"the checksums of {shard.file} are not {blocks}")
        if sum(shard.tokens for shard in splits[split]) != about["tokens"]:
            raise ValueError(f"the shards of {split} are not all of it")
    return splits


class Tokens:
    """The tokens of a split in files, read where they are asked for and never kept.

    What a memory map reads stays in the process until the kernel needs the room: a
    process that has gone through a text once would be as large as the text.

    Args:
      files: (path, offset of the first token in bytes, tokens) of each, in order.
      dtype: of the files.
      symbols: an id that is as large is damage, and a UserError.
      reader: of these files in this order, where they are not on a disk.
    """

    def __init__(self, files, dtype, symbols: int, reader: ranges.Remote | None = None):
        self._files = [(path, offset) for path, offset, _ in files]
        self._reader = reader or ranges.Local([path for path, *_ in files])
        # Python's numbers: bisect looks through them five times as fast as numpy.
        self._ends = list(itertools.accumulate(tokens for *_, tokens in files))
        self._raw, self._symbols = np.dtype(dtype), symbols
        self.dtype, self._table = self._raw, None
        self._size = self._ends[-1]
        # All numbers of the dtype may be ids.
        self._is_checked = symbols > np.iinfo(self._raw).max

    @property
    def block(self) -> int:
        """How many tokens an object store is asked for at least."""
        return ranges.BLOCK // self._raw.itemsize

    @property
    def waited(self) -> float:
        """Seconds for which reading has waited for an object store."""
        return self._reader.waited

    def __len__(self) -> int:
        return self._size

    @property
    def shape(self) -> tuple[int]:
        return (self._size,)

    def __getitem__(self, key):
        """numpy's, of slices without a step, of numbers and of arrays of numbers."""
        if isinstance(key, slice):
            start, stop, step = key.indices(self._size)
            found = self.read(start, max(stop, start))
            # Who reads by slices does so in order.
            self.ahead([stop], len(found))
            return found if step == 1 else found[::step]
        if np.ndim(key) == 0:
            place = range(self._size)[key]
            return self.read(place, place + 1)[0]
        index = np.asarray(key)
        # numpy's own rule, which a negative number and one too large fall under.
        if index.size and not -self._size <= index.min() <= index.max() < self._size:
            raise IndexError(f"{index.min()} to {index.max()} of {self._size} tokens")
        return self._pick(np.where(index < 0, index + self._size, index))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.read(0, self._size).astype(dtype or self.dtype, copy=False)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop`, which must lie within."""
        return self.rows([start], stop - start)[0]

    def rows(self, starts, length: int) -> np.ndarray:
        """As many tokens from each of some places on: [places, length]."""
        out = np.empty((len(starts), length), self._raw)
        parts = self._parts((start, start + length) for start in starts)
        self._reader.fill(parts, out.reshape(-1).view(np.uint8).data)
        if not self._is_checked:
            self._check(out, starts)
        return out if self._table is None else self._table[out]

    def ahead(self, starts, length: int) -> None:
        """Has what follows from some places on read meanwhile, where reading waits."""
        if self._reader.reads_ahead:
            spans = ((x, min(x + length, self._size)) for x in starts)
            self._reader.ask(self._parts(spans), ahead=True)

    def check(self) -> None:
        """Looks at all ids; they are not looked at again when they are read."""
        for _ in () if self._is_checked else blocks(self):
            pass
        self._is_checked = True

    def head(self, size: int) -> Tokens:
        """The first of them, which are read from the same files."""
        return self._with(_size=min(size, self._size))

    def translated(self, table: np.ndarray) -> Tokens:
        """The same tokens as other ids: table[id] of each."""
        table = table if self._table is None else table[self._table]
        return self._with(_table=table, dtype=table.dtype)

    def _with(self, **fields) -> Tokens:
        other = Tokens.__new__(Tokens)
        other.__dict__ = self.__dict__ | fields
        return other

    def _parts(self, spans) -> list[ranges.Part]:
        """Where in the files the tokens [start, stop) of some spans are."""
        width, parts = self._raw.itemsize, []
        for place, stop in spans:
            number = bisect.bisect_right(self._ends, place)
            while place < stop:  # over the end of one file into the next
                size = min(stop, self._ends[number]) - place
                before = self._ends[number - 1] if number else 0
                begin = self._files[number][1] + (place - before) * width
                parts.append(ranges.Part(number, begin, size * width))
                place, number = place + size, number + 1
        return parts

    def _pick(self, index: np.ndarray) -> np.ndarray:
        flat = index.ravel()
        out = np.empty(flat.size, self.dtype)
        # Rows of a batch are stretches of the text: each is read at once.
        steps = np.diff(flat)
        cuts = np.flatnonzero((steps < 0) | (steps > NEAR)) + 1
        bounds = [0, *cuts.tolist(), flat.size] if flat.size else []
        pairs = list(zip(bounds, bounds[1:], strict=False))
        spans = [(int(flat[low]), int(flat[high - 1]) + 1) for low, high in pairs]
        if self._reader.reads_ahead:
            self._reader.ask(self._parts(spans), ahead=False)
        for (low, high), (start, stop) in zip(pairs, spans, strict=True):
            out[low:high] = self.read(start, stop)[flat[low:high] - start]
        self.ahead([stop for _, stop in spans], self.block)
        return out.reshape(index.shape)

    def _check(self, ids: np.ndarray, starts) -> None:
        # numpy would take a negative id from the end.
        if not ids.size or 0 <= ids.min() and ids.max() < self._symbols:
            return
        row, column = np.argwhere((ids < 0) | (ids >= self._symbols))[0].tolist()
        number = bisect.bisect_right(self._ends, starts[row] + column)
        path = self._files[number][0]
        raise UserError(
            f"{path}: token id out of range: {ids[row, column]} in a vocabulary of"
            f" {self._symbols}; delete {os.path.dirname(path)} and prepare again"
        )


class Collector:
    """Takes the tokens of a text that grows: in memory, or in a temporary file."""

    def __init__(self, dtype, symbols: int):
        self._dtype, self._symbols = np.dtype(dtype), symbols
        self._parts, self._size, self._file = [], 0, None

    def add(self, ids: np.ndarray) -> None:
        self._parts.append(ids)
        self._size += len(ids)
        if self._file is None and self._size <= IN_MEMORY:
            return
        try:
            self._file = self._file or tempfile.NamedTemporaryFile()  # noqa: SIM115
            for part in self._parts:
                self._file.write(np.ascontiguousarray(part, self._dtype).data)
            self._file.flush()
        except OSError as error:
            raise temporary(error) from error
        self._parts = []

    def tokens(self) -> np.ndarray | Tokens:
        if self._file is None:
            return np.concatenate([np.zeros(0, self._dtype), *self._parts])
        found = Tokens([(self._file.name, 0, self._size)], self._dtype, self._symbols)
        found._kept = self._file  # which is deleted with the last that reads it
        return found


def head(tokens, size: int):
    """The first tokens of an array or of files, without reading them."""
    return tokens.head(size) if isinstance(tokens, Tokens) else tokens[:size]


def blocks(tokens: np.ndarray | Tokens) -> Iterator[np.ndarray]:
    """All tokens, of an array or of files, some at a time."""
    for start in range(0, len(tokens), BLOCK):
        yield tokens[start : start + BLOCK]
