"""Raw corpus -> TFDS -> one token array per split, in a folder that is made once.

Batch size, segment length and host count play no part: one preparation serves all.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import pathlib
import sys

import numpy as np
from etils import epath

from xlformer import progress, storage
from xlformer.data import (
    corpora,
    counting,
    documents,
    encoding,
    recipes,
    shards,
    sources,
    workers,
)
from xlformer.data.documents import Text
from xlformer.data.encoding import Encoded, Job
from xlformer.data.folders import CARD, complete
from xlformer.data.prepared import FORMAT, VOCABULARY, Prepared, load
from xlformer.data.recipes import Recipe
from xlformer.data.vocabulary import Vocabulary
from xlformer.errors import UserError, some

# Until the card says it.
COUNT_ERROR = f"counts{encoding.DONE}"
# Bytes of text for each process that encodes it.
WORTH = 20_000_000
# The symbols before the words of one's own text; public corpora bring their own <unk>.
OWN_SPECIALS = ("<eos>", "<unk>")


def prepare(data, *, directory=None, stored=False) -> Prepared:
    """Prepares what a config's data section describes, or finds it prepared.

    `directory` goes before config.data.directory, XLFORMER_DATA and ~/.cache/xlformer.
    Several processes may call at once: one works, the others wait for it. With `stored`
    the config was read from a work directory, which may be a stranger's: what lies in
    its config.data.directory is read, but nothing is made there.
    """
    recipe = recipes.recipe(data)
    name = f"{recipe.name}-{recipe.unit}-{_digest(recipe.key())}"
    named = directory or data.directory
    if stored and named:
        card = storage.path(named) / name / CARD
        # Whoever wrote that config must not choose where this user writes.
        named = named if card.exists() else ""
    root = str(named or storage.cache())
    return load(at_hand(root, name, functools.partial(_build, recipe=recipe)))


def at_hand(root: str, name: str, build=None) -> pathlib.Path:
    """The local folder of a prepared corpus, made by `build` where there is none."""
    if not storage.is_remote(root):
        return complete(pathlib.Path(storage.path(root)) / name, build)
    # Tokens are read from a local copy of what lies in the remote directory.
    remote = storage.path(root) / name
    # XLFORMER_DATA may be the remote directory itself, so copies lie in the home.
    copies = pathlib.Path(storage.path(storage.DEFAULT_CACHE)) / "copies"
    return complete(copies / _digest({"root": root}) / name, build, remote)


def _build(folder: pathlib.Path, recipe: Recipe) -> None:
    builder = corpora.build(
        recipe.name,
        recipe.read,
        folder.parent / "tfds" / _digest(recipe.source),
        download_dir=folder.parent / "downloads",
    )
    # Read back from the TFDS form and not taken from `read`: what is encoded is what is
    # stored.
    encoding.vocabulary.cache_clear()  # of another text, of words perhaps a large one
    text = corpora.stored(builder)
    total = sum(about["bytes"] for about in text["splits"].values())
    # Words are counted first, and then found: twice through the text.
    with (
        progress.counting(f"preparing {recipe.name}", 2 * total),
        workers.Team(_processes(total)) as team,
    ):
        vocabulary = _vocabulary(folder, recipe, builder, team)
        _check_room(folder, vocabulary, total)
        encoded = _encode(folder, recipe, builder, team)
    _finish(folder, recipe, builder, vocabulary, encoded)


def _jobs(recipe: Recipe, builder, split: str) -> list[Job]:
    bounds = corpora.stored(builder)["splits"][split]["shards"]
    store = str(builder.data_path)
    return [
        Job(store, recipe.name, split, start, stop)
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]


def _vocabulary(folder: pathlib.Path, recipe: Recipe, builder, team) -> Vocabulary:
    """That of the recipe, counted; or the one that was counted before a kill."""
    path = folder / VOCABULARY
    if recipe.tokenizer:
        _say_what_is_lost(recipe.tokenizer, builder)
        storage.write(epath.Path(path), recipe.tokenizer.to_json())
    elif not path.exists():
        vocabulary, error = _count(recipe, builder, team)
        storage.write(epath.Path(folder / COUNT_ERROR), json.dumps(error))
        storage.write(epath.Path(path), vocabulary.to_json())
    return encoding.vocabulary(str(path))


def _encode(folder: pathlib.Path, recipe: Recipe, builder, team) -> dict:
    """The shards of each split, which are in the folder then."""
    spaced = bool(recipe.corpus and recipe.corpus.spaced)
    counts = encoding.Counts(spaced, recipe.lines)
    calls = []
    for split in sources.SPLITS:
        jobs = _jobs(recipe, builder, split)
        for number, job in enumerate(jobs):
            path = folder / shards.name(split, number, len(jobs))
            calls.append((job, str(folder / VOCABULARY), str(path), counts))
    found = team.work(encoding.encode, calls)
    encoded = {split: [] for split in sources.SPLITS}
    for (job, *_), one in zip(calls, found, strict=True):
        encoded[job.split].append(one)
    return encoded


def _processes(size: int) -> int:
    """How many processes are worth the second that it takes to start them."""
    return min(workers.processes(), size // WORTH)


def _finish(folder, recipe: Recipe, builder, vocabulary, encoded) -> None:
    """Writes what is known of the shards: documents, vocabulary, index and card."""
    text, splits = corpora.stored(builder), {}
    for split, found in encoded.items():
        size = text["splits"][split]["bytes"]
        count = sum(one.shard.tokens for one in found)
        if not count:
            where = f"{recipe.name} {split}"
            raise UserError(f"{where}: its {size} bytes make no token")
        files = [folder / one.shard.file for one in found]
        # In the public corpora `<unk>` is a word of the published text.
        unk_id = None if recipe.corpus else getattr(vocabulary, "unk_id", None)
        is_counted = bool(recipe.tokenizer) or unk_id is not None
        sha256, ids = _look_through(files, vocabulary, count, is_counted)
        if split == "train" and recipe.tokenizer:
            # A tokenizer's file has no counts; those of train are what others have.
            vocabulary = vocabulary.with_counts(ids)
        if recipe.documents:
            _write_documents(folder / f"{split}-documents.npy", found)
        words = sum(one.words for one in found)
        splits[split] = {
            "tokens": count,
            "bytes": size,
            "words": count if recipe.unit == "words" else words,
            "sha256": sha256,
        }
        if unk_id is not None:
            splits[split]["unknown_share"] = round(int(ids[unk_id]) / count, 6)
    card = _card(recipe, builder, vocabulary, splits)
    counted = folder / COUNT_ERROR
    if counted.exists() and (error := json.loads(counted.read_text())):
        card["count_error"] = error
    (folder / VOCABULARY).write_text(vocabulary.to_json(), encoding="utf-8")
    listed = {split: [one.shard for one in found] for split, found in encoded.items()}
    shards.write_index(folder, card, listed)
    for path in folder.glob(f"*{encoding.DONE}"):
        path.unlink()
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")


def _card(recipe: Recipe, builder, vocabulary: Vocabulary, splits: dict) -> dict:
    facts = dict(builder.info.metadata)
    text = facts.pop(corpora.STORED)
    bounds = {"min_count": recipe.min_count, "max_vocab": recipe.max_vocab}
    return {
        "format": FORMAT,
        "corpus": recipe.name,
        "unit": recipe.unit,
        "newline": recipe.newline,
        "documents": recipe.documents,
        "vocabulary_size": vocabulary.size,
        "payload_sha256": text["sha256"],
        "words_are": words_are(recipe.lines),
        **facts,
        **(bounds if recipe.own_words else {}),
        "splits": splits,
    }


def _look_through(
    files, vocabulary: Vocabulary, count: int, is_counted: bool
) -> tuple[str, np.ndarray]:
    """The sha256 of all tokens as one file, and perhaps how often each occurs."""
    # Of one .npy file, whatever the shards are: runs find their tokens by it.
    beginning = shards.header(vocabulary.dtype, count)
    digest, ids = hashlib.sha256(beginning), np.zeros(vocabulary.size, np.int64)
    for path in files:
        with open(path, "rb") as file:
            file.seek(len(beginning))
            while block := file.read(documents.BLOCK):
                digest.update(block)
                if is_counted:
                    found = np.frombuffer(block, vocabulary.dtype)
                    ids += np.bincount(found, minlength=vocabulary.size)
    return digest.hexdigest(), ids


def _write_documents(path: pathlib.Path, found: list[Encoded]) -> None:
    base, starts = 0, []
    for one in found:
        starts.append(np.array(one.documents, np.int64) + base)
        base += one.shard.tokens
    np.save(path, np.concatenate(starts), allow_pickle=False)


def _check_room(folder: pathlib.Path, vocabulary: Vocabulary, size: int) -> None:
    """Raises UserError where the tokens of a text will not fit onto the disk."""
    # Tokens of a byte, a character in bytes; words and pieces are longer on average.
    per_token = 1 if vocabulary.unit in ("bytes", "chars") else 3
    need = size * vocabulary.dtype.itemsize // per_token
    storage.check_room(folder, need, "the tokens")


def payload(text: Text) -> str:
    """The sha256 of a text, given by splits.

    A run finds its text again by it, and a result says what it was measured on.
    """
    # Of the raw bytes: a checksum of tokens would depend on the vocabulary too.
    digest = hashlib.sha256()
    with progress.counting("looking for the text", text.size):
        for split in sources.SPLITS:
            for document in text.splits[split]:
                for block in document.blocks():
                    digest.update(block)
                    progress.passed(len(block))
    return digest.hexdigest()


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
    calls = [(job, empty) for x in splits for job in _jobs(recipe, builder, x)]
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


def words_are(lines: bool) -> str:
    """What `words` counts, as cards say it."""
    return "between white space" + ", and <eos> of each line" * lines


def _digest(key: dict) -> str:
    # 64 bits tell a user's folders apart and keep their names short.
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
