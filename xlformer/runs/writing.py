"""The directory of a run as training sees it: whose it is, and what it was made of.

config.json      the resolved config of the latest start that trained something; what a
                 checkpoint was trained with is sealed in it, and goes before this
vocabulary.json  what the ids mean
data.json        the card of the prepared text: its checksum, its sizes
checkpoints/     see checkpoints.py
evaluation-*     and evaluations/, which `evaluate` writes: see scoring/cards.py
metrics.jsonl    and tensorboard/, profile/, lock; in gs:// metrics-<number>-<id>.jsonl
"""

from __future__ import annotations

import json
import os

from etils import epath

from xlformer import config as config_lib
from xlformer import runs, storage, strangers
from xlformer.data import vocabularies
from xlformer.data.prepared import Prepared
from xlformer.errors import Argument, UserError
from xlformer.runs import locks, log

DATA, PROFILE, COMPILED = "data.json", "profile", "compilation_cache"
NONCE, HEARTBEATS = "nonce", "hosts"  # see hosts/job.py and hosts/watchdog.py
WRITTEN = (runs.CONFIG, runs.VOCABULARY, DATA)
# What a run that was killed in its first seconds can have left behind.
OWN = {locks.FILE, log.FILE, "tensorboard", PROFILE, runs.CHECKPOINTS, *WRITTEN}
OWN |= {COMPILED, NONCE, HEARTBEATS, runs.EVALUATIONS}
OWN |= {name + storage.TEMPORARY for name in (*WRITTEN, locks.FILE, NONCE)}
PART = "metrics-"


def refuse_foreign(workdir: epath.Path) -> None:
    """Raises UserError where files lie that no run has written; writes nothing."""
    workdir = storage.path(workdir)
    if not workdir.exists():
        return
    if not workdir.is_dir():
        raise UserError(Argument("workdir", workdir), " is not a directory")
    names = {path.name for path in workdir.iterdir()}
    ours = {n for n in names if n.startswith((PART, runs.EVALUATION))} | (names & OWN)
    # Before anything is read or written through one of these names.
    runs.refuse_links(workdir, ours)
    if endless := strangers.endless(workdir, ours):
        line = f": {os.path.relpath(endless, workdir)} is {strangers.ENDLESS}"
        raise UserError(Argument("workdir", workdir), line)
    # Orbax would say so at the first save, and not in one line.
    if runs.CHECKPOINTS in names and not (workdir / runs.CHECKPOINTS).is_dir():
        line = f": {runs.CHECKPOINTS} is not a directory"
        raise UserError(Argument("workdir", workdir), line)
    config = workdir / runs.CONFIG
    # A directory of our own tells by its config. Anything else must be empty but for
    # what a run leaves: a person's files are never mixed with a run's.
    if runs.CONFIG in names and _sections(config) >= {"model", "train"}:
        return
    if {runs.CONFIG, runs.CHECKPOINTS} <= names:
        raise UserError(
            Argument("workdir", workdir),
            f": its {runs.CONFIG} is not one of a run; without it the run goes on, its "
            "checkpoints have their own config",
        )
    strange = sorted(names - (ours - {runs.CONFIG}))
    if strange:
        raise UserError(
            Argument("workdir", workdir),
            f" is no run and not empty (it has {strange[0]!r}); name a new or an empty "
            "directory",
        )


def _sections(path: epath.Path) -> set[str]:
    """Keys of a JSON object; of anything else none. A model's own has other ones."""
    try:
        found = strangers.read_json(path)
    except (OSError, ValueError):
        return set()
    return set(found) if isinstance(found, dict) else set()


def describe(workdir: epath.Path, config, prepared: Prepared) -> None:
    """Writes what the run is: its config, vocabulary and data."""
    # The config comes last: a directory that has one has the other two as well.
    storage.write(workdir / runs.VOCABULARY, prepared.vocabulary.to_json())
    storage.write(workdir / DATA, json.dumps(prepared.card, indent=2) + "\n")
    storage.write(workdir / runs.CONFIG, config_lib.to_json(config))


def check_same_data(workdir: epath.Path, prepared: Prepared) -> None:
    """Raises UserError if the run's checkpoints come from another text."""
    if (workdir / DATA).exists():  # converted weights have no text yet
        _check_same_text(workdir, prepared.card["payload_sha256"])
    # The same text may get other ids by other settings: each row of the embedding would
    # then mean another symbol.
    if (workdir / runs.VOCABULARY).exists():
        old = vocabularies.load(workdir / runs.VOCABULARY).symbols
        new = prepared.vocabulary.symbols
        if old != new:
            pairs = enumerate(zip(old, new, strict=False))
            where = next((i for i, (a, b) in pairs if a != b), min(len(old), len(new)))
            line = (
                f" was trained with a vocabulary of {len(old)} symbols, config.data "
                f"gives {len(new)}; they differ from id {where} on"
            )
            if "min_count" in prepared.card:
                line += "; config.data.min_count=1 keeps all words, as 0.1.0 did"
            raise UserError(Argument("workdir", workdir), line)


def _check_same_text(workdir: epath.Path, new: str) -> None:
    try:
        old = strangers.read_json(workdir / DATA)["payload_sha256"]
        if not isinstance(old, str):
            raise ValueError("payload_sha256 is no text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{workdir / DATA} is unreadable: {error!r}") from error
    if old != new:
        raise UserError(
            Argument("workdir", workdir),
            f" was trained on another text: sha256 {old[:12]}, config.data gives "
            f"{new[:12]}; a new directory with ",
            Argument("init_from", workdir),
            " starts from its weights",
        )


def check_place(workdir: epath.Path, step: int, place, expected) -> None:
    """Raises UserError if the stream of this config was elsewhere after `step`."""
    place = tuple(int(x) for x in place)
    if place != tuple(expected):
        raise UserError(
            Argument("workdir", workdir),
            f": its step {step} was at (epoch, offset, length) {place}, by this config "
            f"it is {tuple(expected)}: config.seed, config.train.segment_length, "
            "batch_size and variable_length must stay",
        )


def last_metrics(workdir: epath.Path, step: int) -> dict:
    """Losses as logged last up to a step: the result of a run with nothing to add."""
    found = {}
    for record in log.read(workdir):
        if record["step"] <= step:
            found |= record
    return {k: v for k, v in found.items() if k.startswith(("train/loss", "eval/"))}
