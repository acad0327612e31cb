"""The words of a text as numbers, found for all words of a part at a time.

A dict is asked for what is new and for long words only. Asked for every word, as
objects of their own, it took 40 ms/MB, where this takes 18 (AMD EPYC, one core).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from xlformer.data.utf8 import decode_utf8, plain_spaces

# A word of at most LONGEST bytes is WIDTH integers: its bytes, zeros, and its size in
# the last byte, because a word may have NUL bytes. 23 bytes are 11 letters of Greek.
WIDTH = 3
LONGEST = 8 * WIDTH - 1
# Words that are remembered at most: 28 bytes each, 7 MB in all.
SLOTS = 18
# Between words, within them, and newlines, which are words of their own.
BETWEEN, WITHIN, LINE = 0, 1, 2
CLASSES = np.full(256, WITHIN, np.uint8)
CLASSES[list(b" \t\r\x0b\x0c")] = BETWEEN
CLASSES[10] = LINE
CLASSES = CLASSES.tobytes()
# What of a word's integers is its own, by its size, and its size within the last one.
MASKS = np.tri(LONGEST + 2, 8 * WIDTH, -1, np.uint8) * np.uint8(255)
MASKS = MASKS.view("<u8").T.copy()
SIZES = np.arange(LONGEST + 2, dtype=np.uint64) << np.uint64(56)
# Odd and without a pattern: the upper bits of the products depend on all bytes.
FACTORS = [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9]


class Numbers:
    """Remembers the numbers that words have. Each word has one place where it may be.

    Args:
      eos: stands for a newline, and for the end of a last line that has none.
      lower: whether words are made lower case.
      begins: whether a text begins with `eos`, too.
    """

    def __init__(self, eos: str, *, lower: bool = False, begins: bool = False):
        self._eos, self._lower, self._begins = eos.encode(), lower, begins
        # Two threads may encode with one vocabulary.
        self._lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """For numbers that have changed."""
        # Memory that is not written to takes none.
        self._keys = np.zeros((1 << SLOTS, WIDTH), "<u8")
        self._numbers = np.zeros(1 << SLOTS, np.int32)

    def of(
        self,
        part,
        number: Callable[[bytes], int],
        where: str,
        *,
        close_line: bool = True,
    ) -> np.ndarray:
        """The numbers of the words of a part of a text, with `eos` for each newline.

        number: gives the number of a word in UTF-8. It is asked in the order of the
          words, for each at least when it is seen first; of a word whose number is
          negative, each time.
        """
        data = part.data
        if self._lower or not data.isascii():
            text = decode_utf8(data, where, part.offset)
            data = text.lower().encode() if self._lower else data
        before = self._begins and not part.offset
        behind = close_line and part.ends and not data.endswith(b"\n")
        first = [number(self._eos)] if before else []
        with self._lock:
            found = self._found(plain_spaces(data), number)
        last = [number(self._eos)] if behind else []
        return np.concatenate([first, found, last], dtype=np.int32, casting="unsafe")

    def _found(self, data: bytes, number: Callable) -> np.ndarray:
        starts, stops = _spans(data)
        sizes = np.minimum(stops - starts, LONGEST + 1)
        keys = _keys(data, starts, sizes)
        places = _places(keys)
        known = self._keys.take(places, axis=0)
        is_known = known[:, 0] == keys[0]
        for i in range(1, WIDTH):
            is_known &= known[:, i] == keys[i]
        found = self._numbers.take(places)
        missed = np.flatnonzero(~is_known)
        cuts = zip(starts[missed].tolist(), stops[missed].tolist(), strict=True)
        words = (data[start:stop] for start, stop in cuts)
        words = (self._eos if word == b"\n" else word for word in words)
        found[missed] = np.fromiter(map(number, words), np.int32, len(missed))
        # Of two words with one place the later is remembered; a longer one never.
        missed = missed[(sizes[missed] <= LONGEST) & (found[missed] >= 0)]
        places = places[missed]
        for i, key in enumerate(keys):
            self._keys[places, i] = key[missed]
        self._numbers[places] = found[missed]
        return found


def _spans(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where words and newlines begin, and where they end."""
    classes = np.frombuffer(b"\0%b\0" % data.translate(CLASSES), np.uint8)
    within, here = classes & WITHIN, classes[1:-1]
    # A newline is more than either; a word's byte only where its neighbour is none.
    starts = np.flatnonzero(here > within[:-2])
    return starts, np.flatnonzero(here > within[2:]) + 1


def _keys(data: bytes, starts: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """The integers of each word: its bytes, zeros, and its size."""
    data, keys = data + bytes(8 * WIDTH), []
    for i in range(WIDTH):
        # Copied as what numpy does not look into: integers, which begin anywhere here,
        # would take twice as long.
        every = np.ndarray(len(data) - 8 * WIDTH, "V8", data, 8 * i, strides=(1,))
        keys.append(every.take(starts).view("<u8") & MASKS[i].take(sizes))
    keys[-1] |= SIZES.take(sizes)
    return keys


def _places(keys: list[np.ndarray]) -> np.ndarray:
    mixed = keys[0] * np.uint64(FACTORS[0])
    for key, factor in zip(keys[1:], FACTORS[1:], strict=True):
        mixed ^= key * np.uint64(factor)
    return (mixed >> np.uint64(64 - SLOTS)).astype(np.int64)
