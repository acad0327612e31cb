"""Vocabularies: text to ids and back, for bytes, characters and words.

`counting.py` makes one from a text, `pieces.py` wraps a tokenizer's file. Symbols stand
in order of frequency, specials first, because adaptive embeddings cut the vocabulary by
rank. A vocabulary is stored as JSON, which can run nothing, and checked when loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np

from xlformer.data import parts, words
from xlformer.data.utf8 import code_points
from xlformer.errors import UserError, some

FORMAT = "xlformer vocabulary 1"
NEWLINE = 10


def token_dtype(size: int) -> np.dtype:
    """The smallest of uint8, uint16 and int32 that holds the ids of `size` symbols."""
    # Token arrays are mapped and copied to hosts; enwik8 takes a quarter of int32.
    if size <= 1 << 8:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16) if size <= 1 << 16 else np.dtype(np.int32)


def require(condition, message: str) -> None:
    """Raises the ValueError that from_json turns into one line."""
    if not condition:
        raise ValueError(message)


class Vocabulary:
    """Symbols, how often each was counted, and the two directions.

    `counts_V` is what the order was made from: train, validation and test for bytes and
    characters, train alone for words and pieces (as in the original). The constructors
    check what they are given, because it may come from a file.
    """

    kind = ""

    def __init__(self, symbols: Sequence, counts: Sequence[int], unit: str):
        require(
            len(set(symbols)) == len(symbols) > 0, "symbols are missing or repeated"
        )
        require(len(symbols) == len(counts), "symbols and counts differ in number")
        # A longer number would be an OverflowError in numpy, and True is an int.
        require(all(type(c) is int and 0 <= c < 1 << 48 for c in counts), "a bad count")
        self.symbols = tuple(symbols)
        self.counts_V = np.array(counts, np.int64)
        self.unit = unit
        self.dtype = token_dtype(len(symbols))

    @property
    def size(self) -> int:
        return len(self.symbols)

    @property
    def line_ends(self) -> bool:
        """Whether the end of a line is a token, and counts as a word."""
        return False

    def encode(
        self, text: str | bytes, *, close_line: bool = True, where: str = "text"
    ) -> np.ndarray:
        """Returns the ids of text, in the smallest dtype.

        `close_line` ends a last line that has no newline with `<eos>`, as a file needs
        it; for a prompt to be continued pass False. Bytes and characters have no
        `<eos>`. `where` names the text in errors.
        """
        found = [
            self.encode_part(part, close_line=close_line, where=where)
            for part in parts.of(text)
        ]
        return np.concatenate([np.zeros(0, self.dtype), *found])

    def encode_part(self, part, *, close_line: bool = True, where="text") -> np.ndarray:
        """The ids of a parts.Part: those of all parts, joined, are the text's."""
        raise NotImplementedError

    def decode(self, ids) -> str | bytes:
        """The text of ids: bytes where the unit is bytes, else a string."""
        raise NotImplementedError

    def options(self) -> dict:
        """The constructor's other arguments, for to_json."""
        return {}

    def with_counts(self, counts_V: np.ndarray) -> Vocabulary:
        """The same symbols with how often each was found in a text."""
        counts = counts_V.tolist()
        return type(self)(self.symbols, counts, **self.options())

    def to_json(self) -> str:
        """The whole vocabulary as one JSON object; from_json reads it."""
        fields = {"format": FORMAT, "kind": self.kind, **self.options()}
        fields |= {"counts": self.counts_V.tolist(), "symbols": self.symbols}
        return json.dumps(fields)

    def _checked(self, ids) -> np.ndarray:
        ids = np.asarray(ids).ravel()
        # numpy would take a negative id from the end.
        if ids.size and not (0 <= ids.min() and ids.max() < self.size):
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise UserError(f"token id out of range: {bad} of {self.size} symbols")
        return ids.astype(np.int64)

    def _refuse(self, found: Iterable[str], where: str):
        shown = some(map(repr, dict.fromkeys(found)))
        raise UserError(
            f"{where}: not in the vocabulary of {self.size} {self.unit}: {shown}"
        )


class ByteVocabulary(Vocabulary):
    """Byte values; newline='drop' leaves byte 10 out, as the original does with enwik8.

    Its script writes the bytes as numbers but byte 10 as a line end, and it reads lines
    without putting one back: 204 symbols, not 205. Where newlines are kept about 0.02
    bits per symbol less were reported (facebookresearch/adaptive-span, issue 5), so the
    two do not compare.
    """

    kind = "bytes"

    def __init__(self, symbols, counts, newline: str = "keep"):
        require(
            all(type(s) is int and 0 <= s < 256 for s in symbols), "not a byte value"
        )
        require(newline in ("keep", "drop"), "'newline' is neither keep nor drop")
        super().__init__(symbols, counts, "bytes")
        self.newline = newline
        self._values_V = np.array(self.symbols, np.uint8)
        self._known = np.isin(np.arange(256), self._values_V)
        table = np.zeros(256, self.dtype)
        table[self._values_V] = np.arange(self.size)
        self._table = table.tobytes()

    def options(self) -> dict:
        return {"newline": self.newline}

    def encode_part(self, part, *, close_line=True, where="text"):
        data = part.data
        if self.newline == "drop":
            data = data.replace(b"\n", b"")
        codes = np.frombuffer(data, np.uint8)
        if self.size < 256 and not self._known[codes].all():
            unknown = np.unique(codes[~self._known[codes]]).tolist()
            self._refuse(
                (chr(b) if b < 128 else f"byte {b:#x}" for b in unknown), where
            )
        # Twice as fast as numpy's indexing.
        return np.frombuffer(data.translate(self._table), self.dtype)

    def decode(self, ids) -> bytes:
        return self._values_V[self._checked(ids)].tobytes()


