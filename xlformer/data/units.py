"""Where the units of a text begin: bytes, characters, words.

A text is counted block by block, and a unit of any number is found again.
"""

from __future__ import annotations

import array
import bisect

import numpy as np

from xlformer.data.documents import BLOCK, Document
from xlformer.data.utf8 import IS_SPACE, WHITE


class Units:
    """Where the units of several documents begin, counted block by block."""

    def __init__(self, unit: str):
        self.unit, self.total = unit, 0
        # Of each block: the units before it, and where it begins in the joined text.
        self._before, self._places = array.array("q"), array.array("q")
        self._documents: list[Document] = []
        self._firsts = array.array("q")  # the first block of each document
        self._size, self._inside = 0, False

    def add_document(self, document: Document, units: int | None = None) -> None:
        """The next document, whose blocks follow; of bytes every one is a unit."""
        self._documents.append(document)
        self._firsts.append(len(self._before))
        # A word does not run on from the end of a file into the next one.
        self._inside = False
        if units is not None:
            self._note(len(document), len(document))

    def add(self, block: bytes) -> None:
        self._note(int(np.count_nonzero(self._starts(block))), len(block))

    def place(self, number: int) -> int:
        """The position of the unit of that number in the joined documents."""
        i = bisect.bisect_right(self._before, number) - 1
        inside = number - self._before[i]
        if self.unit == "bytes":
            return self._places[i] + inside
        document = bisect.bisect_right(self._firsts, i) - 1
        place = self._places[i]
        begin = place - self._places[self._firsts[document]]
        self._inside = begin > 0 and self._is_inside(self._documents[document], begin)
        # Counted again, in smaller blocks than it was read in.
        for piece in self._documents[document].part(begin, begin + BLOCK).blocks():
            starts = np.flatnonzero(self._starts(piece))
            if inside < len(starts):
                return place + int(starts[inside])
            inside -= len(starts)
            place += len(piece)
        raise AssertionError(f"unit {number} of {self.total} is nowhere")

    def _note(self, units: int, size: int) -> None:
        self._before.append(self.total)
        self._places.append(self._size)
        self.total += units
        self._size += size

    def _starts(self, block: bytes) -> np.ndarray:
        """True at every byte where a unit begins."""
        data = np.frombuffer(block, np.uint8)
        if self.unit == "chars":
            # In UTF-8 every byte but the first of a character is 10xxxxxx.
            return (data & 0xC0) != 0x80
        inside = ~np.frombuffer(block.translate(WHITE), bool)
        starts = inside.copy()
        starts[1:] &= ~inside[:-1]
        if len(block):
            starts[0] &= not self._inside
            self._inside = bool(inside[-1])
        return starts

    def _is_inside(self, document: Document, place: int) -> bool:
        """Whether the byte before a place belongs to a word."""
        before = document.part(place - 1, place).read()
        return not IS_SPACE[before[0]]
