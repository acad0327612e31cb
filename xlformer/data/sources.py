"""The public corpora: where they come from, their checksums, and how they are read."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from xlformer.data import documents, images, lm1b, pg19, proteins
from xlformer.data.archives import Archive, Origin, Reader
from xlformer.data.corpus import Corpus
from xlformer.data.documents import Document, Source, Text
from xlformer.errors import UserError, did_you_mean
from xlformer.fields import SPLITS

_METAMIND = "https://s3.amazonaws.com/research.metamind.io/wikitext"
_PENN = "simple-examples/data/ptb"
_MIKOLOV = Archive(
    "simple-examples.tgz",
    ("http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz",),
)

CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "enwik8",
            "bytes",
            (
                Archive(
                    "enwik8.zip",
                    (
                        "http://mattmahoney.net/dc/enwik8.zip",
                        "https://data.deepai.org/enwik8.zip",
                    ),
                    "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
                ),
            ),
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
            (
                Archive(
                    "text8.zip",
                    ("http://mattmahoney.net/dc/text8.zip",),
                    "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
                ),
            ),
            {
                "text8": "6e890197040d37d85beb962ae1f041ff"
                "1d9a9ca8d20c7d99c85027eebf51dca7",
            },
            cut=(90_000_000, 5_000_000),
        ),
        Corpus(
            "wikitext103",
            "words",
            (
                Archive(
                    "wikitext-103-v1.zip",
                    (f"{_METAMIND}/wikitext-103-v1.zip",),
                    "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
                ),
            ),
            # The members need no checksum beside the archive's.
            {f"wikitext-103/wiki.{s}.tokens": "" for s in ("train", "valid", "test")},
            protocol=(
                "perplexity per word, of which every <unk> of the text and the <eos> "
                "of each line is one, whatever the tokens are; SHA-RNN's figures by "
                "word pieces were withdrawn by its second version (normalization)"
            ),
            lines=True,
        ),
        Corpus(
            "wikitext2",
            "words",
            (
                Archive(
                    "wikitext-2-v1.zip",
                    (f"{_METAMIND}/wikitext-2-v1.zip",),
                    "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
                ),
            ),
            {f"wikitext-2/wiki.{s}.tokens": "" for s in ("train", "valid", "test")},
            lines=True,
        ),
        Corpus(
            "penn",
            "words",
            (_MIKOLOV,),
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
            (_MIKOLOV,),
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
        lm1b.CORPUS,
        pg19.CORPUS,
        images.CORPUS,
        proteins.CORPUS,
    )
}


def public(name: str) -> Corpus:
    """The public corpus of that name."""
    if name not in CORPORA:
        near = did_you_mean(name, [*CORPORA, "stdlib", "text"])
        raise UserError(f"config.data.corpus={name}: no such corpus{near}")
    return CORPORA[name]


def read(corpus: Corpus, dl, manual_dir: str) -> Text:
    """Reads a public corpus through a TFDS download manager, or from manual_dir.

    dl.manual_dir is not used: TFDS allows it only to builders that cannot download.
    """
    origin = Origin(corpus.name, corpus.archives, dl, manual_dir)
    try:
        text = corpus.read(origin) if corpus.read else _read_files(corpus, origin)
    except UserError as error:
        raise UserError(*error.parts, "; ", *origin.remedy()) from None
    protocol = {"protocol": corpus.protocol} if corpus.protocol else {}
    # In place: a reader may go on to fill its facts.
    text.facts.update(origin.facts | protocol)
    return text


def _read_files(corpus: Corpus, origin: Origin) -> Text:
    if origin.has(corpus.archive):
        reading = functools.partial(_members, corpus, origin)
        return origin.first(corpus.archive, reading)
    found, folder = {}, origin.folder
    for member in corpus.files:
        name = member.rpartition("/")[2]
        # The field's scripts rename ptb.char.train.txt to train.txt.
        plain = ".".join(name.split(".")[-2:])
        places = (folder / place for place in (name, plain, member))
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            archive = corpus.archive.file
            line = f"{corpus.name}: {folder} holds neither {archive} nor {name}"
            raise UserError(line)
        found[member] = documents.source(os.fspath(path))
    return _cut(corpus, origin, found)


def _members(corpus: Corpus, origin: Origin, archive: Source) -> Text:
    found = {}
    # The checksums of its members say more, and not all archives are pinned.
    origin.facts = {"files_sha256": {}, "unpinned": []}
    for member in corpus.files:
        open_ = functools.partial(_opened, archive, corpus.archive.file, member)
        try:
            with open_() as file:
                size = file.seek(0, io.SEEK_END)
        # AttributeError: extractfile gives None for a directory or a link.
        except (*documents.UNREADABLE, KeyError, AttributeError) as error:
            if isinstance(error, zipfile.BadZipFile | tarfile.TarError):
                line = f"{archive.name}: not {corpus.archive.file}: {error}"
            else:
                line = f"{archive.name}: cannot read {member}: {error}"
            raise UserError(line) from None
        found[member] = documents.Member(f"{archive.name}: {member}", size, open_)
    return _cut(corpus, origin, found)


@contextlib.contextmanager
def _opened(archive: Source, name: str, member: str) -> Iterator[BinaryIO]:
    # Members are read by their names. Nothing is unpacked, so no path in an archive can
    # lead out of a folder.
    file = Reader(archive)
    if name.endswith(".zip"):
        with zipfile.ZipFile(file) as opened, opened.open(member) as found:
            yield found
        return
    with tarfile.open(fileobj=file) as opened:
        # Members of the archive of 2010 begin with './', those of others do not.
        names = set(opened.getnames())
        found = next((n for n in (member, f"./{member}") if n in names), None)
        with opened.extractfile(opened.getmember(found or member)) as found:
            yield found


def _cut(corpus: Corpus, origin: Origin, files: Mapping[str, Source]) -> Text:
    for name, source in files.items():
        origin.verified(source, name, corpus.files[name])
    # In the order of corpus.files: train, validation, test.
    parts = [[Document(source, 0, source.size)] for source in files.values()]
    if corpus.cut:
        (whole,), (train, validation) = parts[0], corpus.cut
        bounds = [0, train, train + validation, max(len(whole), train + validation)]
        parts = documents.cut([whole], bounds)
    splits = dict(zip(SPLITS, parts, strict=True))
    documents.check_not_empty(splits, f"{corpus.name} ({', '.join(files)})")
    return Text(splits, {})