class CharVocabulary(Vocabulary):
    """Unicode characters (code points)."""

    kind = "chars"

    def __init__(self, symbols, counts):
        one = all(isinstance(s, str) and len(s) == 1 for s in symbols)
        require(one, "a symbol is not one character")
        super().__init__(symbols, counts, "chars")
        self._codes_V = np.array([ord(s) for s in self.symbols], np.uint32)
        # Python strings may hold half a pair, UTF-8 cannot: generated text could not be
        # written.
        surrogate = (self._codes_V >= 0xD800) & (self._codes_V < 0xE000)
        require(not surrogate.any(), "a symbol is half of a character")
        # One entry more than needed: the last stands for all that is beyond.
        self._table = np.full(int(self._codes_V.max()) + 2, -1, np.int32)
        self._table[self._codes_V] = np.arange(self.size)

    def encode(self, text, *, close_line=True, where="text"):
        # Half a surrogate pair, as of a shell, is none of the symbols.
        if isinstance(text, str):
            return self._ids(code_points(text, where), where)
        return super().encode(text, close_line=close_line, where=where)

    def encode_part(self, part, *, close_line=True, where="text"):
        return self._ids(code_points(part.data, where, part.offset), where)

    def _ids(self, codes: np.ndarray, where: str) -> np.ndarray:
        ids = self._table[np.minimum(codes, len(self._table) - 1)]
        if ids.size and ids.min() < 0:
            self._refuse(map(chr, codes[ids < 0].tolist()), where)
        return ids.astype(self.dtype)

    def decode(self, ids) -> str:
        codes = self._codes_V[self._checked(ids)]
        return codes.astype("<u4").tobytes().decode("utf-32-le")


class WordVocabulary(Vocabulary):
    """Words between white space; every line ends in the symbol `eos`, which is a token.

    Also Penn's characters, which stand between spaces: unit is 'chars' then. A word
    that is none of the symbols becomes `unknown`, and is an error where the vocabulary
    lacks that. With `begins` a text begins with `eos`, too (lm1b's `<S>`).
    """

    kind = "words"
    line_ends = True

    def __init__(
        self,
        symbols,
        counts,
        unit="words",
        lower=False,
        eos="<eos>",
        unknown="<unk>",
        begins=False,
    ):
        one = all(isinstance(s, str) and s.split() == [s] for s in symbols)
        require(one, "a symbol is not one word")
        require(unit in ("words", "chars"), "'unit' is neither words nor chars")
        require(isinstance(lower, bool), "'lower' is neither true nor false")
        require(isinstance(begins, bool), "'begins' is neither true nor false")
        require(isinstance(unknown, str), "'unknown' is not a string")
        require(eos in symbols, "'eos' is not among the symbols")
        super().__init__(symbols, counts, unit)
        self.lower, self.eos = lower, eos
        self.unknown, self.begins = unknown, begins
        # Half a surrogate pair is in no text, but may be in a stranger's file.
        keys = (symbol.encode("utf-8", "surrogatepass") for symbol in self.symbols)
        self._table = {key: i for i, key in enumerate(keys)}
        self.eos_id = self._table[eos.encode()]
        self.unk_id = self._table.get(unknown.encode())
        self._numbers = words.Numbers(eos, lower=lower, begins=begins)

    def options(self) -> dict:
        found = {"unit": self.unit, "lower": self.lower, "eos": self.eos}
        # 0.1.0 reads vocabularies that have no more.
        if self.unknown != "<unk>":
            found["unknown"] = self.unknown
        return found | ({"begins": True} if self.begins else {})

    def encode_part(self, part, *, close_line=True, where="text"):
        refused, unknown = [], -1 if self.unk_id is None else self.unk_id

        def number(word: bytes) -> int:
            found = self._table.get(word, unknown)
            if found < 0:
                refused.append(word.decode())
            return found

        ids = self._numbers.of(part, number, where, close_line=close_line)
        if refused:
            self._refuse(refused, where)
        return ids.astype(self.dtype)

    def decode(self, ids) -> str:
        found = (self.symbols[i] for i in self._checked(ids))
        lines = " ".join("\n" if word == self.eos else word for word in found)
        return "\n".join(line.strip(" ") for line in lines.split("\n"))
