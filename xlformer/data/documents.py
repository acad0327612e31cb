"""Texts as documents that are read in blocks, so that no text has to fit into memory.

A document is a part of a source, which can be read as often as needed: a file, a pipe
that was copied, a member of an archive. What is read again must be what was read
before: a file that has changed meanwhile is a UserError.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import BinaryIO

from xlformer import storage
from xlformer.errors import UserError, reason

BLOCK = 1 << 20  # bytes that are read at a time
# The line end of old Macintosh files. In \r\n the newline is there already.
LONE_RETURN = re.compile(rb"\r(?!\n)")

# What a damaged archive raises.
UNREADABLE = (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError)
# These names are another file in each process, and in a resumed run.
OF_A_PROCESS = ("/dev/stdin", "/dev/fd/", "/proc/")


class Source:
    """Bytes that are in memory already; the other sources are read piece by piece."""

    __slots__ = ("_data", "name", "size")

    def __init__(self, name: str, data: bytes):
        self.name, self.size, self._data = name, len(data), data

    def pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """Yields bytes `start` to `stop` in blocks."""
        for place in range(start, stop, BLOCK):
            yield self._data[place : min(place + BLOCK, stop)]


class File(Source):
    """A file, local or remote, which must stay as it is found."""

    __slots__ = ("_found", "_path")

    def __init__(self, path: str, name: str):
        self.name, self._path, self._found = name, path, _state(path)
        self.size = self._found[0]

    def pieces(self, start, stop):
        with _opened(self._path) as file:
            self._check()
            file.seek(start)
            while start < stop:
                block = file.read(min(BLOCK, stop - start))
                if not block:
                    raise _changed(self.name)
                start += len(block)
                yield block
        self._check()

    def _check(self) -> None:
        if _state(self._path) != self._found:
            raise _changed(self.name)


class Copied(Source):
    """What can be read only once, kept in a temporary file without a name."""

    __slots__ = ("_file",)

    def __init__(self, name: str, read: Callable[[int], bytes], folder=None):
        self.name, self.size, self._file = name, 0, None
        # Deleted by the kernel with its last descriptor, however the process ends.
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        while block := read(BLOCK):
            self.size += len(block)
            try:
                self._file.write(block)
                self._file.flush()
            except OSError as error:
                raise temporary(error, folder) from error

    def pieces(self, start, stop):
        while start < stop:
            block = os.pread(self._file.fileno(), min(BLOCK, stop - start), start)
            start += len(block)
            yield block

    def __del__(self):
        if self._file is not None:
            self._file.close()


class Member(Source):
    """A file in an archive. Nothing is unpacked: no path in it can lead anywhere."""

    __slots__ = ("_open",)

    def __init__(self, name: str, size: int, open_: Callable):
        self.name, self.size, self._open = name, size, open_

    def pieces(self, start, stop):
        with self._open() as file:
            file.seek(start)
            while start < stop:
                try:
                    block = file.read(min(BLOCK, stop - start))
                except UNREADABLE as error:
                    line = f"{self.name}: cannot be read: {reason(error)}"
                    raise UserError(line) from None
                if not block:
                    raise _changed(self.name)
                start += len(block)
                yield block


class Joined(Source):
    """Documents that follow each other, as one text."""

    __slots__ = ("_documents",)

    def __init__(self, name: str, documents: list[Document]):
        self.name, self.size = name, sum(map(len, documents))
        self._documents = documents

    def pieces(self, start, stop):
        base = 0
        for document in self._documents:
            yield from document.part(start - base, stop - base).blocks()
            base += len(document)


class Document:
    """Bytes `start` to `stop` of a source.

    returns: a carriage return that no newline follows is read as a newline.
    """

    __slots__ = ("returns", "source", "start", "stop")

    def __init__(self, source: Source, start: int, stop: int, returns: bool = False):
        self.source, self.start, self.stop = source, start, stop
        self.returns = returns

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> Document:
        """The same text between two places, counted from its own beginning."""
        low = min(self.start + max(start, 0), self.stop)
        high = max(min(self.start + stop, self.stop), low)
        return Document(self.source, low, high, self.returns)

    def blocks(self) -> Iterator[bytes]:
        if not self.returns:
            yield from self.source.pieces(self.start, self.stop)
            return
        # One byte further: whether a newline follows a return may be said behind the
        # document's end, where a text was cut between the two.
        beyond = min(self.stop + 1, self.source.size)
        left, held = len(self), b""
        for piece in self.source.pieces(self.start, beyond):
            piece = held + piece
            held = piece[-1:] if piece[-1:] == b"\r" else b""
            piece = LONE_RETURN.sub(b"\n", piece[: len(piece) - len(held)])[:left]
            left -= len(piece)
            if piece:
                yield piece
        if held and left:
            yield b"\n"

    def read(self) -> bytes:
        """The whole document, where it is known to be small."""
        return b"".join(self.blocks())


@dataclasses.dataclass(frozen=True)
class Text:
    """A raw corpus: each split is a list of documents.

    Of a corpus that is larger than memory it may be anything that yields them, once
    and when they are asked for: only data/corpora.py goes through it. Then `expected`
    says how many bytes there are, more or less.
    """

    splits: Mapping[str, Iterable[Document]]
    # For the card: checksums of the sources, what was not pinned, ... It may be filled
    # while the documents are read.
    facts: dict
    expected: int = 0

    @property
    def size(self) -> int:
        return self.expected or sum(
            len(d) for documents in self.splits.values() for d in documents
        )


def of_bytes(data: bytes, name: str = "text") -> Document:
    """A document that is in memory."""
    return Document(Source(name, data), 0, len(data))


def source(path: str, name: str | None = None) -> Source:
    """What lies at a path, called `name` in errors; '-' is standard input."""
    name = name or path
    if is_read_once(path):
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            return Copied(name, file.read)
    return File(path, name)


def is_read_once(name: str) -> bool:
    """Whether a name is that of a pipe, or of another file in each process."""
    if name == "-" or name.startswith(OF_A_PROCESS):
        return True
    if "://" in name or not os.path.exists(name):
        return False
    return not (os.path.isfile(name) or os.path.isdir(name))


def cut(documents: Iterable[Document], bounds: list[int]) -> list[list[Document]]:
    """Cuts the joined documents at offsets; a cut document goes on as a new one."""
    parts = [[] for _ in bounds[1:]]
    base = 0
    for document in documents:
        for part, low, high in zip(parts, bounds, bounds[1:], strict=False):
            piece = document.part(low - base, high - base)
            if piece:
                part.append(piece)
        base += len(document)
    return parts


def check_not_empty(splits: Mapping[str, list[Document]], origin: str) -> None:
    """Raises UserError naming the split that has no text."""
    for split, found in splits.items():
        if not any(found):
            raise UserError(f"{origin}: the text is empty: split {split!r}")


def temporary(error: OSError, folder=None) -> UserError:
    """What is said where a temporary file cannot be written."""
    if folder:
        return UserError(f"{folder}: {error.strerror}: a temporary file has no room")
    folder = tempfile.gettempdir()
    line = f"{folder}: {error.strerror}: TMPDIR names another place for such files"
    return UserError(line)


def _opened(path: str) -> BinaryIO:
    if storage.is_remote(path):
        return storage.path(path).open("rb")
    # A fifth of the time that etils takes, which shows where a text is many files.
    return open(os.path.expanduser(path), "rb")


def _state(name: str) -> tuple:
    """What tells that a file has changed: its size, and when it was written."""
    if storage.is_remote(name):
        found = storage.path(name).stat()
        return found.length, found.mtime
    found = os.stat(os.path.expanduser(name))
    return found.st_size, found.st_mtime_ns


def _changed(name: str) -> UserError:
    return UserError(f"{name} has changed while it was read: start again")
