"""Text that is already on this machine: your own files, and Python's standard library.

The standard library is the corpus that every machine has without a network.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import pathlib
import platform
import sysconfig

from xlformer import progress, storage, streams
from xlformer.data import documents
from xlformer.data.documents import (
    OF_A_PROCESS,
    Document,
    Source,
    Text,
    is_read_once,
)
from xlformer.data.units import Units
from xlformer.data.utf8 import ANY_FILE, Utf8
from xlformer.errors import UserError
from xlformer.fields import SPLITS

# Tests and generated tables would be a large part of the text, and site-packages is not
# the library's own.
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
LEFT_OUT |= {"site-packages"}
# Units that a text needs: of 10 both cuts, at 90 % and at 95 %, fall behind the ninth,
# and nothing is left between them.
LEAST = 11
ONCE = "a pipe can be read only once: save the text as a file, and name that to resume"
# How files begin that look like a text to people, and what makes a text of them. UTF-32
# comes first, because its little-endian mark begins with that of UTF-16.
CONVERT = "iconv -f {0} -t UTF-8 converts it"
KINDS = {
    codecs.BOM_UTF32_LE: ("UTF-32", CONVERT.format("UTF-32")),
    codecs.BOM_UTF32_BE: ("UTF-32", CONVERT.format("UTF-32")),
    codecs.BOM_UTF16_LE: ("UTF-16", CONVERT.format("UTF-16")),
    codecs.BOM_UTF16_BE: ("UTF-16", CONVERT.format("UTF-16")),
    b"%PDF-": ("a PDF", "pdftotext makes text of it"),
    b"PK\x03\x04": ("a zip archive or an office document", "unpack or export it"),
    b"\x1f\x8b": ("compressed by gzip", "gunzip it"),
    b"BZh91AY&SY": ("compressed by bzip2", "bunzip2 it"),
    b"\xfd7zXZ": ("compressed by xz", "unxz it"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unzstd it"),
}
# Bytes in which all of these can be seen.
HEAD = 16


def read_stdlib(root: str | None = None) -> Text:
    """Reads the interpreter's own library as bytes, cut into 90/5/5 %.

    Files stand in the order of the sha256 of their relative path: sorted by name, whole
    packages would fall into one split.
    """
    root = pathlib.Path(root or sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            f for f in folders if f not in LEFT_OUT and not f.startswith("config-")
        ]
        paths = (pathlib.Path(folder, name) for name in names)
        found += [path for path in paths if path.suffix == ".py"]
    if not found:
        raise UserError(f"config.data.corpus=stdlib: no .py files in {root}")
    relative = {path: path.relative_to(root).as_posix() for path in found}
    found.sort(key=lambda path: hashlib.sha256(relative[path].encode()).digest())
    data = documents.of_bytes(b"".join(path.read_bytes() for path in found))
    bounds = [0, len(data) * 90 // 100, len(data) * 95 // 100, len(data)]
    splits = dict(zip(SPLITS, documents.cut([data], bounds), strict=True))
    documents.check_not_empty(splits, f"stdlib ({root})")
    facts = {"python": platform.python_version(), "files": len(found)}
    return Text(splits, facts)


def read_files(path: str, unit: str) -> Text:
    """Your own files, each a document, cut into 90/5/5 % of all their units.

    With unit 'pieces', those of a tokenizer, the splits are counted in characters.
    """
    try:
        paths = _expand(path)
        sources = [documents.source(name) for name in paths]
        with progress.counting(f"reading {path}", sum(s.size for s in sources)):
            counted = Units("chars" if unit == "pieces" else unit)
            texts = [plain_text(source, unit, counted) for source in sources]
    except UserError:
        raise
    except Exception as error:
        line = f"config.data.path={path}: cannot be read"
        raise storage.unreadable(line, path, error) from error
    once = [name for name in paths if is_read_once(name)]
    # An empty file would be a document without a token.
    texts = [text for text in texts if text]
    if counted.total < LEAST:
        origin = f"config.data.path ({paths[0]}{', ...' if len(paths) > 1 else ''})"
        if not texts:
            why = f": {ONCE}" if once else ""
            raise UserError(f"{origin}: the text is empty{why}")
        raise UserError(
            f"{origin}: {counted.total} {counted.unit} are too few: train, validation"
            f" and test (90/5/5 %) need {LEAST} or more"
        )
    for name in once:
        streams.say(f"config.data.path={name}: {ONCE}")
    cuts = [counted.place(counted.total * share // 100) for share in (90, 95)]
    parts = documents.cut(texts, [0, *cuts, sum(map(len, texts))])
    splits = dict(zip(SPLITS, parts, strict=True))
    return Text(splits, {"files": len(texts), "path": path})


def open_text(name: str, unit: str, where: str | None = None) -> Document:
    """A file or a pipe as one document; OSError where it cannot be read.

    where: what it is called in errors.
    """
    return plain_text(documents.source(name, where), unit)


def plain_text(source: Source, unit: str, units: Units | None = None) -> Document:
    """Returns what of a file is text; UserError where it is not UTF-8.

    Bytes are taken as they are. A byte order mark in front is no part of the text. For
    words and pieces a lone carriage return ends a line, as it does when Python opens a
    text file; characters keep their line ends. `units` is given what is in it.
    """
    where = source.name
    head = b"".join(source.pieces(0, min(HEAD, source.size)))
    kind = next((kind for kind in KINDS if head.startswith(kind)), None)
    if kind and unit == "bytes":
        name, remedy = KINDS[kind]
        line = f"{where} is {name}, whose bytes are taken as they are: {remedy}"
        streams.say(line)
    if unit == "bytes":
        document = Document(source, 0, source.size)
        if units:
            units.add_document(document, 0)
            progress.passed(source.size)
        return document
    if kind:
        name, remedy = KINDS[kind]
        raise UserError(f"{where} is {name} and no UTF-8 text: {remedy}")
    mark = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    document = Document(source, mark, source.size, returns=unit != "chars")
    _check_utf8(source, mark, document, units)
    return document


def _check_utf8(source: Source, mark: int, document: Document, units) -> None:
    """Looks at every block once: NUL bytes, UTF-8, and where units begin."""
    zeros, first, even, size, wrong = 0, 0, 0, 0, None
    check = Utf8(source.name)
    if units:
        units.add_document(document)
    for block in source.pieces(0, source.size):
        if found := block.count(0):
            first = first if zeros else size + block.index(0)
            zeros, even = zeros + found, even + block[size % 2 :: 2].count(0)
        if wrong is None:
            try:
                check.add(block)
            # In UTF-16 without a mark, which the NUL bytes of all of it tell.
            except UserError as error:
                wrong = error
        if units:
            units.add(block[mark:] if size == 0 else block)
        size += len(block)
        progress.passed(len(block))
    if zeros:
        line = f"{source.name} has NUL bytes ({zeros}, the first at offset {first})"
    # A few stray NULs do not spoil a text. In UTF-16 every other byte of English is
    # one, the first of each pair where the order is big-endian.
    if zeros * 100 > size:
        order = "BE" if 2 * even > zeros else "LE"
        raise UserError(
            f"{line}: it is no text, or UTF-16 without a mark (iconv -f UTF-16{order}"
            f" -t UTF-8 converts that); {ANY_FILE}"
        )
    if wrong:
        raise wrong
    check.end()
    if zeros:
        streams.say(line)


def fingerprint(text: Text) -> str:
    """A sha256 of the documents and where they end."""
    digest = hashlib.sha256()
    with progress.counting("looking for the text", text.size):
        for split in SPLITS:
            for document in text.splits[split]:
                # With its length, so that a boundary that moves is another text.
                digest.update(len(document).to_bytes(8, "little"))
                for block in document.blocks():
                    digest.update(block)
                    progress.passed(len(block))
            digest.update(b"end of split")
    return digest.hexdigest()


def _expand(path: str) -> list[str]:
    found = []
    # A file whose own name has a ';' in it is meant as it is.
    entries = [path] if os.path.exists(path) else path.split(";")
    for entry in filter(None, (part.strip() for part in entries)):
        name = os.fspath(storage.path(entry))
        if name == "-":
            found.append(name)
            continue
        if storage.path(name).is_dir():
            inside = f"{entry.rstrip('/')}/*"
            raise UserError(f"config.data.path: {entry} is a directory: use {inside}")
        if storage.path(name).exists():
            found.append(name)
            continue
        if "://" in name:
            folder, _, pattern = name.rpartition("/")
            matches = map(os.fspath, storage.path(folder).glob(pattern))
        else:
            matches = glob.glob(name, recursive=True)
        matches = sorted(m for m in matches if not storage.path(m).is_dir())
        if not matches:
            gone = f": {ONCE}" if name.startswith(OF_A_PROCESS) else ""
            raise UserError(f"config.data.path: no such file: {entry}{gone}")
        found += matches
    if not found:
        raise UserError("config.data.corpus=text needs config.data.path=FILE[;FILE...]")
    # A file that two patterns match is read once.
    return list(dict.fromkeys(found))
