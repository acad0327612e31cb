"""The vocabulary of the Transformer-XL programs, which all have one class Vocab.

The authors' two programs and NVIDIA's number symbols by it, store it whole, and put it
into no other form. What it was counted from decides its order, so that it must be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xlformer.data.vocabulary import (
    NEWLINE,
    ByteVocabulary,
    CharVocabulary,
    Vocabulary,
    WordVocabulary,
)
from xlformer.errors import UserError


def of_vocab(fields: Mapping[str, Any], where: str = "the vocabulary") -> Vocabulary:
    """Ours with the same ids.

    Args:
      fields: of a Vocab, by their names there. Read are idx2sym, the symbols in the
        order of their ids; counter, how often each was counted, which may lack some or
        all; and lower_case.
      where: names it in errors.

    Returns:
      Words where `<eos>` or lm1b's `<S>` is among the symbols, each the end of a line.
      Else bytes where all are numbers below 256 (enwik8), and characters, of which the
      programs' texts have `_` for the space.

    Raises:
      UserError: the symbols are none of these.
    """
    symbols, counter = fields.get("idx2sym"), fields.get("counter") or {}
    if not isinstance(symbols, list) or not all(isinstance(s, str) for s in symbols):
        raise UserError(f"{where} has no list of symbols, idx2sym")
    if not isinstance(counter, Mapping):
        raise UserError(f"{where}: counter is a {type(counter).__name__}, no mapping")
    counts = [counter.get(symbol, 0) for symbol in symbols]
    try:
        if {"<eos>", "<S>"} & set(symbols):
            return _words(symbols, counts, bool(fields.get("lower_case")))
        if values := byte_values(symbols):
            return of_bytes(values, counts)
        # They split at white space, which therefore can be no symbol.
        symbols = [" " if symbol == "_" else symbol for symbol in symbols]
        return CharVocabulary(symbols, counts)
    except ValueError as error:
        line = "words with <eos> or <S>, byte values, or single characters"
        raise UserError(f"{where}: {error}; its symbols are not {line}") from error


def _words(symbols: list[str], counts: list[int], lower: bool) -> WordVocabulary:
    unknown = next((x for x in ("<unk>", "<UNK>") if x in symbols), "<unk>")
    # lm1b has no <eos>: each sentence stands between two <S>.
    begins = "<eos>" not in symbols
    eos = "<S>" if begins else "<eos>"
    options = {"lower": lower, "eos": eos, "unknown": unknown, "begins": begins}
    return WordVocabulary(symbols, counts, **options)


def byte_values(symbols: Sequence[str]) -> list[int] | None:
    """The values of symbols that are different numbers below 256; None of others.

    Of numbers of one digit, which may be the characters of a text, too.
    """
    numbers = {str(value) for value in range(256)} >= set(symbols)
    longest = max(map(len, symbols), default=0)
    if numbers and len(set(symbols)) == len(symbols) and longest > 1:
        return [int(symbol) for symbol in symbols]
    return None


def of_bytes(values: list[int], counts: list[int]) -> ByteVocabulary:
    """Without newlines where there is none among them, as in the original's enwik8."""
    newline = "keep" if NEWLINE in values else "drop"
    return ByteVocabulary(values, counts, newline=newline)
