"""Making a vocabulary: counting the symbols of a text and ordering them."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence

import numpy as np

from xlformer.data.vocabulary import (
    NEWLINE,
    ByteVocabulary,
    CharVocabulary,
    WordVocabulary,
    code_points,
    split_words,
)

# All that Unicode has: U+10FFFF is the last.
CODE_POINTS = 0x110000


def count_bytes(
    texts: Iterable[bytes], *, newline: str = "keep", every: bool = True
) -> ByteVocabulary:
    """Counts byte values and orders them, the most common first.

    `every` appends the values that were not seen, so that any prompt can be encoded.
    """
    codes = (np.frombuffer(text, np.uint8) for text in texts)
    counts, first = _count(codes, 256)
    if newline == "drop":
        # Where newlines are dropped, as in the original's enwik8, they have no id.
        counts[NEWLINE] = 0
    values = _by_frequency(counts, first)
    if every:
        rest = np.setdiff1d(np.arange(256), values)
        values = np.concatenate([values, rest])
    return ByteVocabulary(values.tolist(), counts[values].tolist(), newline)


def count_chars(texts: Iterable[bytes], *, where: str = "text") -> CharVocabulary:
    """Counts characters and orders them; a text that is not UTF-8 is a UserError."""
    codes = (code_points(text, where) for text in texts)
    counts, first = _count(codes, CODE_POINTS)
    values = _by_frequency(counts, first)
    return CharVocabulary([chr(v) for v in values], counts[values].tolist())


def count_words(
    texts: Iterable[bytes],
    *,
    specials: Sequence[str] = ("<eos>",),
    min_count: int = 1,
    max_size: int = 0,
    unit: str = "words",
    lower: bool = False,
    where: str = "text",
) -> WordVocabulary:
    """Counts words and orders them after `specials`; the first of these ends each line.

    Words seen fewer than `min_count` times, and those beyond `max_size` symbols in all
    (0: no bound), are left out and counted as `<unk>`, which must be a special then.
    """
    counts = collections.Counter()
    for text in texts:
        for words in split_words(text, specials[0], lower, True, where):
            counts.update(words)
    # most_common is stable: ties stay in the order of their first appearance.
    common = (w for w, n in counts.most_common() if n >= min_count)
    # `<eos>` gets id 0 and words follow by frequency, as in the original: adaptive
    # cutoffs rely on that order.
    symbols = [*specials, *(word for word in common if word not in specials)]
    # Specials come first and count: a bound cuts words only.
    symbols = symbols[: max_size or None]
    ordered = [counts[symbol] for symbol in symbols]
    if left_out := counts.total() - sum(ordered):
        ordered[symbols.index("<unk>")] += left_out
    return WordVocabulary(symbols, ordered, unit, lower, specials[0])


def _count(texts: Iterable[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each code stands in texts, and its first position (-1: nowhere)."""
    # Ties are broken by first appearance, as Python's Counter does for words; numpy's
    # unique would sort the whole text to find it.
    counts, first, base = np.zeros(size, np.int64), np.full(size, -1), 0
    for codes in texts:
        here = np.bincount(codes)
        counts[: len(here)] += here
        new = np.flatnonzero(here)
        new = new[first[new] < 0]
        found = np.full(len(here), -1)
        for start in range(0, len(codes), 1 << 20):
            # Most codes stand in the first block, so that the rest of a text is rarely
            # looked at.
            if not (found[new] < 0).any():
                break
            chunk = codes[start : start + (1 << 20)]
            place = np.full(len(here), -1)
            # Of a repeated index numpy keeps the last value, so the text is taken
            # backwards: what stays is the first position.
            place[chunk[::-1]] = np.arange(start + len(chunk) - 1, start - 1, -1)
            found = np.where(found < 0, place, found)
        first[new] = base + found[new]
        base += len(codes)
    return counts, first


def _by_frequency(counts: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The codes that were seen, by how often; of equals the earlier one comes first."""
    codes = np.flatnonzero(counts)
    # lexsort sorts by its last key first.
    return codes[np.lexsort((first[codes], -counts[codes]))]
