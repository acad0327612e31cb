"""How many bytes and words of the text the scored tokens stand for.

Bits per byte and perplexity per word divide by these: what was not scored (the first
token; with --warmup=none the gaps between the rows; newlines that were dropped) does
not count. A token stands for the bytes that it spells; a word counts where it begins.

What a token spells is known of bytes and characters. Words and pieces are spelled as
their vocabulary would write them, and the whole split is compared with what preparation
has counted in the raw text. Where the two differ, because white space was lost or words
are unknown, only the whole is known, and of a part nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from xlformer.data.pieces import PieceVocabulary
from xlformer.data.utf8 import IS_SPACE
from xlformer.data.vocabulary import (
    ByteVocabulary,
    CharVocabulary,
    Vocabulary,
    WordVocabulary,
)

BLOCK = 1 << 17  # tokens that are spelled at a time


class Count(NamedTuple):
    """What is known of a text; the rest is None."""

    bytes: int | None
    words: int | None


def scored(
    vocabulary: Vocabulary,
    tokens: np.ndarray,
    spans: list[tuple[int, int]],
    whole: Count,
    *,
    lines: bool,
    documents: np.ndarray | None = None,
) -> Count:
    """What the tokens of some spans stand for.

    Args:
      vocabulary: of the tokens.
      tokens: of the whole split.
      spans: [start, stop) of scored tokens, which do not overlap.
      whole: the split's bytes and words, as counted in its raw text.
      lines: whether the end of a line counts as a word.
      documents: where each begins, if that is known; no word goes on from one into the
        next.
    """
    size = len(tokens)
    spell = _spelling(vocabulary)
    unk_id = getattr(vocabulary, "unk_id", None)

    def count(spans) -> Count:
        bytes_, words, known = 0, 0, True
        for start, stop in spans:
            for ids, before in _blocks(tokens, start, stop, documents):
                text = spell(ids, before)
                known = known and not (unk_id is not None and (ids == unk_id).any())
                bytes_ += len(text)
                words += _words(text, b"" if before is None else spell([before], None))
                words += lines * text.count(b"\n")
        return Count(bytes_ if known else None, words)

    # The whole split is spelled too, to compare it with what preparation counted.
    here, all_, first = count(spans), count([(0, size)]), count([(0, 1)])
    last_is_scored = any(stop == size for _, stop in spans)
    but_the_first = sum(stop - start for start, stop in spans) == size - 1
    symbols = _is_exact(vocabulary)
    # Of several documents it need not be the last whose last line was closed.
    spare = 1 if documents is None or len(documents) < 2 else 0

    def settle(here, all_, first, whole):
        # If the spelling of the whole split is right, so is that of its parts. If not,
        # all but the first token is the one part that can be told: by a difference.
        if whole is not None and all_ is not None and abs(whole - all_) <= spare:
            # Preparation closes a last line that has no newline.
            return here + (whole - all_) * last_is_scored
        if whole is None or first is None or not but_the_first:
            return None
        return whole - first

    return Count(
        here.bytes
        if symbols
        else settle(here.bytes, all_.bytes, first.bytes, whole.bytes),
        settle(here.words, all_.words, first.words, whole.words),
    )


def _blocks(tokens, start, stop, documents) -> Iterator[tuple]:
    """Yields ids and the id before them: None where the text or a document begins."""
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        ids = np.asarray(tokens[max(first - 1, 0) : last])
        ids, before = (ids[1:], int(ids[0])) if first else (ids, None)
        begins = [] if documents is None else _within(documents, first, last)
        if begins and begins[0] == first:
            begins, before = begins[1:], None
        cuts = [first, *begins, last]
        for low, high in zip(cuts, cuts[1:], strict=False):
            yield ids[low - first : high - first], before
            before = None  # A document begins there.


def _within(documents: np.ndarray, start: int, stop: int) -> list[int]:
    """Where documents begin from start on, before stop; each place once."""
    low, high = np.searchsorted(documents, [start, stop])
    return sorted(set(documents[low:high].tolist()))


def _words(text: bytes, before: bytes) -> int:
    """Counts where words begin between white space, as preparation does."""
    # By their beginnings, so that a word which goes on from a block into the next is
    # counted once.
    codes = np.frombuffer(before[-1:] or b" ", np.uint8)
    space = IS_SPACE[np.concatenate([codes, np.frombuffer(text, np.uint8)])]
    return int(np.count_nonzero(space[:-1] & ~space[1:]))


def _is_exact(vocabulary: Vocabulary) -> bool:
    """Whether nothing of the text is lost in its tokens (or only dropped newlines)."""
    return isinstance(vocabulary, ByteVocabulary | CharVocabulary) or (
        isinstance(vocabulary, WordVocabulary) and vocabulary.unit == "chars"
    )


def _spelling(vocabulary: Vocabulary) -> Callable:
    """(ids, the id before them or None) -> the bytes that they spell."""
    if isinstance(vocabulary, ByteVocabulary):
        return lambda ids, before: vocabulary.decode(ids)
    if isinstance(vocabulary, CharVocabulary):
        return lambda ids, before: vocabulary.decode(ids).encode("utf-8")
    if isinstance(vocabulary, PieceVocabulary):
        table, joined = vocabulary.spelled(), vocabulary.joined
    elif vocabulary.unit == "chars":  # between spaces, which are not the text's own
        spaces = {"_": " ", vocabulary.eos: "\n"}
        table = [spaces.get(s, s).encode("utf-8") for s in vocabulary.symbols]
        joined = False
    else:
        # How words were separated is lost: one space each is as good as any, where the
        # comparison with the raw text holds.
        table = [f" {symbol}".encode() for symbol in vocabulary.symbols]
        table[vocabulary.eos_id] = b"\n"
        joined = True
    begins = getattr(vocabulary, "begins", False)

    def spell(ids, before):
        text = b"".join(map(table.__getitem__, np.asarray(ids).tolist()))
        if not joined:
            return text
        if before is None and begins and text[:1] == b"\n":
            text = text[1:]  # It is no line's end.
        # The first word of a line has no space before it.
        text = text.replace(b"\n ", b"\n")
        is_first = before is None or table[before].endswith(b"\n")
        return text[1:] if is_first and text[:1] == b" " else text

    return spell
