"""Making a vocabulary: counting the symbols of a text and ordering them.

A text is counted part by part, and what was counted of two texts that follow each other
adds up to what is counted of both. The memory that this takes is bounded: bytes and
characters are few, and of words those that stand least often are given up, with a
stated error, when there are more than WORDS of them.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xlformer.data import parts, words
from xlformer.data.utf8 import CODE_POINTS, code_points
from xlformer.data.vocabulary import (
    NEWLINE,
    ByteVocabulary,
    CharVocabulary,
    WordVocabulary,
)

# Different words of one's own text that are counted at a time: about 120 bytes each.
WORDS = 1 << 21


class Codes:
    """How often each byte or character stands in a text, and where it stands first."""

    def __init__(self, unit: str):
        self.unit = unit
        size = 256 if unit == "bytes" else CODE_POINTS
        # Ties are broken by first appearance, as Python's Counter does for words;
        # numpy's unique would sort the whole text to find it.
        self.counts, self.first = np.zeros(size, np.int64), np.full(size, -1)
        self.size = 0

    def add(self, part: parts.Part, where: str) -> None:
        if self.unit == "bytes":
            codes = np.frombuffer(part.data, np.uint8)
        else:
            codes = code_points(part.data, where, part.offset)
        here = np.bincount(codes)
        self.counts[: len(here)] += here
        new = np.flatnonzero(here)
        new = new[self.first[new] < 0]
        if new.size:
            place = np.full(len(here), -1)
            # Of a repeated index numpy keeps the last value, so the text is taken
            # backwards: what stays is the first position.
            place[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)
            self.first[new] = self.size + place[new]
        self.size += len(codes)

    def found(self) -> Found:
        codes = np.flatnonzero(self.counts)
        return Found(codes, self.counts[codes], self.first[codes], self.size)

    def follow(self, found: Found) -> None:
        """Takes in what was counted of the text that comes next."""
        self.counts[found.codes] += found.counts
        new = self.first[found.codes] < 0
        self.first[found.codes[new]] = self.size + found.first[new]
        self.size += found.size

    def ordered(self) -> np.ndarray:
        """The codes that were seen, by how often; of equals the earlier comes first."""
        codes = np.flatnonzero(self.counts)
        # lexsort sorts by its last key first.
        return codes[np.lexsort((self.first[codes], -self.counts[codes]))]


class Found(NamedTuple):
    """What Codes has counted, without what does not occur."""

    codes: np.ndarray
    counts: np.ndarray
    first: np.ndarray
    size: int


class Words:
    """How often each word stands in a text, in the order of their first appearance.

    limit: of different words; 0 keeps all. Beyond it the rarest half is forgotten: what
    is found of a word is then too low by at most `error`, and a word that is not found
    stands at most so often.
    """

    def __init__(
        self,
        specials: Sequence[str],
        lower: bool = False,
        limit: int = 0,
        begins: bool = False,
    ):
        self.specials, self.lower, self.limit = specials, lower, limit
        self.begins = begins
        self._specials = {special.encode() for special in specials}
        self._found = words.Numbers(specials[0], lower=lower, begins=begins)
        # Words in UTF-8 are numbered as they appear, and counted by their numbers.
        self._numbers: dict[bytes, int] = {}
        self._counts = np.zeros(1 << 10, np.int64)
        self.total = self.error = 0

    @property
    def counts(self) -> collections.Counter:
        """Of the words in UTF-8, in the order of their first appearance."""
        counts = self._counts[: len(self._numbers)].tolist()
        return collections.Counter(dict(zip(self._numbers, counts, strict=True)))

    def add(self, part: parts.Part, where: str) -> None:
        numbers = self._found.of(part, self._number, where)
        self._add(numbers, 1)
        self.total += len(numbers)
        self._forget()

    def found(self) -> tuple[dict, int, int]:
        return dict(self.counts), self.total, self.error

    def follow(self, found: tuple[dict, int, int]) -> None:
        """Takes in what was counted of the text that comes next."""
        counts, total, error = found
        numbers = np.fromiter(map(self._number, counts), np.int32, len(counts))
        self._add(numbers, np.fromiter(counts.values(), np.int64, len(counts)))
        self.total += total
        self.error += error
        self._forget()

    def _number(self, word: bytes) -> int:
        return self._numbers.setdefault(word, len(self._numbers))

    def _add(self, numbers: np.ndarray, counts) -> None:
        if (more := len(self._numbers) - len(self._counts)) > 0:
            more = np.zeros(more + len(self._counts), np.int64)
            self._counts = np.concatenate([self._counts, more])
        # bincount would go through all that is known for each part of the text.
        np.add.at(self._counts, numbers, counts)

    def _forget(self) -> None:
        # As lossy counting does (Manku and Motwani, 2002).
        known = len(self._numbers)
        if not self.limit or known <= self.limit:
            return
        counts = self._counts[:known]
        least = int(np.partition(counts, known // 2)[known // 2])
        known = zip(self._numbers, counts.tolist(), strict=True)
        kept = {w: n for w, n in known if n > least or w in self._specials}
        self._counts = np.array([*kept.values()], np.int64)
        self._numbers = {word: number for number, word in enumerate(kept)}
        self._found.forget()
        self.error += least


def byte_vocabulary(codes: Codes, newline: str, every: bool) -> ByteVocabulary:
    if newline == "drop":
        # Where newlines are dropped, as in the original's enwik8, they have no id.
        codes.counts[NEWLINE] = 0
    values = codes.ordered()
    if every:
        values = np.concatenate([values, np.setdiff1d(np.arange(256), values)])
    return ByteVocabulary(values.tolist(), codes.counts[values].tolist(), newline)


def char_vocabulary(codes: Codes) -> CharVocabulary:
    values = codes.ordered()
    return CharVocabulary([chr(v) for v in values], codes.counts[values].tolist())


def word_vocabulary(
    counted: Words, min_count: int, max_size: int, unit: str, unknown: str = "<unk>"
) -> WordVocabulary:
    # most_common is stable: ties stay in the order of their first appearance.
    counts = counted.counts
    found = counts.most_common()
    common = (w.decode() for w, n in found if n >= min_count)
    specials = counted.specials
    # `<eos>` gets id 0 and words follow by frequency, as in the original: adaptive
    # cutoffs rely on that order.
    symbols = [*specials, *(word for word in common if word not in specials)]
    # Specials come first and count: a bound cuts words only.
    symbols = symbols[: max_size or None]
    ordered = [counts[symbol.encode()] for symbol in symbols]
    if left_out := counted.total - sum(ordered):
        ordered[symbols.index(unknown)] += left_out
    options = {"eos": specials[0], "unknown": unknown, "begins": counted.begins}
    return WordVocabulary(symbols, ordered, unit, counted.lower, **options)
