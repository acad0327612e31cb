"""The text of a stored run: found again by its checksum, wherever it lies today.

A run may be read from another directory or machine, after its text has moved, was
edited or is gone. What it was made of is in its data.json: tokens that were prepared
from that text serve, and so does the text itself, wherever they are found; another text
never. The run may be a stranger's, so nothing is made where its config says.
"""

from __future__ import annotations

import array
import dataclasses
import os
from collections.abc import Iterator

import numpy as np

from xlformer import runs, storage, strangers, streams
from xlformer.data import documents, folders, local, parts, preparing, recipes, shards
from xlformer.data.documents import Text
from xlformer.data.prepared import FORMAT, Prepared, checked
from xlformer.data.sources import SPLITS
from xlformer.data.vocabulary import Vocabulary
from xlformer.errors import Advice, Argument, UserError
from xlformer.runs import writing

PATH = "config.data.path"
# What decides which tokens a text becomes: prepared tokens that agree in these, and in
# the checksum of each split, are the run's whatever their folder is called.
SAME = ("payload_sha256", "unit", "newline", "documents")


def read(run: runs.Run, split: str, data_path: str | None = None) -> Prepared:
    """The text that the run was trained on, with this split and no other.

    data_path: where the text lies now, in place of config.data.path. UserError where
    that is another text, or where there is none and no prepared one.
    """
    data = run.config.data
    if data_path is not None:
        if data.corpus != "text":
            raise UserError(
                Argument("data_path", data_path),
                f": the run's text is config.data.corpus={data.corpus}, no file",
            )
        data = data.copy_and_resolve_references()
        data.path = data_path
    card = _card(run.workdir / writing.DATA)
    if card is None:  # Converted weights: the text is what their config says today.
        return _of(preparing.prepare(data, stored=True), split)
    _check(split, card["splits"])
    name = PATH if data_path is None else Argument("data_path")
    found = next(_search(data, card), None)
    if found is None or data_path is not None:
        text = _text(data, card, name, advice=found is None)
    if found is not None:
        if data_path is None:
            _say_if_changed(data, card, found.directory)
        return _of(found, split)
    # Where others' weights were trained on, the vocabulary is not that of this text.
    if text is not None and card.get("vocabulary_size") == run.vocabulary.size:
        return _encoded(text, split, run.vocabulary, card)
    again = preparing.prepare(data, stored=True)
    if again.card["payload_sha256"] != card["payload_sha256"]:
        found = again.card["payload_sha256"]
        raise _another(f"config.data.corpus={data.corpus}", found, card)
    return _of(again, split)


def _of(found: Prepared, split: str) -> Prepared:
    _check(split, found.tokens)
    return dataclasses.replace(
        found,
        tokens={split: found.tokens[split]},
        documents={split: found.documents[split]},
    )


def _check(split: str, splits) -> None:
    if split not in splits:
        raise UserError(Argument("split", split), f" is none of {', '.join(splits)}")


def _card(path) -> dict | None:
    """What the run says of its text; None where it has none yet."""
    if not path.exists():
        return None
    try:
        return checked(strangers.read_json(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is unreadable: {error!r:.100}") from None


# Prepared tokens ----------------------------------------------------------------------


def _roots(data) -> list[str]:
    # Where the run had its tokens, and where preparing on this machine puts them.
    return [*filter(None, [data.directory]), storage.cache()]


def _search(data, card: dict) -> Iterator[Prepared]:
    """Prepared tokens that were made of this text, in the same way."""
    for root in _roots(data):
        try:
            folder = storage.path(root)
            paths = sorted(folder.glob(f"{data.corpus}-*/{folders.CARD}"))
        except (OSError, UserError):  # The run's directory may be of another machine.
            continue
        for path in paths:
            try:
                same = _same(strangers.read_json(path), card)
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if same:
                yield preparing.opened(root, path.parent.name)


def _same(other: dict, card: dict) -> bool:
    return (
        other["format"] == FORMAT
        and all(other[key] == card[key] for key in SAME)
        and all(
            other["splits"][name]["sha256"] == card["splits"][name]["sha256"]
            for name in SPLITS
        )
    )


# The text itself ----------------------------------------------------------------------


def _text(data, card: dict, name: str | Argument, *, advice: bool) -> Text | None:
    """The raw text, which is the run's; None of a public corpus.

    name: of the path, in errors.
    """
    remedy = (
        f"; no prepared copy of the run's text (sha256 {card['payload_sha256'][:12]}) "
        f"is in {' or '.join(_roots(data))}",
        Advice(": ", Argument("data_path", "FILE"), " says where that text lies now"),
        Advice(", ", Argument("text", "FILE"), " scores another one"),
    ) * advice
    try:
        if name == PATH and _is_read_once(data.path):
            raise UserError(f"{PATH}={data.path}: {local.ONCE}")
        text = recipes.raw_text(data)
    except UserError as error:
        # Reading says config.data.path, whatever the person has given as the path.
        before, found, after = str(error).partition(PATH)
        parts = before, name if found else "", after, *remedy
        raise type(error)(*parts) from None
    found = None if text is None else preparing.payload(text)
    if found not in (None, card["payload_sha256"]):
        where = f"config.data.corpus={data.corpus}"
        if data.path:
            where = f"{PATH}={data.path}"
            if isinstance(name, Argument):
                where = dataclasses.replace(name, value=data.path)
        raise _another(where, found, card, remedy)
    return text


class AnotherText(UserError):
    """What lies in a place is not what the run was trained on."""


def _another(where: str | Argument, found: str, card: dict, remedy=()) -> AnotherText:
    return AnotherText(
        where,
        f" holds another text than the run was trained on: sha256 {found[:12]}, the "
        f"run has {card['payload_sha256'][:12]}",
        *remedy,
    )


def _say_if_changed(data, card: dict, found) -> None:
    """Says so where config.data.path has another text by now, which is not scored."""
    try:
        _text(data, card, PATH, advice=False)
    except AnotherText as error:
        line = f"{error}: scoring the prepared text of the run, in {found}"
        streams.say(line)
    except UserError:
        pass  # Nothing can be read there any more, and nothing has to be.


def _is_read_once(path: str) -> bool:
    """Whether there is a pipe in it, which another process has emptied."""
    entries = [os.path.expanduser(entry.strip()) for entry in path.split(";")]
    return any(map(documents.is_read_once, entries))


def _encoded(text: Text, split: str, vocabulary: Vocabulary, card: dict) -> Prepared:
    where = f"{card['corpus']} {split}"
    found = shards.Collector(vocabulary.dtype, vocabulary.size)
    starts, size = array.array("q"), 0
    for document in text.splits[split]:
        starts.append(size)
        for part in parts.of(document):
            ids = vocabulary.encode_part(part, where=where)
            found.add(ids)
            size += len(ids)
    tokens, expected = found.tokens(), card["splits"][split]["tokens"]
    if len(tokens) != expected:
        raise UserError(
            f"{where} has {len(tokens)} tokens by {runs.VOCABULARY}, the run had "
            f"{expected}: its text was cut in another way"
        )
    documents = {split: np.array(starts, np.int64) if card["documents"] else None}
    return Prepared({split: tokens}, documents, vocabulary, card, None)
