"""One shard of a text: counted, and encoded into a file. Nothing here imports JAX.

Each shard is a function of its records alone, so that any process can make it, in any
order, and make it again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from etils import epath

from xlformer import progress, storage
from xlformer.data import corpora, parts, shards, vocabularies
from xlformer.data.utf8 import WHITE
from xlformer.data.vocabulary import Vocabulary

# What is known of a finished shard lies beside it until all are finished.
DONE = ".done"


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


class Encoded(NamedTuple):
    """A shard that has been written, and what is in it."""

    shard: shards.Shard
    words: int
    documents: list[int]  # Where documents begin, in tokens from its beginning.


@functools.lru_cache(maxsize=2)
def _builder(store: str):
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(store)


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
    words_, documents, tokens = 0, [], 0
    with shards.writer(path, known.dtype) as write:
        for part in _records(job):
            if not part.offset:
                documents.append(tokens)
            ids = known.encode_part(part, where=job.where)
            write(ids)
            tokens += len(ids)
            words_ += words(part, spaced=counts.spaced, lines=counts.lines)
    folder, _, file = path.rpartition("/")
    size = tokens * known.dtype.itemsize + len(shards.header(known.dtype, 0))
    shard = shards.Shard(file, tokens, size, *shards.checksums(path))
    found = Encoded(shard, words_, documents)
    about = [corpora.VERSION, job.start, job.stop, *found]
    storage.write(epath.Path(path + DONE), json.dumps(about))
    return found


def _done(job: Job, path: str) -> Encoded | None:
    """What is known of a shard that was finished; None where it is not as it was."""
    try:
        with open(path + DONE, encoding="utf-8") as file:
            version, start, stop, shard, words_, documents = json.load(file)
        found = Encoded(shards.Shard(*shard), words_, documents)
        about = version, start, stop, shards.checksum(path)
    except (OSError, ValueError, TypeError):
        return None
    is_it = about == (corpora.VERSION, job.start, job.stop, found.shard.sha256)
    return found if is_it else None


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
