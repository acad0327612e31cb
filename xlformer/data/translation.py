"""A prepared corpus in the ids of another vocabulary: that of weights to start from."""

from __future__ import annotations

import dataclasses

import numpy as np

from xlformer.data.prepared import Prepared
from xlformer.data.shards import Tokens, blocks
from xlformer.data.vocabulary import Vocabulary, WordVocabulary
from xlformer.errors import Argument, UserError, some


def translated(
    prepared: Prepared, vocabulary: Vocabulary, *, where: str | Argument
) -> Prepared:
    """The same tokens as ids of `vocabulary`; itself if that has the same order.

    A symbol of the text that it lacks becomes its `<unk>`; where it has none, and for
    another kind of symbols, a UserError names `where` and what is missing.
    """
    ours = prepared.vocabulary
    if ours.symbols == vocabulary.symbols and ours.unit == vocabulary.unit:
        return prepared
    kinds = [f"{x.unit}{' between spaces' * _spaced(x)}" for x in (vocabulary, ours)]
    if kinds[0] != kinds[1]:
        raise UserError(
            where, f" has a vocabulary of {kinds[0]}, config.data gives {kinds[1]}"
        )
    # Mapping ids would not do: another tokenizer also cuts the text elsewhere.
    if ours.unit == "pieces":
        raise UserError(
            where,
            " has the pieces of another tokenizer: pass that one's file as "
            "config.data.tokenizer",
        )
    index = {symbol: i for i, symbol in enumerate(vocabulary.symbols)}
    unknown = getattr(vocabulary, "unk_id", None)
    lower = getattr(vocabulary, "lower", False)
    # As that vocabulary's own encode would lower the text.
    symbols = [s.lower() for s in ours.symbols] if lower else ours.symbols
    ids = np.array([index.get(symbol, -1) for symbol in symbols], np.int32)
    if hasattr(ours, "eos_id"):
        # Both end lines, whatever their symbols are called.
        ids[ours.eos_id] = vocabulary.eos_id
    missing = np.flatnonzero(ids < 0)
    if missing.size and unknown is None:
        # A vocabulary of bytes may have all 256: only those of the text have to be
        # known.
        used = np.zeros(ours.size, bool)
        for tokens in prepared.tokens.values():
            for block in blocks(tokens):
                used |= np.bincount(block, minlength=ours.size) > 0
        lacks = [ours.symbols[i] for i in missing if used[i]]
        if lacks:
            raise UserError(
                where,
                f" has a vocabulary of {vocabulary.size} {vocabulary.unit} without "
                f"{len(lacks)} of those in the text of config.data: "
                f"{some(map(repr, lacks))}",
            )
    # Where nothing is unknown, these symbols do not occur: any id will do.
    ids[missing] = 0 if unknown is None else unknown
    ids = ids.astype(vocabulary.dtype)
    tokens = {
        split: found.translated(ids) if isinstance(found, Tokens) else ids[found]
        for split, found in prepared.tokens.items()
    }
    return dataclasses.replace(prepared, tokens=tokens, vocabulary=vocabulary)


def _spaced(vocabulary: Vocabulary) -> bool:
    return isinstance(vocabulary, WordVocabulary) and vocabulary.unit == "chars"
