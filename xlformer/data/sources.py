"""The public corpora: where they come from, their checksums, and reading them.

Mirrors die: the URLs are tried in order, the checksums decide, and the error names the
file to put under manual_dir.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import logging
import os
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from etils import epath

from xlformer import progress, storage
from xlformer.data import documents
from xlformer.data.documents import Document, Text
from xlformer.errors import Argument, UserError, did_you_mean
from xlformer.fields import SPLITS


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A public corpus: an archive, the files in it, and how its field reads them."""

    name: str
    unit: str  # bytes, chars or words.
    archive: str  # Its file name under manual_dir.
    urls: tuple[str, ...]  # Tried in order; the checksums decide.
    # '' where nobody published one that others confirm: members are pinned instead.
    archive_sha256: str
    files: Mapping[str, str]  # Path in the archive -> sha256: one, or one a split.
    cut: tuple[int, int] = ()  # Of one file: the bytes of train and of validation.
    lines: bool = False  # Every line ends in the token <eos>.
    spaced: bool = False  # Characters stand between spaces, and '_' is the space.
    lower: bool = False  # The field lower-cases it.


_METAMIND = "https://s3.amazonaws.com/research.metamind.io/wikitext"
_MIKOLOV = "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz"
_PENN = "simple-examples/data/ptb"

CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "enwik8",
            "bytes",
            "enwik8.zip",
            (
                "http://mattmahoney.net/dc/enwik8.zip",
                "https://data.deepai.org/enwik8.zip",
            ),
            "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
            {
                "enwik8": "2b49720ec4d78c3c9fabaee6e4179a5e"
                "997302b3a70029f30f2d582218c024a8",
            },
            # The last 5 million bytes are the test split, as in all published results.
            cut=(90_000_000, 5_000_000),
        ),
        Corpus(
            "text8",
            "chars",
            "text8.zip",
            ("http://mattmahoney.net/dc/text8.zip",),
            "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
            {
                "text8": "6e890197040d37d85beb962ae1f041ff"
                "1d9a9ca8d20c7d99c85027eebf51dca7",
            },
            cut=(90_000_000, 5_000_000),
        ),
        Corpus(
            "wikitext103",
            "words",
            "wikitext-103-v1.zip",
            (f"{_METAMIND}/wikitext-103-v1.zip",),
            "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
            # The members need no checksum beside the archive's.
            {f"wikitext-103/wiki.{s}.tokens": "" for s in ("train", "valid", "test")},
            lines=True,
        ),
        Corpus(
            "wikitext2",
            "words",
            "wikitext-2-v1.zip",
            (f"{_METAMIND}/wikitext-2-v1.zip",),
            "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
            {f"wikitext-2/wiki.{s}.tokens": "" for s in ("train", "valid", "test")},
            lines=True,
        ),
        Corpus(
            "penn",
            "words",
            "simple-examples.tgz",
            (_MIKOLOV,),
            "",
            {
                f"{_PENN}.train.txt": "fcea919f6cf83f35d4d00c6cbf08040d"
                "13d4155226340912e2fef9c9c4102cbf",
                f"{_PENN}.valid.txt": "c9fe6985fe0d4ccb578183407d7668fc"
                "6066c20700cb4cf87d8ff1cc34df1bf2",
                f"{_PENN}.test.txt": "dd65dff31e70846b2a6030a87482edcd"
                "5d199130cdcfa1f3dccbb033728deee0",
            },
            lines=True,
            lower=True,
        ),
        Corpus(
            "pennchar",
            "chars",
            "simple-examples.tgz",
            (_MIKOLOV,),
            "",
            {
                f"{_PENN}.char.train.txt": "e313d91425e06c4f0a8fb6e881dcce0c"
                "291f2a0e9f4dda54833069b122f91da9",
                f"{_PENN}.char.valid.txt": "21661f63ec355085879458b6524644d4"
                "add5573541b4be14fb52ab2e2e995eb8",
                f"{_PENN}.char.test.txt": "1ef5607ac3c463b16e38bfe7900dd3bf"
                "c91de5a96e0f21e7eab5188b465b8ebe",
            },
            lines=True,
            spaced=True,
        ),
    )
}


def public(name: str) -> Corpus:
    """The public corpus of that name."""
    if name not in CORPORA:
        near = did_you_mean(name, [*CORPORA, "stdlib", "text"])
        raise UserError(f"config.data.corpus={name}: no such corpus{near}")
    return CORPORA[name]


def read_archive(corpus: Corpus, dl, manual_dir: str) -> Text:
    """Reads a public corpus through a TFDS download manager, or from manual_dir.

    dl.manual_dir is not used: TFDS allows it only to builders that cannot download.
    """
    if manual_dir:
        try:
            return _read_manual(corpus, storage.path(manual_dir))
        except UserError as error:
            raise UserError(*error.parts, "; ", *_remedy(corpus)) from None
    reasons = []
    for url in corpus.urls:
        try:
            _reach(url)
            path = epath.Path(dl.download(url))
        # Whatever the HTTP library of TFDS raises, the next source is tried.
        except Exception as error:
            reasons.append(f"{url}: {type(error).__name__}: {str(error)[:120]}")
            continue
        try:
            return _cut(corpus, _read_members(corpus, path, url))
        except UserError as error:
            reasons.append(str(error))
            # TFDS would take the same file from its cache the next time.
            for stale in path.parent.glob(f"{path.name}*"):
                stale.unlink()
    reasons = "; ".join(dict.fromkeys(reasons))
    line = f"{corpus.name}: no source worked: {reasons}; "
    raise UserError(line, *_remedy(corpus))


