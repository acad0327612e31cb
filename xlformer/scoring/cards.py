"""What an evaluation found, as numbers, as a table, and in the work directory.

evaluation-<split>.json, .txt   the newest of that split
evaluations/<when>-<split>-<id>.json   every one that there ever was
evaluations/index.json   one entry a card, oldest first; where it is lost or was cut
                         off, it is made anew from the cards
"""

from __future__ import annotations

import datetime
import json
import math
import sys
import uuid

from etils import epath

from xlformer import runs, storage, strangers
from xlformer.errors import UserError
from xlformer.tables import aligned

INDEX = "index.json"
BIGGEST = 1 << 20  # bytes of a file that can be a card
# Of a card, what tells it from the others, and what people look for.
ENTRY = (
    "date",
    "split",
    "corpus",
    "payload_sha256",
    "tokens_scored",
    "step",
    "steps_averaged",
    "params",
    "segment_length",
    "stride",
    "memory_length",
    "extended_length",
    "clamp_length",
    "window",
    "batch_rows",
    "warmup",
    "dynamic",
    "dynamic_rate",
    "dynamic_decay",
    "dynamic_epsilon",
    "dynamic_segments",
    "objective",
    "mask_rate",
    "dtype",
    "device",
    "nats_per_token",
    "bpc",
    "ppl",
    "bits_per_byte",
    "word_ppl",
)


def table(cards: list[dict]) -> str:
    """The cards side by side, a line a field."""
    names = dict.fromkeys(n for card in cards for n in card if n != "warning")
    rows = [[name, *(_show(c.get(name)) for c in cards)] for name in names]
    return "\n".join(aligned(rows, left=len(cards) + 1))


def _show(value) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def finite(found):
    """A card, or any tree for JSON, which has no NaN and no infinity: null."""
    if isinstance(found, dict):
        return {name: finite(x) for name, x in found.items()}
    if isinstance(found, (list, tuple)):
        return [finite(x) for x in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def write(workdir, cards: list[dict]) -> None:
    """Writes what was found; a directory that is read-only is no reason to lose it."""
    workdir, split = storage.path(workdir), cards[0]["split"]
    found = [finite(card) for card in cards]
    newest = json.dumps(found if len(found) > 1 else found[0], indent=2)
    try:
        storage.put(workdir / f"{runs.EVALUATION}{split}.json", newest + "\n")
        storage.put(workdir / f"{runs.EVALUATION}{split}.txt", table(cards) + "\n")
        folder = workdir / runs.EVALUATIONS
        with storage.answering(f"{folder}: cannot be written", folder):
            _archive(folder, found)
    except (OSError, UserError) as error:
        # The caller still prints the numbers, which may have taken hours.
        print(f"warning: the card was not written: {error}", file=sys.stderr)


def _archive(folder: epath.Path, cards: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for card in cards:
        # Names sort by time; the id is for two processes in one microsecond.
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        name = f"{now}-{card['split']}-{uuid.uuid4().hex[:8]}.json"
        storage.put(folder / name, json.dumps(card, indent=2) + "\n")
    # Another process may write its card and index meanwhile: whoever writes the index
    # last finds all of the others' cards, here or in the look after it.
    found, entries = None, _known(folder / INDEX)
    while found != (found := archived(folder)):
        named = {p.name: entries.get(p.name) or _entry(p) for p in found}
        entries = {name: entry for name, entry in named.items() if entry}
        storage.put(folder / INDEX, json.dumps([*entries.values()], indent=1) + "\n")


def archived(folder: epath.Path) -> list[epath.Path]:
    """Where the cards of a run's evaluations lie, oldest first."""
    return sorted(path for path in folder.glob("*.json") if path.name != INDEX)


def read(path: epath.Path) -> dict | None:
    """A card; None for what is none, of whatever kind: anybody may have put it here."""
    try:
        card = strangers.read_json(path, BIGGEST)
    except (OSError, ValueError, UserError):
        return None
    return card if isinstance(card, dict) else None


def _known(path: epath.Path) -> dict[str, dict]:
    """Entries by file, of an index: no card is read again."""
    try:
        return {entry["file"]: entry for entry in strangers.read_json(path)}
    except (OSError, ValueError, TypeError, KeyError, UserError):
        return {}


def _entry(path: epath.Path) -> dict | None:
    card = read(path)
    if card is None:
        return None
    return {"file": path.name} | {name: card.get(name) for name in ENTRY}
