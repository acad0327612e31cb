"""Vocabularies of existing tokenizers: SentencePiece models, Hugging Face files.

The tokenizer's file travels inside the stored vocabulary. Both forms are data: a
protocol buffer and a JSON object, read by libraries that run nothing from them.
"""

from __future__ import annotations

import base64
import binascii
import functools
import itertools
import json
import os

import numpy as np

from xlformer import storage, strangers
from xlformer.data.utf8 import decode_utf8
from xlformer.data.vocabulary import Vocabulary, require
from xlformer.errors import UserError

SPACE = "\u2581"  # SentencePiece writes a space as this character.


class PieceVocabulary(Vocabulary):
    """The pieces of a tokenizer, with its own ids.

    A text is encoded line by line. SentencePiece sees a line without its newline, which
    becomes the model's `</s>`; in a model without one it becomes `newline_id`, a piece
    that stands for it (without either, line ends are lost: 0.1.0 made such). A Hugging
    Face tokenizer sees the newline, where there is one, and adds no special tokens.
    """

    kind = "pieces"

    def __init__(self, symbols, counts, model: str, newline_id: int | None = None):
        require(isinstance(model, str), "'model' is not a string")
        self.model, self.newline_id = model, newline_id
        try:
            # The tokenizer's file within JSON; without `validate` other characters are
            # skipped.
            data = base64.b64decode(model, validate=True)
        except binascii.Error as error:
            raise ValueError(f"'model' is not base64: {error}") from None
        self._backend = _backend(data)
        # A stored vocabulary may come from a stranger: its ids must be those of its
        # model.
        require(list(symbols) == self._backend.symbols(), "symbols are not the model's")
        if newline_id is not None:
            known = type(newline_id) is int and 0 <= newline_id < len(symbols)
            require(known, "'newline_id' is not the id of a piece")
            self._backend.end_lines_with(newline_id)
        super().__init__(symbols, counts, "pieces")

    @functools.cached_property
    def line_ends(self) -> bool:
        """Whether the tokens tell where lines end: some tokenizers drop newlines."""
        return self._backend.keeps_line_ends()

    def options(self) -> dict:
        newline = {} if self.newline_id is None else {"newline_id": self.newline_id}
        return {"model": self.model, **newline}

    def encode_part(self, part, *, close_line=True, where="text"):
        lines = decode_utf8(part.data, where, part.offset).split("\n")
        closes = close_line and part.ends and self._backend.closes_lines
        ends = [True] * (len(lines) - 1) + [closes]
        # After a newline at the part's end `split` leaves an empty line.
        if not lines[-1]:
            lines, ends = lines[:-1], ends[:-1]
        # Of a line that is longer than a part the rest begins with white space.
        if part.in_line and lines[0][:1] == " " and not self._keeps_space:
            lines[0] = lines[0][1:]
        found = self._backend.encode(lines, ends)
        size = sum(map(len, found))
        return np.fromiter(itertools.chain.from_iterable(found), self.dtype, size)

    @functools.cached_property
    def _keeps_space(self) -> bool:
        """Whether the rest of a line that is cut before a space is as in the line."""
        backend = self._backend
        whole, first, rest = backend.encode(["the cat", "the", " cat"], [False] * 3)
        return [*whole] == [*first, *rest]

    def decode(self, ids) -> str:
        return self._backend.decode(self._checked(ids).tolist())

    def dropped(self, characters: str) -> str:
        """Those of the characters, white space apart, of which no token is left."""
        # Tokenizers treat white space in many ways; line ends are asked of separately.
        visible = (c for c in characters if not c.isspace())
        return "".join(c for c in visible if not self.encode(c, close_line=False).size)

    def spelled(self) -> list[bytes]:
        """What each piece stands for in a text; units.py compares it with the text."""
        return self._backend.spelled()

    @property
    def joined(self) -> bool:
        """Whether the tokenizer puts a space before a line that has none."""
        return self._backend.joined

    @property
    def unk_id(self) -> int | None:
        """The piece that stands for whatever the tokenizer does not know."""
        return self._backend.unk_id


def load_tokenizer(path) -> PieceVocabulary:
    """Wraps a SentencePiece model or a Hugging Face tokenizers file (JSON)."""
    place = storage.path(path)
    try:
        data = strangers.read(place, strangers.MOST_OF_TEXT)
    except Exception as error:
        line = f"config.data.tokenizer: {path}"
        raise storage.unreadable(line, path, error) from None
    return of_file(data, path)


def of_file(data: bytes, path) -> PieceVocabulary:
    """Wraps what is in such a file, which `path` names in errors."""
    try:
        backend = _backend(data)
        symbols = backend.symbols()
        model = base64.b64encode(data).decode("ascii")
        counts, newline_id = [0] * len(symbols), backend.find_newline()
        return PieceVocabulary(symbols, counts, model, newline_id)
    except ValueError as error:
        raise UserError(f"config.data.tokenizer: {path}: {error}") from None


def _backend(data: bytes):
    try:
        # A JSON object begins with a brace, a SentencePiece protocol buffer does not.
        return _HuggingFace(data) if data[:1] == b"{" else _SentencePiece(data)
    except ImportError as error:
        raise UserError(f"{error}: pip install 'xlformer[tokenizers]'") from None


def _byte_level() -> dict[str, int]:
    """The bytes that GPT-2 and its kin mean by a character of a piece.

    Printable bytes stand as they are, the others from code point 256 on.
    """
    same = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in same}
    others = (byte for byte in range(256) if byte not in same)
    return byte_of | {chr(256 + i): byte for i, byte in enumerate(others)}


