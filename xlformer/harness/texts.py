"""What a task asks about, as tokens: where texts begin, and where they part."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from xlformer.data.vocabulary import Vocabulary
from xlformer.errors import UserError

SHOWN = 40  # characters of a text that an error shows


class Text(NamedTuple):
    """Tokens, of which those from `first` on are scored."""

    ids_N: np.ndarray
    first: int


class Texts:
    """Encodes texts, each as one that begins behind the end of a line.

    The first token of a text must follow something, or it has no probability; a stream
    of text has lines before it, so the end of a line is what a model knows there (a
    space, where the vocabulary has no line ends).

    Attributes:
      prefix: that token, or nothing where there is none.
    """

    def __init__(self, vocabulary: Vocabulary, prefix: bool = True):
        self._vocabulary = vocabulary
        # Such a vocabulary begins each text by itself.
        self._begins = bool(getattr(vocabulary, "begins", False))
        found = _line_end(vocabulary) if prefix or self._begins else []
        self.prefix = np.array(found, vocabulary.dtype)

    def encode(self, text: str, where: str, *, close_line: bool = False) -> np.ndarray:
        """The tokens of a text alone; UserError names `where` and what is unknown."""
        ids = self._vocabulary.encode(text, close_line=close_line, where=where)
        return ids[1:] if self._begins else ids

    def document(self, text: str, where: str) -> Text:
        """A whole text, whose last line ends as that of a file does."""
        ids_N = self.encode(text, where, close_line=True)
        return Text(self._begun(ids_N), max(1, len(self.prefix)))

    def pair(self, context: str, continuation: str, where: str) -> Text:
        """A text of two parts, the second of which is scored.

        Both are encoded as one: of words that have a space between them nothing else is
        right. Scored are all tokens that the context alone does not begin with, so that
        what a text is worth is the sum of its parts, wherever tokens end where it is
        parted; a word that the continuation completes counts with that.
        """
        ids_N = self.encode(context + continuation, where)
        shared = _shared(self.encode(context, where), ids_N)
        if shared == len(ids_N) and continuation.strip():
            raise UserError(
                f"{where}: nothing of {continuation!r:.{SHOWN}} is left in the tokens "
                f"of this vocabulary, {self._vocabulary.size} {self._vocabulary.unit}"
            )
        first = len(self.prefix) + shared
        if not first and len(ids_N):
            raise UserError(
                f"{where}: {continuation!r:.{SHOWN}} has nothing before it, and its "
                "first token no probability: the context is empty and there is no "
                "prefix"
            )
        return Text(self._begun(ids_N), first)

    def prompt(self, context: str, where: str) -> np.ndarray:
        """A text that is to be continued."""
        ids_N = self._begun(self.encode(context, where))
        if not len(ids_N):
            raise UserError(
                f"{where}: nothing to continue: the context is empty and there is no "
                "prefix"
            )
        return ids_N

    def _begun(self, ids_N: np.ndarray) -> np.ndarray:
        return np.concatenate([self.prefix, ids_N])


def _line_end(vocabulary: Vocabulary) -> list[int]:
    """The token of a line end, or else of a space; [] where there is neither."""
    unknown = getattr(vocabulary, "unk_id", None)
    for text in ("\n", " "):
        try:
            ids = vocabulary.encode(text, close_line=False)
        except UserError:  # It has no such character.
            continue
        if len(ids) and ids[-1] != unknown:
            return [int(ids[-1])]
    return []


def _shared(a_N: np.ndarray, b_N: np.ndarray) -> int:
    """How many tokens two texts have in common at their beginning."""
    size = min(len(a_N), len(b_N))
    other = np.flatnonzero(a_N[:size] != b_N[:size])
    return int(other[0]) if len(other) else size
