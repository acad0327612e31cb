"""Stored vocabularies of every kind: reads what `Vocabulary.to_json` wrote."""

from __future__ import annotations

import json

from xlformer import strangers
from xlformer.data.pieces import PieceVocabulary
from xlformer.data.vocabulary import (
    FORMAT,
    ByteVocabulary,
    CharVocabulary,
    Vocabulary,
    WordVocabulary,
    require,
)
from xlformer.errors import UserError


def load(path) -> Vocabulary:
    """Reads a stored vocabulary from a file."""
    try:
        text = strangers.read(path, strangers.MOST_OF_TEXT).decode()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the vocabulary: {error}") from None
    return from_json(text, str(path))


def from_json(text: str, where: str = "vocabulary") -> Vocabulary:
    """Reads what to_json wrote; anything else is a UserError that names `where`."""
    kinds = (ByteVocabulary, CharVocabulary, WordVocabulary, PieceVocabulary)
    try:
        fields = json.loads(text)
        require(isinstance(fields, dict), "not a JSON object")
        require(fields.pop("format", None) == FORMAT, f"'format' is not {FORMAT!r}")
        name = fields.pop("kind", None)
        found = [kind for kind in kinds if kind.kind == name]
        require(found, f"unknown kind {name!r}")
        for key in ("symbols", "counts"):
            require(isinstance(fields.get(key), list), f"{key!r} is not a list")
        # The constructors check every value; a name that is none of theirs is a
        # TypeError.
        return found[0](**fields)
    # JSON that is nested deeply enough ends in a RecursionError.
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: not a stored vocabulary: {error}") from None
