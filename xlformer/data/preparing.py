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
from collections.abc import Mapping

import numpy as np

from xlformer import progress, storage
from xlformer.data import corpora, counting, recipes, sources
from xlformer.data.folders import CARD, complete
from xlformer.data.prepared import FORMAT, Prepared, load
from xlformer.data.recipes import Recipe
from xlformer.data.vocabulary import SPACES, Vocabulary
from xlformer.errors import UserError, some

# Bytes in which words are counted at a time, which bounds what the masks take.
BLOCK = 1 << 24
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
    # Tokens are mapped from a local copy of what lies in the remote directory.
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
    texts = {split: corpora.read_split(builder, split) for split in sources.SPLITS}
    # Words are counted first, and then found: twice through the text.
    total = sum(len(x) for documents in texts.values() for x in documents)
    total *= 1 if recipe.tokenizer else 2
    with progress.counting(f"preparing {recipe.name}", total):
        _encode(folder, recipe, builder, texts)


def _encode(folder: pathlib.Path, recipe: Recipe, builder, texts) -> None:
    """Fills the folder: tokens and documents of each split, vocabulary and card."""
    vocabulary = _count(recipe, texts)
    if recipe.tokenizer:
        _say_what_is_lost(recipe.tokenizer, texts)
    splits = {}
    for split, documents in texts.items():
        where = f"{recipe.name} {split}"
        parts = [vocabulary.encode(document, where=where) for document in documents]
        tokens = np.concatenate(parts)
        if not tokens.size:
            size = sum(map(len, documents))
            raise UserError(f"{where}: its {size} bytes make no token")
        if split == "train" and recipe.tokenizer:
            # A tokenizer's file has no counts; those of train are what others have.
            counts = np.bincount(tokens, minlength=vocabulary.size)
            vocabulary = vocabulary.with_counts(counts)
        np.save(folder / f"{split}.npy", tokens, allow_pickle=False)
        if recipe.documents:
            starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
            np.save(folder / f"{split}-documents.npy", starts.astype(np.int64))
        splits[split] = {
            "tokens": len(tokens),
            "bytes": sum(map(len, documents)),
            "words": _words(recipe, documents, len(tokens)),
            "sha256": _sha256((folder / f"{split}.npy").read_bytes()),
        }
        # In the public corpora `<unk>` is a word of the published text.
        unk_id = None if recipe.corpus else getattr(vocabulary, "unk_id", None)
        if unk_id is not None:
            unknown = np.count_nonzero(tokens == unk_id)
            splits[split]["unknown_share"] = round(unknown / len(tokens), 6)
    bounds = {"min_count": recipe.min_count, "max_vocab": recipe.max_vocab}
    card = {
        "format": FORMAT,
        "corpus": recipe.name,
        "unit": recipe.unit,
        "newline": recipe.newline,
        "documents": recipe.documents,
        "vocabulary_size": vocabulary.size,
        "payload_sha256": payload(texts),
        "words_are": words_are(recipe.lines),
        **dict(builder.info.metadata),
        **(bounds if recipe.own_words else {}),
        "splits": splits,
    }
    (folder / "vocabulary.json").write_text(vocabulary.to_json(), encoding="utf-8")
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def payload(texts: Mapping[str, list[bytes]]) -> str:
    """The sha256 of a text, given by splits.

    A run finds its text again by it, and a result says what it was measured on.
    """
    # Of the raw bytes: a checksum of tokens would depend on the vocabulary too.
    digest = hashlib.sha256()
    for split in sources.SPLITS:
        for document in texts[split]:
            digest.update(document)
    return digest.hexdigest()


def _say_what_is_lost(tokenizer, texts: Mapping[str, list[bytes]]) -> None:
    lines = []
    if not tokenizer.line_ends:
        lines.append("does not keep line ends: newlines are lost")
    if lost := tokenizer.dropped(itertools.chain(*texts.values())):
        shown = some(map(repr, lost))
        lines.append(f"makes no token of {len(lost)} characters of the text: {shown}")
    for line in lines:
        line = f"config.data.tokenizer {line}"
        print(f"xlformer: {line}", file=sys.stderr, flush=True)


def _count(recipe: Recipe, texts: Mapping[str, list[bytes]]) -> Vocabulary:
    if recipe.tokenizer:
        return recipe.tokenizer
    everything = (document for split in texts.values() for document in split)
    corpus = recipe.corpus
    if recipe.unit == "words" or (corpus and corpus.spaced):
        found = counting.count_words(
            # Words of validation and test alone would have no trained vectors;
            # characters and bytes are few, and all are taken, as the original does.
            texts["train"] if recipe.unit == "words" else everything,
            specials=("<eos>",) if corpus else OWN_SPECIALS,
            min_count=recipe.min_count,
            max_size=recipe.max_vocab,
            unit=recipe.unit,
            lower=bool(corpus and corpus.lower),
            where=recipe.name,
        )
        if recipe.own_words and found.size == len(OWN_SPECIALS):
            raise UserError(
                f"config.data.min_count={recipe.min_count} leaves no word: all"
                f" {found.counts_V[1]} of train would be <unk>;"
                " config.data.min_count=1 keeps them"
            )
        return found
    if recipe.unit == "chars":
        return counting.count_chars(everything, where=recipe.name)
    # A public corpus has the symbols its field counts; elsewhere any byte may come.
    return counting.count_bytes(
        everything, newline=recipe.newline, every=corpus is None or recipe.every_byte
    )


def _words(recipe: Recipe, documents: list[bytes], tokens: int) -> int:
    if recipe.unit == "words":
        return tokens
    spaced = bool(recipe.corpus and recipe.corpus.spaced)
    return words(documents, spaced=spaced, lines=recipe.lines)


def words_are(lines: bool) -> str:
    """What `words` counts, as cards say it."""
    return "between white space" + ", and <eos> of each line" * lines


def words(documents: list[bytes], *, spaced: bool, lines: bool) -> int:
    """Words by which a per-word perplexity divides, whatever the unit is.

    Args:
      documents: of a text.
      spaced: whether its characters stand between spaces.
      lines: whether the end of each line is a word.
    """
    total = 0
    for document in documents:
        if spaced:
            # Penn's characters stand between spaces, and '_' is the space of the text.
            document = document.replace(b" ", b"").replace(b"_", b" ")
        if lines:
            total += document.count(b"\n") + (not document.endswith(b"\n"))
        # Whether the byte before the block is a space: words go on across blocks.
        outside = True
        for start in range(0, len(document), BLOCK):
            codes = np.frombuffer(document[start : start + BLOCK], np.uint8)
            space = np.isin(codes, SPACES)
            total += np.count_nonzero(space[:-1] & ~space[1:])
            total += int(outside and not space[0])
            outside = bool(space[-1])
    return int(total)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(key: dict) -> str:
    # 64 bits tell a user's folders apart and keep their names short.
    return _sha256(json.dumps(key, sort_keys=True).encode())[:16]
