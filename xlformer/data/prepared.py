"""What preparation leaves behind: token arrays, a vocabulary, and a card about them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from xlformer.data import local, vocabularies
from xlformer.data.sources import SPLITS
from xlformer.data.vocabulary import Vocabulary
from xlformer.errors import UserError

# The format of a prepared folder: another number prepares everything again.
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A corpus as tokens, mapped from disk; keys are train, validation and test."""

    tokens: Mapping[str, np.memmap]
    documents: Mapping[str, np.ndarray | None]  # Where each document begins.
    vocabulary: Vocabulary
    card: dict  # What every result says about its data.
    directory: pathlib.Path


def load(directory) -> Prepared:
    """Maps a prepared folder; a missing or damaged file in it is a UserError."""
    folder = pathlib.Path(directory)
    card = _read_card(folder / "card.json")
    vocabulary = vocabularies.load(folder / "vocabulary.json")
    tokens, documents = {}, {}
    for split in SPLITS:
        path = folder / f"{split}.npy"
        tokens[split] = _map(path, vocabulary.dtype, card["splits"][split]["tokens"])
        # All tokens are looked at now, because an id beyond the embedding's rows is no
        # error in JAX.
        top = int(tokens[split].max())
        if top >= vocabulary.size or int(tokens[split].min()) < 0:
            raise UserError(
                f"{path}: token id out of range: {top} in a vocabulary of"
                f" {vocabulary.size}; {_again(folder)}"
            )
        documents[split] = None
        if card["documents"]:
            documents[split] = _map(
                folder / f"{split}-documents.npy", np.dtype("int64")
            )
    return Prepared(tokens, documents, vocabulary, card, folder)


def _read_card(path: pathlib.Path) -> dict:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if card["format"] != FORMAT:
            raise ValueError(f"format {card['format']!r}, expected {FORMAT}")
        for split in SPLITS:
            if type(card["splits"][split]["tokens"]) is not int:
                raise ValueError(f"no number of tokens for {split}")
        card["documents"] = bool(card["documents"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a prepared corpus: {type(error).__name__}: {error};"
            f" {_again(path.parent)}"
        ) from None
    return card


def _map(path: pathlib.Path, dtype: np.dtype, size: int | None = None) -> np.memmap:
    try:
        # Mapped, so that several processes of a host share the pages. A pickle is
        # refused: it could run code.
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: {error}; {_again(path.parent)}") from None
    if found.dtype != dtype or found.ndim != 1 or size not in (None, len(found)):
        raise UserError(
            f"{path}: expected {size} of {dtype}, found {found.dtype}{found.shape};"
            f" {_again(path.parent)}"
        )
    return found


def _again(folder: pathlib.Path) -> str:
    return f"delete {folder} and prepare again"


def read_text(vocabulary: Vocabulary, path) -> bytes:
    """A text file as it is encoded: without a byte order mark. '-' is standard input.

    It is read once, because it may be a pipe.
    """
    try:
        data = local.read_once(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the text: {error.strerror}") from None
    data = local.plain_text(data, vocabulary.unit, str(path))
    if not data:
        raise UserError(f"{path}: the text is empty")
    return data


def encode_file(vocabulary: Vocabulary, path) -> np.ndarray:
    """The tokens of a text file, for scoring it."""
    return vocabulary.encode(read_text(vocabulary, path), where=str(path))
