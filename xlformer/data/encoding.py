"""One shard of a text: counted, and encoded into a file. Nothing here imports JAX.

Each shard is a function of its records alone, so that any process can make it, in any
order, and make it again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from etils import epath

from xlformer import progress, storage, strangers
from xlformer.data import corpora, parts, shards, utf8, vocabularies
from xlformer.data.utf8 import WHITE
from xlformer.data.vocabulary import NEWLINE, Vocabulary

# What is known of a finished shard lies beside it until all are finished.
DONE = ".done"
# Where its documents begin: of proteins there may be more than fit into memory.
STARTS = f".documents{DONE}"


def ready() -> None:
    """Imports what reads records, half a second that a process has before its work."""
    import tensorflow_datasets  # noqa: F401


class Job(NamedTuple):
    """Records `start` to `stop` of a split in the TFDS directory `store`."""

    store: str
    corpus: str
    split: str
    start: int
    stop: int

    @property
    def where(self) -> str:
        """What the text is called in errors."""
        return f"{self.corpus} {self.split}"


def jobs(builder, name: str, split: str) -> list[Job]:
    """The shards of a split of a corpus, in their order."""
    bounds = corpora.stored(builder)["splits"][split]["shards"]
    store = str(builder.data_path)
    return [
        Job(store, name, split, start, stop)
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]


@dataclasses.dataclass(frozen=True)
class Counts:
    """How words are counted: the arguments of `words`."""

    spaced: bool
    lines: bool
    line_documents: bool = False  # Each line is a document, and no newline a token.
    characters: bool = False  # Which there are is found, too.


class Encoded(NamedTuple):
    """A shard that has been written, and what is in it."""

    shard: shards.Shard
    words: int
    documents: int  # So many begin in it.
    characters: str  # Which there are, where they are counted.

    def starts(self, folder) -> np.ndarray:
        """Where documents begin, in tokens from the shard's beginning."""
        return np.fromfile(f"{folder}/{self.shard.file}{STARTS}", np.int64)


@functools.lru_cache(maxsize=2)
def _builder(store: str):
    return corpora.opened(store)


def _records(job: Job):
    for _, part in corpora.records(_builder(job.store), job.split, job.start, job.stop):
        yield part
        progress.passed(len(part.data))


@functools.lru_cache(maxsize=1)
def vocabulary(path: str) -> Vocabulary:
    """A stored vocabulary, which is read once for all shards."""
    return vocabularies.load(path)


def count(job: Job, empty: Callable):
    """What a counter that empty() makes finds in a shard."""
    counter = empty()
    for part in _records(job):
        counter.add(part, job.corpus)
    return counter.found()


def encode(job: Job, vocabulary_path: str, path: str, counts: Counts) -> Encoded:
    """Writes the tokens of a shard to a path, unless a killed process has done so."""
    known = vocabulary(vocabulary_path)
    if (found := _done(job, path)) is not None:
        return found
    words_, documents, tokens, characters = 0, 0, 0, utf8.Characters()
    with shards.writer(path, known.dtype) as write, open(path + STARTS, "wb") as file:
        for part in _records(job):
            starts = np.zeros(int(not part.offset), np.int64)
            if counts.line_documents:
                starts = line_starts(part)
            (starts + tokens).tofile(file)
            documents += len(starts)
            ids = known.encode_part(part, where=job.where)
            write(ids)
            tokens += len(ids)
            words_ += words(part, spaced=counts.spaced, lines=counts.lines)
            if counts.characters:
                characters.add(part.data)
    folder, _, file = path.rpartition("/")
    size = tokens * known.dtype.itemsize + len(shards.header(known.dtype, 0))
    shard = shards.Shard(file, tokens, size, *shards.checksums(path))
    found = Encoded(shard, words_, documents, characters.found())
    about = [corpora.VERSION, job.start, job.stop, *found]
    storage.write(epath.Path(path + DONE), json.dumps(about))
    return found


def _done(job: Job, path: str) -> Encoded | None:
    """What is known of a shard that was finished; None where it is not as it was."""
    try:
        version, start, stop, shard, *counted = strangers.read_json(path + DONE)
        found = Encoded(shards.Shard(*shard), *counted)
        about = version, start, stop, shards.checksum(path)
        if os.path.getsize(path + STARTS) != found.documents * np.int64().nbytes:
            return None
    except (OSError, ValueError, TypeError):
        return None
    is_it = about == (corpora.VERSION, job.start, job.stop, found.shard.sha256)
    return found if is_it else None


def line_starts(part: parts.Part) -> np.ndarray:
    """Where lines begin among the bytes of a part that are no newlines."""
    ends = np.flatnonzero(np.frombuffer(part.data, np.uint8) == NEWLINE)
    # As many newlines stand before a line as lines do.
    starts = np.concatenate([[0], ends + 1]) - np.arange(len(ends) + 1)
    if part.data.endswith(b"\n"):
        starts = starts[:-1]
    return starts[int(part.in_line) :]


def words(part: parts.Part, *, spaced: bool, lines: bool) -> int:
    """Words by which a per-word perplexity divides, whatever the unit is.

    Args:
      part: of a text.
      spaced: whether its characters stand between spaces.
      lines: whether the end of each line is a word.
    """
    data = part.data
    if spaced:
        # Penn's characters stand between spaces, and '_' is the space of the text.
        data = data.replace(b" ", b"").replace(b"_", b" ")
    found = 0
    if lines:
        # Of spaces alone nothing is left: the line was closed before them.
        closed = data.endswith(b"\n") or not (data or part.in_line or not part.offset)
        found = data.count(b"\n") + (part.ends and not closed)
    space = np.frombuffer(data.translate(WHITE), bool)
    found += int(np.count_nonzero(space[:-1] & ~space[1:]))
    return found + int(len(space) > 0 and not part.in_word and not space[0])
