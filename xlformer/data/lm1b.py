"""One Billion Word (Chelba et al. 2013): sentences, shuffled and cut into files.

Published figures, those of Transformer-XL among them, are of the first held-out file,
which the original takes for validation too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from xlformer import storage
from xlformer.data import archives, documents
from xlformer.data.archives import Archive, Origin
from xlformer.data.corpus import Corpus
from xlformer.data.documents import Document, Joined, Source, Text
from xlformer.data.utf8 import Utf8
from xlformer.errors import UserError

_NAME = "1-billion-word-language-modeling-benchmark-r13output"
_TRAIN = "training-monolingual.tokenized.shuffled"
_HELDOUT = "heldout-monolingual.tokenized.shuffled"
# The file of number 0 was held out, and cut into those of the other folder.
_SHARD = re.compile(rf"{_TRAIN}/news\.en-(?!00000)(\d{{5}})-of-00100")
_TEST = f"{_HELDOUT}/news.en.heldout-00000-of-00050"
_SHARDS = 99


def read(origin: Origin) -> Text:
    """All training files in the order of their numbers, and the first held-out one."""
    archive = CORPUS.archive
    if origin.has(archive):
        found = origin.first(archive, lambda source: _members(origin, source))
    else:
        found = origin.found(f"{_TRAIN}/news.en-*-of-00100")
        found |= origin.found(_TEST)
        _check(found, f"{origin.folder} has neither {archive.file} nor its files")
    found = {name: _checked(name, document) for name, document in found.items()}
    train = [found[name] for name in sorted(found) if _SHARD.fullmatch(name)]
    # One document: sentences follow each other, from file to file.
    joined = Joined("lm1b train", list(_closed(train)))
    test = [found[_TEST]]
    splits = {
        "train": [Document(joined, 0, joined.size)],
        "validation": test,
        "test": test,
    }
    facts = {"training_files": f"{len(train)} of {_SHARDS}"}
    if len(train) < _SHARDS:
        facts["incomplete"] = f"{len(train)} of its {_SHARDS} training files"
    return Text(splits, facts)


class _File(Source):
    """A file of the corpus: what of it is not UTF-8 is said by its name."""

    __slots__ = ("_document",)

    def __init__(self, name: str, document: Document):
        self.name, self.size, self._document = name, len(document), document

    def pieces(self, start, stop):
        check = Utf8(self.name)
        for block in self._document.part(start, stop).blocks():
            # Only from its beginning on is it known where characters begin.
            if start == 0:
                check.add(block)
            yield block
        if start == 0 and stop == self.size:
            check.end()


def _checked(name: str, document: Document) -> Document:
    return Document(_File(f"lm1b: {name}", document), 0, len(document))


def _closed(files: list[Document]) -> Iterator[Document]:
    """The files; where the last line of one is open, it does not go on in the next."""
    for number, document in enumerate(files, 1):
        yield document
        end = document.part(len(document) - 1, len(document)).read()
        if end != b"\n" and number < len(files):
            yield documents.of_bytes(b"\n")


def part(manual_dir: str) -> dict:
    """How many training files lie there, unpacked; nothing of all or of the archive."""
    try:
        # Where tokens are prepared already, the folder may be gone.
        if not storage.path(manual_dir).is_dir():
            return {}
        origin = Origin(CORPUS.name, CORPUS.archives, None, manual_dir)
        if origin.has(CORPUS.archive):
            return {}
        names = origin.found(f"{_TRAIN}/news.en-*-of-00100")
    except UserError:
        raise
    except Exception as error:
        line = f"config.data.manual_dir={manual_dir}: cannot be read"
        raise storage.unreadable(line, manual_dir, error) from error
    count = sum(bool(_SHARD.fullmatch(name)) for name in names)
    return {} if count in (0, _SHARDS) else {"training_files": count}


def _members(origin: Origin, source) -> dict[str, Document]:
    found = {}
    for name, document in archives.members(origin, source, lambda name: True):
        # Within the folder that the archive has.
        short = "/".join(name.split("/")[-2:])
        if short == _TEST or _SHARD.fullmatch(short):
            found[short] = document
    _check(found, source.name)
    return found


def _check(found: dict[str, Document], where: str) -> None:
    """Raises UserError where a file is missing between others, or is empty."""
    numbers = {int(match[1]) for match in map(_SHARD.fullmatch, found) if match}
    expected = (f"{_TRAIN}/news.en-{n:05}-of-00100" for n in itertools.count(1))
    wanted = [*itertools.islice(expected, max(numbers, default=1)), _TEST]
    for name in wanted:
        if name not in found:
            raise UserError(f"lm1b: {where}: no {name}")
        if not found[name]:
            raise UserError(f"lm1b: {where}: {name} is empty")


CORPUS = Corpus(
    "lm1b",
    "words",
    (
        Archive(
            f"{_NAME}.tar.gz", (f"http://www.statmt.org/lm-benchmark/{_NAME}.tar.gz",)
        ),
    ),
    read=read,
    part=part,
    protocol=(
        "validation is test (heldout-00000), so that published figures were chosen by "
        "what they are measured on; memory runs on over sentences; TensorFlow's "
        "original scores two <S> a sentence, and its 21.8 and 23.5 divide by both; it "
        "takes training files as its file system lists them and shuffles the "
        "sentences of each, here they are in order; its vocabulary has 793,471 words"
    ),
    lines=True,
    begins=True,
    specials=("<S>", "</S>", "<UNK>"),
    unknown="<UNK>",
    min_count=3,
)
