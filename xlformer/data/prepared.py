"""What preparation leaves behind: token arrays, a vocabulary, and a card about them."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from xlformer import storage, strangers, streams
from xlformer.data import local, ranges, shards, vocabularies
from xlformer.data.documents import Document
from xlformer.data.sources import SPLITS
from xlformer.data.vocabulary import Vocabulary
from xlformer.errors import UserError, WorthAnotherTry, reason

# The format of a prepared folder: another number prepares everything again.
FORMAT = 1
VOCABULARY = "vocabulary.json"
# Tokens of a split that are all looked at before anything begins: a second or two.
LOOKED_AT = 1 << 30


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A corpus as tokens, read where they lie; keys are train, validation and test."""

    tokens: Mapping[str, shards.Tokens]
    documents: Mapping[str, np.ndarray | None]  # Where each document begins.
    vocabulary: Vocabulary
    card: dict  # What every result says about its data.
    directory: pathlib.Path


def load(directory, remote=None) -> Prepared:
    """Opens a prepared folder; a missing or damaged file in it is a UserError.

    remote: the folder of an object store that it is a copy of, where tokens are read
    that it lacks.
    """
    folder = pathlib.Path(directory)
    card = _read_card(folder / "card.json")
    vocabulary = _vocabulary(folder, card)
    try:
        listed = shards.read_index(folder, card)
    # Whatever is in it: it may be a stranger's.
    except shards.DAMAGE as error:
        line = f"{folder / shards.INDEX}: {type(error).__name__}: {error}"
        raise UserError(f"{line}; {_again(folder)}") from None
    tokens, documents, sizes = {}, {}, None
    for split in SPLITS:
        if remote and not all((folder / x.file).exists() for x in listed[split]):
            sizes = _sizes(remote) if sizes is None else sizes
            tokens[split] = _stored(remote, sizes, listed[split], vocabulary)
        else:
            tokens[split] = _on_disk(folder, listed[split], vocabulary)
        documents[split] = None
        if card["documents"]:
            path = folder / f"{split}-documents.npy"
            documents[split] = _starts(path, len(tokens[split]))
    # Each time: what is missing may lie in config.data.manual_dir by now, where nobody
    # looks again.
    if about := card.get("incomplete"):
        line = f"{card.get('corpus')}: these are {about}: delete {folder} to prepare"
        streams.say(f"{line} others")
    return Prepared(tokens, documents, vocabulary, card, folder)


def _vocabulary(folder: pathlib.Path, card: dict) -> Vocabulary:
    try:
        found = vocabularies.load(folder / VOCABULARY)
    except UserError as error:
        raise UserError(f"{error}; {_again(folder)}") from None
    if (size := card.get("vocabulary_size")) != found.size:
        raise UserError(
            f"{folder / VOCABULARY}: {found.size} symbols, and its card says {size};"
            f" {_again(folder)}"
        )
    return found


def _on_disk(folder, listed: list[shards.Shard], vocabulary) -> shards.Tokens:
    files = [_shard(folder, shard, vocabulary.dtype) for shard in listed]
    found = shards.Tokens(files, vocabulary.dtype, vocabulary.size)
    # An id beyond the embedding's rows is no error in JAX. Of a text that takes minutes
    # to look through the ids are looked at when they are read.
    if len(found) <= LOOKED_AT:
        found.check()
    return found


def _sizes(remote) -> dict[str, int]:
    try:
        return storage.sizes(remote)
    except FileNotFoundError:
        return {}
    # Errors of the network and of credentials have no common class.
    except Exception as error:
        raise WorthAnotherTry(f"{remote}: not listed: {reason(error)}") from error


