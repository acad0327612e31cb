"""PG-19: books of Project Gutenberg from before 1919, a text file each.

Three folders of files and a metadata.csv, which is not read, in a public bucket or in a
copy of it. The counts are those of the README of github.com/google-deepmind/pg19; sums
of the files are published nowhere.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Iterator

from etils import epath

from xlformer import storage
from xlformer.data import documents, local
from xlformer.data.archives import Archive, Origin
from xlformer.data.corpus import Corpus
from xlformer.data.documents import Document, Text
from xlformer.errors import UserError
from xlformer.fields import SPLITS

BUCKET = "gs://deepmind-gutenberg"
BOOKS = dict(zip(SPLITS, (28_602, 50, 100), strict=True))
WORDS = dict(zip(SPLITS, (1_973_136_207, 3_007_061, 6_966_499), strict=True))
PROTOCOL = (
    "PG-19's README: perplexity per word, exp(nats of the whole split / its words),"
    " with `words_published`. Choromanski et al. 2020: 32,768 SentencePiece pieces of"
    " a model that is not published, and exp(m x loss) with m pieces a word: 1.5634 on"
    " train, 1.5487 on validation, 1.5359 on test. Ours: the pieces of `tokenizer`,"
    " which leave out nothing of the text, and `words` between white space of the text"
    " that was read"
)
# Requests that are under way at once, of a bucket.
AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Books:
    """The books of a split, opened one after the other whenever they are iterated."""

    paths: tuple[epath.Path, ...]
    size: int  # of all of them, in bytes

    def __iter__(self) -> Iterator[Document]:
        return map(_book, self.paths)


def read(origin: Origin) -> Text:
    """The books under manual_dir, or under the bucket itself, ordered by name.

    UserError where a split is missing; an empty book is one when its turn comes.
    """
    root = storage.path(BUCKET) if origin.folder is None else origin.folder
    try:
        splits = {split: _books(root, split) for split in SPLITS}
    except UserError:
        raise
    except Exception as error:
        line = f"pg19: {root}: cannot be read"
        raise storage.unreadable(line, root, error) from error
    origin.facts["unpinned"] += [f"{split}/*.txt" for split in SPLITS]
    facts = {
        "books": {split: len(books.paths) for split, books in splits.items()},
        "books_published": BOOKS,
        "words_published": WORDS,
    }
    return Text(splits, facts, sum(books.size for books in splits.values()))


def _books(root: epath.Path, split: str) -> Books:
    folder = root / split
    names = []
    if folder.is_dir():
        names = sorted(x.name for x in folder.iterdir() if x.name.endswith(".txt"))
    if not names:
        raise UserError(
            f"pg19: {folder} has no books (*.txt): the form is"
            f" {', '.join(f'{s}/' for s in SPLITS)} of one .txt file a book, as in"
            f" {BUCKET}"
        )
    paths = tuple(folder / name for name in names)
    # One request each, of a bucket; asked one by one they take a quarter of an hour.
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        size = sum(pool.map(lambda path: path.stat().length, paths))
    return Books(paths, size)


def _book(path: epath.Path) -> Document:
    name = str(path)
    try:
        book = local.plain_text(_source(path), "pieces")
        blank = not any(block.strip() for block in book.blocks())
    except UserError:
        raise
    except Exception as error:
        line = f"pg19: {name}: cannot be read"
        raise storage.unreadable(line, name, error) from error
    if blank:
        raise UserError(f"pg19: {name}: the book is empty")
    return book


def _source(path: epath.Path) -> documents.Source:
    """Of a bucket, a copy: a book is gone through three times."""
    if not storage.is_remote(path):
        return documents.source(str(path))
    with path.open("rb") as file:
        return documents.Copied(str(path), file.read)


CORPUS = Corpus(
    "pg19",
    "words",
    # A folder, whose files have no published sums.
    (Archive("train/, validation/ and test/ of one .txt file a book"),),
    read=read,
    protocol=PROTOCOL,
    pieces="sentencepiece:32768",
    documents=True,
    free=True,
)
