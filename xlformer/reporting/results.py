"""The cards of the evaluations that a run has in its work directory."""

from __future__ import annotations

from xlformer import runs
from xlformer.reporting.page import Rows, Section, Text, clean, shown
from xlformer.reporting.subject import Subject
from xlformer.scoring import cards

MOST = 40  # cards of a run, the newest
# What a table says first; the rest of cards.ENTRY follows.
FIRST = ("bits_per_byte", "bpc", "ppl", "word_ppl", "nats_per_token", "split", "step")
LAST = ("payload_sha256", "corpus", "device", "date")


def section(subject: Subject) -> Section:
    """A row for each evaluation, oldest first."""
    rows, blocks = [], []
    for member in subject.members:
        found, more = _read(member.run.workdir)
        if not found:
            text = "has no evaluations; python -m xlformer.evaluate writes them."
            blocks.append(Text(f"{member.name} {text}", "missing"))
        if more:
            blocks.append(Text(f"{member.name}: {more} older cards are not shown."))
        rows += [(member.name, card) for card in found]
    if rows:
        middle = [n for n in cards.ENTRY if n not in (*FIRST, *LAST)]
        names = [
            name
            for name in (*FIRST, *middle, *LAST)
            if any(card.get(name) is not None for _, card in rows)
        ]
        table = [[run, *(_cell(card.get(n)) for n in names)] for run, card in rows]
        head = ["run", *(name.replace("_", " ") for name in names)]
        caption = (
            "Evaluations as they were written when they were made. Two numbers compare "
            "where split, checksum, tokens and settings are the same"
        )
        blocks.insert(0, Rows(caption, head, table))
    return Section("evaluations", "Evaluations", blocks)


def _read(workdir) -> tuple[list[dict], int]:
    """(the newest cards, how many more there are); [] where there are none."""
    try:
        paths = cards.archived(workdir / runs.EVALUATIONS)
    except OSError:
        return [], 0
    found = [card for path in paths[-MOST:] if (card := cards.read(path)) is not None]
    return found, max(len(paths) - MOST, 0)


def _cell(value):
    """What a card may hold; whatever else a stranger's does, as a text."""
    if value is None or isinstance(value, int | float):
        return value
    text = clean(shown(value))
    # A checksum is told from others by its beginning.
    return text[:12] if len(text) == 64 and " " not in text else text
