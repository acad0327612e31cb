"""Raw corpus -> TFDS -> one token array per split, in a folder that is made once.

Batch size, segment length and host count play no part: one preparation serves all.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib

import numpy as np
from etils import epath

from xlformer import progress, storage
from xlformer.data import (
    corpora,
    documents,
    encoding,
    recipes,
    shards,
    sources,
    symbols,
    workers,
)
from xlformer.data.documents import Text
from xlformer.data.encoding import Encoded
from xlformer.data.folders import CARD, complete
from xlformer.data.prepared import FORMAT, VOCABULARY, Prepared, load
from xlformer.data.recipes import Recipe
from xlformer.data.vocabulary import Vocabulary
from xlformer.errors import UserError

# Bytes of text for each process that encodes it.
WORTH = 20_000_000
# In what cards say words are, where lines count.
OF_LINES = " of each line"


def prepare(data, *, directory=None, stored=False) -> Prepared:
    """Prepares what a config's data section describes, or finds it prepared.

    `directory` goes before config.data.directory, XLFORMER_DATA and ~/.cache/xlformer.
    Several processes may call at once: one works, the others wait for it. With `stored`
    the config was read from a work directory, which may be a stranger's: what lies in
    its config.data.directory is read, but nothing is made there.
    """
    recipe, name = _named(data)
    named = directory or data.directory
    if stored and named:
        card = storage.path(named) / name / CARD
        # Whoever wrote that config must not choose where this user writes.
        named = named if card.exists() else ""
    root = str(named or storage.cache())
    return opened(root, name, functools.partial(_build, recipe=recipe))


def is_prepared(data) -> bool:
    """Whether `prepare` would find everything made."""
    root = storage.path(data.directory or storage.cache())
    return (root / _named(data)[1] / CARD).exists()


def _named(data) -> tuple[Recipe, str]:
    """(what is made, the name of its folder)."""
    recipe = recipes.recipe(data)
    return recipe, f"{recipe.name}-{recipe.unit}-{_digest(recipe.key())}"


def opened(root: str, name: str, build=None) -> Prepared:
    """A prepared corpus, made by `build` where there is none."""
    if not storage.is_remote(root):
        return load(complete(pathlib.Path(storage.path(root)) / name, build))
    # What is small is read from a local copy of what lies in the remote directory.
    remote = storage.path(root) / name
    # XLFORMER_DATA may be the remote directory itself, so copies lie in the home.
    copies = pathlib.Path(storage.path(storage.DEFAULT_CACHE)) / "copies"
    folder = copies / _digest({"root": root}) / name
    return load(complete(folder, build, remote), remote)


def _build(folder: pathlib.Path, recipe: Recipe) -> None:
    with workers.Team(ready=encoding.ready) as team:

        def read(downloads) -> Text:
            text = recipe.read(downloads)
            # While the text is stored, which takes one process, the others get ready.
            team.grow(_processes(text.size))
            return text

        builder = corpora.build(
            recipe.name,
            read,
            folder.parent / "tfds" / _digest(recipe.source),
            download_dir=folder.parent / "downloads",
        )
        # Read back from the TFDS form and not taken from `read`: what is encoded is
        # what is stored.
        encoding.vocabulary.cache_clear()  # of another text, perhaps a large one
        splits = corpora.stored(builder)["splits"].values()
        total = sum(about["bytes"] for about in splits)
        team.grow(_processes(total))
        # Symbols are counted first, where no file has them, and then found.
        is_known = recipe.vocabulary or recipe.tokenizer or recipe.trained
        passes = 1 if is_known else 2
        with progress.counting(f"preparing {recipe.name}", passes * total):
            vocabulary = symbols.make(folder, recipe, builder, team)
            _check_room(folder, vocabulary, total)
            encoded = _encode(folder, recipe, builder, team)
    if recipe.tokenizer:
        found = set().union(
            *(x.characters for split in encoded.values() for x in split)
        )
        symbols.say_what_is_lost(recipe.tokenizer, "".join(sorted(found)))
    _finish(folder, recipe, builder, vocabulary, encoded)


def _encode(folder: pathlib.Path, recipe: Recipe, builder, team) -> dict:
    """The shards of each split, which are in the folder then."""
    spaced = bool(recipe.corpus and recipe.corpus.spaced)
    line_documents = bool(recipe.corpus and recipe.corpus.line_documents)
    is_file = bool(recipe.tokenizer)  # Others make tokens of all characters.
    counts = encoding.Counts(spaced, recipe.lines, line_documents, is_file)
    calls = []
    for split in sources.SPLITS:
        jobs = encoding.jobs(builder, recipe.name, split)
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
        counts = recipe.counts_unknown
        unk_id = getattr(vocabulary, "unk_id", None) if counts else None
        is_given = recipe.unit == "pieces" or bool(recipe.vocabulary)
        is_counted = is_given or unk_id is not None
        sha256, ids = _look_through(files, vocabulary, count, is_counted)
        if split == "train" and is_given:
            # A file has no counts; those of train are what others have.
            vocabulary = vocabulary.with_counts(ids)
        if recipe.documents:
            _write_documents(folder / f"{split}-documents.npy", found)
        words = sum(one.words for one in found)
        splits[split] = {
            "tokens": count,
            "bytes": size,
            "words": count - recipe.begins if recipe.unit == "words" else words,
            "sha256": sha256,
        }
        if unk_id is not None:
            splits[split]["unknown_share"] = round(int(ids[unk_id]) / count, 6)
    card = _card(recipe, builder, vocabulary, splits)
    card |= json.loads((folder / symbols.ABOUT).read_text(encoding="utf-8"))
    # Whole or not at all: whoever goes on after a kill reads it.
    storage.write(epath.Path(folder / VOCABULARY), vocabulary.to_json())
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
        "words_are": words_are(recipe.lines, recipe.eos),
        **facts,
        **({"record": recipe.corpus.record} if recipe.has_records else {}),
        **(bounds if recipe.min_count > 1 or recipe.own_words else {}),
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
    base = 0
    with shards.writer(path, np.dtype(np.int64)) as write:
        for one in found:
            write(one.starts(path.parent) + base)
            base += one.shard.tokens


def _check_room(folder: pathlib.Path, vocabulary: Vocabulary, size: int) -> None:
    """Raises UserError where the tokens of a text will not fit onto the disk."""
    # Tokens of a byte, a character in bytes; words and pieces are longer on average.
    per_token = 1 if vocabulary.unit in ("bytes", "chars") else 3
    need = size * vocabulary.dtype.itemsize // per_token
    storage.check_room(folder.parent, need, "the tokens")


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


def words_are(lines: bool, eos: str = "<eos>") -> str:
    """What `words` counts, as cards say it."""
    return "between white space" + f", and {eos}{OF_LINES}" * lines


def _digest(key: dict) -> str:
    # 64 bits tell a user's folders apart and keep their names short.
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