def _reach(url: str) -> None:
    """Raises OSError at once where nobody answers: TFDS retries for three minutes."""
    try:
        urllib.request.urlopen(url, timeout=30).close()
    except urllib.error.HTTPError:
        # Somebody answers: TFDS may ask in another way, or will say what is wrong.
        pass


def _remedy(corpus: Corpus) -> tuple:
    pinned = f"sha256 {corpus.archive_sha256}" if corpus.archive_sha256 else "unpinned"
    return (
        f"put {corpus.archive} ({pinned}) or the files in it into a directory "
        "and pass ",
        Argument("manual_dir", "DIR"),
        " (config.data.manual_dir)",
    )


def _read_manual(corpus: Corpus, folder: epath.Path) -> Text:
    if not folder.is_dir():
        raise UserError(f"config.data.manual_dir={folder}: no such directory")
    if (folder / corpus.archive).exists():
        path = folder / corpus.archive
        return _cut(corpus, _read_members(corpus, path, str(path)))
    found = {}
    for member, expected in corpus.files.items():
        name = member.rpartition("/")[2]
        # The field's scripts rename ptb.char.train.txt to train.txt.
        plain = ".".join(name.split(".")[-2:])
        path = next((folder / n for n in (name, plain) if (folder / n).is_file()), None)
        if path is None:
            raise UserError(
                f"{corpus.name}: {folder} holds neither {corpus.archive} nor {name}"
            )
        source = documents.source(os.fspath(path))
        found[member] = source, _verified(corpus, source, expected)
    return _cut(corpus, found)


def _read_members(corpus: Corpus, path: epath.Path, origin: str) -> dict:
    # Before it is opened: a parser sees only what the checksum allows, where there is
    # one.
    archive = documents.source(os.fspath(path), origin)
    _verified(corpus, archive, corpus.archive_sha256)
    found = {}
    for member, expected in corpus.files.items():
        name = f"{origin}: {member}"
        open_ = functools.partial(_opened, path, corpus.archive, member)
        try:
            with open_() as file:
                size = file.seek(0, io.SEEK_END)
        # AttributeError: extractfile gives None for a directory or a link.
        except (*documents.UNREADABLE, KeyError, AttributeError) as error:
            if isinstance(error, zipfile.BadZipFile | tarfile.TarError):
                raise UserError(f"{origin}: not {corpus.archive}: {error}") from None
            raise UserError(f"{origin}: cannot read {member}: {error}") from None
        source = documents.Member(name, size, open_)
        found[member] = source, _verified(corpus, source, expected)
    return found


@contextlib.contextmanager
def _opened(path: epath.Path, archive: str, member: str) -> Iterator[BinaryIO]:
    # Members are read by their names. Nothing is unpacked, so no path in an archive can
    # lead out of a folder.
    with path.open("rb") as file:
        if archive.endswith(".zip"):
            with zipfile.ZipFile(file) as opened, opened.open(member) as found:
                yield found
            return
        with tarfile.open(fileobj=file) as opened:
            # Members of the archive of 2010 begin with './', those of others do not.
            names = set(opened.getnames())
            name = next((n for n in (member, f"./{member}") if n in names), None)
            with opened.extractfile(opened.getmember(name or member)) as found:
                yield found


def _verified(corpus: Corpus, source: documents.Source, expected: str) -> str:
    """The sha256 of all of a source, which is as expected."""
    digest = hashlib.sha256()
    with progress.counting(f"reading {source.name}", source.size):
        for block in source.pieces(0, source.size):
            digest.update(block)
            progress.passed(len(block))
    found = digest.hexdigest()
    if not expected:
        logging.getLogger(__name__).warning(
            "%s: no checksum is pinned for %s; found sha256 %s",
            corpus.name,
            source.name,
            found,
        )
    elif found != expected:
        raise UserError(
            f"{corpus.name}: wrong checksum of {source.name}: expected sha256"
            f" {expected}, found {found} ({source.size} bytes)"
        )
    return found


def _cut(corpus: Corpus, files: Mapping[str, tuple]) -> Text:
    facts = {
        "files_sha256": {name: found for name, (_, found) in files.items()},
        "unpinned": [n for n, expected in corpus.files.items() if not expected],
    }
    # In the order of corpus.files: train, validation, test.
    parts = [[Document(source, 0, source.size)] for source, _ in files.values()]
    if corpus.cut:
        (whole,), (train, validation) = parts[0], corpus.cut
        bounds = [0, train, train + validation, max(len(whole), train + validation)]
        parts = documents.cut([whole], bounds)
    splits = dict(zip(SPLITS, parts, strict=True))
    check_not_empty(splits, f"{corpus.name} ({', '.join(files)})")
    return Text(splits, facts)


def check_not_empty(splits: Mapping[str, list[Document]], origin: str) -> None:
    """Raises UserError naming the split that has no text."""
    for split, found in splits.items():
        if not any(found):
            raise UserError(f"{origin}: the text is empty: split {split!r}")
