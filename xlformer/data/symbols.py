"""The vocabulary of a recipe: a tokenizer's, or counted from the stored text."""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
import sys

from etils import epath

from xlformer import storage
from xlformer.data import corpora, counting, encoding, sources
from xlformer.data.prepared import VOCABULARY
from xlformer.data.recipes import Recipe
from xlformer.data.vocabulary import Vocabulary
from xlformer.errors import UserError, some

# Until the card says it.
COUNT_ERROR = f"counts{encoding.DONE}"
# The symbols before the words of one's own text; public corpora bring their own <unk>.
OWN_SPECIALS = ("<eos>", "<unk>")


def vocabulary(folder: pathlib.Path, recipe: Recipe, builder, team) -> Vocabulary:
    """That of the recipe, counted; or the one that was counted before a kill."""
    path = folder / VOCABULARY
    if recipe.tokenizer:
        _say_what_is_lost(recipe.tokenizer, builder)
        storage.write(epath.Path(path), recipe.tokenizer.to_json())
    elif not path.exists():
        found, error = _count(recipe, builder, team)
        storage.write(epath.Path(folder / COUNT_ERROR), json.dumps(error))
        storage.write(epath.Path(path), found.to_json())
    return encoding.vocabulary(str(path))


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
            ("<eos>",) if corpus else OWN_SPECIALS,
            lower=bool(corpus and corpus.lower),
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
    found = counting.word_vocabulary(
        counted, recipe.min_count, recipe.max_vocab, recipe.unit
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
        print(f"xlformer: {line}", file=sys.stderr, flush=True)
    return found


def _say_what_is_lost(tokenizer, builder) -> None:
    lines = []
    if not tokenizer.line_ends:
        lines.append("does not keep line ends: newlines are lost")
    found = (corpora.read_parts(builder, split) for split in sources.SPLITS)
    if lost := tokenizer.dropped(itertools.chain.from_iterable(found)):
        shown = some(map(repr, lost))
        lines.append(f"makes no token of {len(lost)} characters of the text: {shown}")
    for line in lines:
        line = f"config.data.tokenizer {line}"
        print(f"xlformer: {line}", file=sys.stderr, flush=True)