def _stored(remote, sizes, listed: list[shards.Shard], vocabulary) -> shards.Tokens:
    """The tokens of a split where they lie: looked at when they are read."""
    files, stored = [], []
    for shard in listed:
        path, size = f"{remote}/{shard.file}", sizes.get(shard.file)
        offset = len(shards.header(vocabulary.dtype, shard.tokens))
        expected = offset + shard.tokens * vocabulary.dtype.itemsize
        if not size == shard.size == expected:
            found = "no such file" if size is None else f"found {size}"
            raise UserError(
                f"{path}: expected {expected} bytes, {found}; {_again(remote)}"
            )
        files.append((path, offset, shard.tokens))
        stored.append(ranges.Stored(path, size, shard.crc32))
    reader = ranges.Remote(stored)
    return shards.Tokens(files, vocabulary.dtype, vocabulary.size, reader)


def _shard(folder: pathlib.Path, shard: shards.Shard, dtype: np.dtype) -> tuple:
    """(path, where its first token is in bytes, tokens) of a file that is whole."""
    path = folder / shard.file
    found = _map(path, dtype, shard.tokens)
    size = path.stat().st_size
    if shard.size not in (size, shards.UNKNOWN):
        raise UserError(
            f"{path}: expected {shard.size} bytes, found {size}; {_again(folder)}"
        )
    return path, found.offset, shard.tokens


def _starts(path: pathlib.Path, tokens: int) -> np.memmap:
    """Where documents begin among so many tokens."""
    found = _map(path, np.dtype("int64"))
    # Of millions the first and the last are looked at.
    if not len(found) or found[0] != 0 or found[-1] > tokens:
        raise UserError(
            f"{path}: no documents of {tokens} tokens begin there;"
            f" {_again(path.parent)}"
        )
    return found


def _read_card(path: pathlib.Path) -> dict:
    try:
        card = strangers.read_json(path)
        if card["format"] != FORMAT:
            raise ValueError(f"format {card['format']!r}, expected {FORMAT}")
        return checked(card)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a prepared corpus: {type(error).__name__}: {error};"
            f" {_again(path.parent)}"
        ) from None


def checked(card: dict) -> dict:
    """The card of a prepared text, in which whoever reads it finds what it must have.

    Raises ValueError, KeyError or TypeError for what lacks any of it.
    """
    splits = {split: dict(card["splits"][split]) for split in SPLITS}
    for split, about in splits.items():
        for name, least in {"tokens": 1, "bytes": 0, "words": 0}.items():
            if type(about[name]) is not int or about[name] < least:
                raise ValueError(f"no number of {name} for {split}")
    for name in ("payload_sha256", "corpus", "unit", "newline", "words_are"):
        if not isinstance(card[name], str):
            raise ValueError(f"{name}={card[name]!r:.20} is no text")
    if type(record := card.get("record", 1)) is not int or record < 1:
        raise ValueError(f"record={record!r:.20} is no size")
    return card | {"splits": splits, "documents": bool(card["documents"])}


def _map(path: pathlib.Path, dtype: np.dtype, size: int | None = None) -> np.memmap:
    try:
        strangers.check_file(path)
        # Mapped, so that several processes of a host share the pages. A pickle is
        # refused: it could run code.
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: {error}; {_again(path.parent)}") from None
    if found.dtype != dtype or found.ndim != 1 or size not in (None, len(found)):
        expected = "one row" if size is None else size
        raise UserError(
            f"{path}: expected {expected} of {dtype}, found {found.dtype}{found.shape};"
            f" {_again(path.parent)}"
        )
    return found


def _again(folder) -> str:
    return f"delete {folder} and prepare again"


def open_text(vocabulary: Vocabulary, path) -> Document:
    """A text file as it is encoded: without a byte order mark. '-' is standard input.

    What is no file is copied first, because a pipe can be read only once.
    """
    try:
        found = local.open_text(os.fspath(path), vocabulary.unit)
    except UserError:
        raise
    except Exception as error:
        line = f"{path}: cannot read the text"
        if why := getattr(error, "strerror", None):  # without the path again
            raise UserError(f"{line}: {why}") from None
        raise storage.unreadable(line, path, error) from error
    if not found:
        raise UserError(f"{path}: the text is empty")
    return found


def encode_file(vocabulary: Vocabulary, path) -> np.ndarray:
    """The tokens of a text file, for scoring it."""
    return vocabulary.encode(open_text(vocabulary, path), where=str(path))
