"""Documents cut into parts that can be encoded one by one, in any order.

A part ends behind a newline, else before white space: words and tokens do not go
across. Only what has no white space for LONGEST bytes is cut within a word, and even
that between characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from xlformer.data.documents import Document, of_bytes
from xlformer.data.utf8 import OTHERS, SPACES, as_bytes, whole_characters

# Bytes of a part. 5 MB as 68,880 records, one a line, take about 26 s to read one by
# one; 100 MB in 1,526 records of 64 KiB take 0.16 s (tensorflow-datasets 4.9.10, 2 CPU
# cores).
SIZE = 1 << 18
# Of a part that has no white space: what a word may have.
LONGEST = 1 << 20
WHITE = [bytes([value]) for value in SPACES]


class Part(NamedTuple):
    """A part of a document, and how it hangs together with what is around it."""

    data: bytes
    offset: int = 0  # of its first byte in the document
    in_line: bool = False  # It goes on within a line,
    in_word: bool = False  # and within a word.
    ends: bool = True  # The document ends with it.


def of(text: str | bytes | Document | Part) -> Iterator[Part]:
    """The parts of a document; a part is its own."""
    if isinstance(text, Part):
        yield text
        return
    document = text if isinstance(text, Document) else of_bytes(as_bytes(text))
    offset, in_line, in_word = 0, False, False
    pieces = _pieces(document.blocks())
    piece = next(pieces, None)
    while piece is not None:
        after = next(pieces, None)
        yield Part(piece, offset, in_line, in_word, after is None)
        if after is None:
            return
        offset += len(piece)
        in_line = piece[-1:] != b"\n"
        in_word = piece[-1:] not in WHITE and after[:1] not in WHITE
        piece = after


def _pieces(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        rest, start = rest + block if rest else block, 0
        while len(rest) - start > SIZE:
            stop = _end(rest, start)
            if not stop:  # The next block may have white space.
                break
            yield rest[start:stop]
            start = stop
        rest = rest[start:]
    while len(rest) > SIZE and (stop := _end(rest, 0)):
        yield rest[:stop]
        rest = rest[stop:]
    if rest:
        yield rest


def _end(data: bytes, start: int) -> int:
    """Where a part that begins at `start` ends; 0 where more must be read first."""
    limit = start + SIZE
    if stop := data.rfind(b"\n", start, limit) + 1:
        return stop
    # Not at the very beginning, where the part before was cut. Before a space rather
    # than a tab: to the rest of a line a tokenizer may add a space, and a space that is
    # there can be left out for it.
    for whites in ([b" "], WHITE):
        stop = max(data.rfind(white, start + 1, limit) for white in whites)
        if stop > 0:
            return stop
    # A word that is longer than a part stays whole.
    limit = start + LONGEST
    found = [data.find(white, start + SIZE, limit) for white in WHITE]
    if stop := min((place for place in found if place > 0), default=0):
        return stop + (data[stop : stop + 1] == b"\n")
    if len(data) < limit:
        return 0
    # What is left of white space is Unicode's, at which words are cut, too.
    if (stop := max(data.rfind(space, start + 1, limit) for space in OTHERS)) > 0:
        return stop
    return start + whole_characters(data[start:limit])
