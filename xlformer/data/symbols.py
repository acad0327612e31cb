"""The symbols of a text: of a tokenizer, from a list, trained, or counted."""

from __future__ import annotations

import functools
import json
import pathlib

from etils import epath

from xlformer import storage, streams
from xlformer.data import corpora, counting, encoding, sources, trained
from xlformer.data.prepared import VOCABULARY
from xlformer.data.recipes import OWN_SPECIALS, Recipe
from xlformer.data.vocabulary import Vocabulary
from xlformer.errors import UserError, some

# What is known of the symbols, until the card says it.
ABOUT = f"about{encoding.DONE}"


def make(folder: pathlib.Path, recipe: Recipe, builder, team) -> Vocabulary:
    """That of the recipe; or the one that was found before a kill."""
    path, known, about = folder / VOCABULARY, folder / ABOUT, {}
    if recipe.vocabulary or recipe.tokenizer:
        found = recipe.vocabulary or recipe.tokenizer
    # Without what is known of them the card would lack how wrong their counts may be.
    elif path.exists() and known.exists():
        return encoding.vocabulary(str(path))
    elif recipe.trained:
        found, about = _trained(recipe.trained, builder)
    else:
        found, error = _count(recipe, builder, team)
        about = {"count_error": error} if error else {}
    storage.write(epath.Path(known), json.dumps(about))
    storage.write(epath.Path(path), found.to_json())
    return encoding.vocabulary(str(path))


def _trained(name: str, builder) -> tuple[Vocabulary, dict]:
    def part(number: int):
        ((_, found),) = corpora.records(builder, "train", number, number + 1)
        return found

    count = corpora.stored(builder)["splits"]["train"]["shards"][-1]
    return trained.train(name, count, part)


def say_what_is_lost(tokenizer, characters: str) -> None:
    """What of a text that has these characters a tokenizer does not keep."""
    lines = []
    if not tokenizer.line_ends:
        lines.append("does not keep line ends: newlines are lost")
    if lost := tokenizer.dropped(characters):
        shown = some(map(repr, lost))
        lines.append(f"makes no token of {len(lost)} characters of the text: {shown}")
    for line in lines:
        line = f"config.data.tokenizer {line}"
        streams.say(line)


def _count(recipe: Recipe, builder, team) -> tuple[Vocabulary, int]:
    """A vocabulary, and by how much the counts of its words may be too low."""
    corpus = recipe.corpus
    of_words = recipe.unit == "words" or bool(corpus and corpus.spaced)
    # Words of validation and test alone would have no trained vectors; characters and
    # bytes are few, and all are taken, as the original does.
    splits = ("train",) if recipe.unit == "words" else sources.SPLITS
    empty = functools.partial(counting.Codes, recipe.unit)
    if of_words:
        empty = functools.partial(
            counting.Words,
            corpus.specials if corpus else OWN_SPECIALS,
            lower=bool(corpus and corpus.lower),
            begins=bool(corpus and corpus.begins),
            limit=counting.WORDS if recipe.own_words else 0,
        )
    counted = empty()
    calls = [
        (job, empty) for x in splits for job in encoding.jobs(builder, recipe.name, x)
    ]
    for found in team.work(encoding.count, calls):
        counted.follow(found)
    if of_words:
        return _words(recipe, counted), counted.error
    if recipe.unit == "chars":
        return counting.char_vocabulary(counted), 0
    # A public corpus has the symbols its field counts; elsewhere any byte may come.
    every = corpus is None or recipe.every_byte
    return counting.byte_vocabulary(counted, recipe.newline, every), 0


def _words(recipe: Recipe, counted: counting.Words) -> Vocabulary:
    unknown = recipe.corpus.unknown if recipe.corpus else ""
    found = counting.word_vocabulary(
        counted,
        recipe.min_count,
        recipe.max_vocab,
        recipe.unit,
        unknown or "<unk>",
    )
    if recipe.own_words and found.size == len(OWN_SPECIALS):
        raise UserError(
            f"config.data.min_count={recipe.min_count} leaves no word: all"
            f" {found.counts_V[1]} of train would be <unk>;"
            " config.data.min_count=1 keeps them"
        )
    if counted.error:
        line = (
            f"more than {counting.WORDS:,} different words: the rarest were forgotten,"
            f" and counts may be too low by {counted.error}"
        )
        streams.say(line)
    return found