class _SentencePiece:
    closes_lines = True  # The last line of a file ends too, newline or not.
    # Assumed of every model: where it is not so, the count of a whole text shows it.
    joined = True

    def __init__(self, data: bytes):
        import sentencepiece

        require(data, "not a tokenizer: the file is empty")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except Exception as error:  # The library's own errors have no common type.
            raise ValueError(f"not a SentencePiece model: {error}") from None
        require(self.model.get_piece_size() > 0, "not a SentencePiece model")
        self.line_end = self.model.eos_id()  # -1: none
        # As the other library has it: of many processes each takes one thread.
        is_one = os.environ.get("TOKENIZERS_PARALLELISM") == "false"
        self._threads = 1 if is_one else -1

    def end_lines_with(self, newline_id: int) -> None:
        require(self.line_end < 0, "'newline_id' in a model that has </s>")
        self.line_end = newline_id

    def keeps_line_ends(self) -> bool:
        return self.line_end >= 0

    def find_newline(self) -> int | None:
        """The piece that stands for a newline; None where `</s>` ends lines."""
        if self.line_end >= 0:
            return None
        symbols = self.symbols()
        found = [piece for piece in ("\n", "<0x0A>") if piece in symbols]
        require(
            found,
            "it has neither </s> nor a piece for the newline, and would drop every line"
            " end: train it without --eos_id=-1, or with --byte_fallback",
        )
        return symbols.index(found[0])

    def symbols(self) -> list[str]:
        size = self.model.get_piece_size()
        return [self.model.id_to_piece(i) for i in range(size)]

    def spelled(self) -> list[bytes]:
        found = []
        for i, piece in enumerate(self.symbols()):
            if self.model.is_byte(i):  # <0x0A>
                found.append(bytes([int(piece[3:5], 16)]))
            elif self.model.is_control(i):
                found.append(b"\n" if i == self.model.eos_id() else b"")
            else:
                found.append(piece.replace(SPACE, " ").encode("utf-8"))
        return found

    @property
    def unk_id(self) -> int | None:
        return self.model.unk_id()

    def encode(self, lines: list[str], ends: list[bool]) -> list[list[int]]:
        found = self.model.encode(lines, num_threads=self._threads)
        if self.line_end >= 0:
            for ids, end in zip(found, ends, strict=True):
                if end:
                    ids.append(self.line_end)
        return found

    def decode(self, ids: list[int]) -> str:
        lines = [[]]
        for i in ids:
            if i == self.line_end:
                lines.append([])
            else:
                lines[-1].append(i)
        return "\n".join(self.model.decode(line) for line in lines)


class _HuggingFace:
    closes_lines = False  # A newline that is added would be part of the text.

    def __init__(self, data: bytes):
        import tokenizers

        try:
            self.model = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # The library raises plain Exception.
            raise ValueError(f"not a tokenizers file: {error}") from None
        # A tokenizer's file may ask for both: lines would be filled up, or cut, to a
        # length that belongs to another model's batches.
        self.model.no_padding()
        self.model.no_truncation()

    def end_lines_with(self, newline_id: int) -> None:
        require(False, "'newline_id' is of SentencePiece models")

    def find_newline(self) -> None:
        """Returns None: the newline is part of the text that the tokenizer sees."""

    def keeps_line_ends(self) -> bool:
        """Whether a newline is more than nothing, a space or an unknown character."""
        # U+E000 is for private use, so it stands for what no tokenizer knows.
        with_newline, *others = self.encode(["a\n", "a", "a ", "a\ue000"], [False] * 4)
        return with_newline not in others

    def symbols(self) -> list[str]:
        size = self.model.get_vocab_size(with_added_tokens=True)
        found = [self.model.id_to_token(i) for i in range(size)]
        require(None not in found, "the tokenizer's ids have gaps")
        return found

    @functools.cached_property
    def joined(self) -> bool:
        # Seen from what it does: ByteLevel calls it add_prefix_space, Metaspace a
        # prepend_scheme, and a normalizer may do it too. A word that it knows with a
        # space in front is not taken for an unknown one.
        spaced = [s for s in self.symbols() if s[:1] in (SPACE, "\u0120") and s[1:]]
        word = next((s[1:] for s in spaced if s[1:].isalpha()), "a")
        first = self.model.encode(word, add_special_tokens=False).tokens[:1]
        return bool(first) and first[0][:1] in (SPACE, "\u0120")

    def spelled(self) -> list[bytes]:
        of_bytes = (json.loads(self.model.to_str())["decoder"] or {}).get("type")
        if of_bytes != "ByteLevel":
            return [s.replace(SPACE, " ").encode("utf-8") for s in self.symbols()]
        byte_of = _byte_level()
        return [
            bytes(byte_of[c] for c in s) if all(c in byte_of for c in s) else s.encode()
            for s in self.symbols()
        ]

    @property
    def unk_id(self) -> int | None:
        name = getattr(self.model.model, "unk_token", None)
        return None if name is None else self.model.token_to_id(name)

    def encode(self, lines: list[str], ends: list[bool]) -> list[list[int]]:
        texts = [f"{a}\n" if end else a for a, end in zip(lines, ends, strict=True)]
        # Special tokens, such as BERT's, would stand at the ends of every line.
        # `fast` leaves out where in the line each token came from.
        found = self.model.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: list[int]) -> str:
        # What the model generates is shown, special or not.
        return self.model.decode(ids, skip_special_tokens=False)
