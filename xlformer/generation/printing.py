"""Tokens as text, while they come: whole characters, up to where a row shall end."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Sequence

import numpy as np

# To decode the whole text again for each token would cost the square of its length.
CONTEXT = 16  # tokens that are decoded again, for how the next ones look beside them
BROKEN = "\ufffd"  # how a character looks that is not complete


class Row:
    """What one row generates, as text that is final.

    What a token looks like may depend on the ones before it (a space between words, the
    bytes of one character), so it is decoded together with them.

    Attributes:
      prompt: the prompt's text.
      text: what was generated and will not change any more, without the stop text.
      tokens: how many were taken in, with the one that completed a stop text.
      stopped: whether one of `stops` has come. They are looked for in what is
        generated, not in the prompt.
    """

    def __init__(
        self, vocabulary, prompt: Sequence[int] | np.ndarray, stops: Sequence[str] = ()
    ):
        self._vocabulary, self._stops = vocabulary, tuple(stops)
        self._context = [int(i) for i in prompt[-CONTEXT:]]
        self._waiting: list[int] = []  # the beginning of a character
        self._held = ""  # may become a stop text
        self.prompt = decoded(vocabulary, prompt).rstrip(BROKEN)
        self.text, self.tokens, self.stopped = "", 0, False

    def add(self, ids: Sequence[int]) -> None:
        """More tokens; nothing comes after a stop."""
        # One at a time only where it matters which one completes the stop text.
        size = 1 if self._stops else max(len(ids), 1)
        for start in range(0, len(ids), size):
            if self.stopped:
                return
            part = [int(i) for i in ids[start : start + size]]
            self._waiting += part
            self.tokens += len(part)
            self._take(final=False)

    def finish(self) -> None:
        """Takes what waited for the rest of a character or of a stop text."""
        if not self.stopped:
            self._take(final=True)
            self.text, self._held = self.text + self._held, ""

    def _take(self, final: bool) -> None:
        # What is new is the difference of two decoded texts: a token alone would lose
        # the space before it, or be only some of the bytes of a character.
        old = decoded(self._vocabulary, self._context).rstrip(BROKEN)
        new = decoded(self._vocabulary, [*self._context, *self._waiting])
        if new.endswith(BROKEN) and not final:
            return
        self._context = [*self._context, *self._waiting][-CONTEXT:]
        self._waiting = []
        text = self._held + new[len(old) :]
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, keep = True, min(ends)
            self._held = ""
        else:
            # An end that may become a stop text is not printed yet: it could not be
            # taken back from a terminal.
            keep = len(text) - max(
                (_overlap(text, stop) for stop in self._stops), default=0
            )
            self._held = text[keep:]
        self.text += text[:keep]


def _overlap(text: str, stop: str) -> int:
    """How much of the end of text is a beginning of stop."""
    sizes = range(min(len(text), len(stop)), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)


def decoded(vocabulary, ids: Sequence[int] | np.ndarray) -> str:
    """Ids as text, whatever the vocabulary's own form is."""
    found = vocabulary.decode(np.asarray(ids, np.int64))
    if isinstance(found, bytes):
        return codecs.decode(found, "utf-8", "replace")
    return found


class Printer:
    """Writes the first of the rows as it grows; for generate's on_tokens.

    shown: of the first row, '' where its prompt stands on the terminal already.
    """

    def __init__(self, rows: Sequence[Row], shown: str | None = None):
        self._rows, self._written = rows, 0
        self._before = rows[0].prompt if shown is None else shown

    def __call__(self, tokens_RN: np.ndarray) -> bool:
        """Whether all rows have come to their ends."""
        for row, ids in zip(self._rows, tokens_RN, strict=True):
            row.add(ids)
        self._write()
        return all(row.stopped for row in self._rows)

    def finish(self) -> None:
        """Writes what waited."""
        for row in self._rows:
            row.finish()
        self._write()
        print()

    def _write(self) -> None:
        text = self._before + self._rows[0].text[self._written :]
        self._before, self._written = "", len(self._rows[0].text)
        sys.stdout.write(text)
        sys.stdout.flush()
