"""Text that is already on this machine: your own files, and Python's standard library.

The standard library is the corpus that every machine has without a network.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import itertools
import os
import pathlib
import platform
import re
import sys
import sysconfig

import numpy as np

from xlformer import storage
from xlformer.data.sources import SPLITS, Text, check_not_empty
from xlformer.data.vocabulary import SPACES, decode_utf8
from xlformer.errors import UserError, reason

# Tests and generated tables would be a large part of the text, and site-packages is not
# the library's own.
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
LEFT_OUT |= {"site-packages"}
# Units that a text needs: of 10 both cuts, at 90 % and at 95 %, fall behind the ninth,
# and nothing is left between them.
LEAST = 11
# The line end of old Macintosh files. In \r\n the newline is there already.
LONE_RETURN = re.compile(rb"\r(?!\n)")
# These names are another file in each process, and in a resumed run.
OF_A_PROCESS = ("/dev/stdin", "/dev/fd/", "/proc/")
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
    data = b"".join(path.read_bytes() for path in found)
    splits = _split_bytes([data], [len(data) * 90 // 100, len(data) * 95 // 100])
    check_not_empty(splits, f"stdlib ({root})")
    facts = {"python": platform.python_version(), "files": len(found)}
    return Text(splits, facts)


def read_files(path: str, unit: str) -> Text:
    """Reads your own files, each a document, cut into 90/5/5 % of all their units.

    With unit 'pieces', those of a tokenizer, the splits are counted in characters.
    """
    try:
        paths = _expand(path)
        documents = [(name, read_once(name)) for name in paths]
    except UserError:
        raise
    # Libraries that read gs:// raise errors of their own, without a common class.
    except Exception as error:
        line = f"config.data.path={path}: cannot be read: {reason(error)}"
        raise UserError(line) from error
    once = [name for name in paths if is_read_once(name)]
    texts = [plain_text(data, unit, name) for name, data in documents]
    # An empty file would be a document without a token.
    texts = [text for text in texts if text]
    unit = "chars" if unit == "pieces" else unit
    starts = _unit_starts(texts, unit)
    total = int(np.count_nonzero(starts))
    if total < LEAST:
        origin = f"config.data.path ({paths[0]}{', ...' if len(paths) > 1 else ''})"
        if not texts:
            why = f": {ONCE}" if once else ""
            raise UserError(f"{origin}: the text is empty{why}")
        raise UserError(
            f"{origin}: {total} {unit} are too few: train, validation and test"
            f" (90/5/5 %) need {LEAST} or more"
        )
    for name in once:
        print(f"xlformer: config.data.path={name}: {ONCE}", file=sys.stderr)
    cuts = [_offset(starts, total * share // 100) for share in (90, 95)]
    splits = _split_bytes(texts, cuts)
    return Text(splits, {"files": len(texts), "path": path})


def read_once(path) -> bytes:
    """The bytes of a file or a pipe; '-' is standard input."""
    if str(path) == "-":
        with open(0, "rb", closefd=False) as file:
            return file.read()
    return storage.path(path).read_bytes()


def plain_text(data: bytes, unit: str, where: str) -> bytes:
    """Returns what of a file is text; UserError where it is not UTF-8.

    Bytes are taken as they are. A byte order mark in front is no part of the text. For
    words and pieces a lone carriage return ends a line, as it does when Python opens a
    text file; characters keep their line ends.
    """
    kind = next((kind for kind in KINDS if data.startswith(kind)), None)
    if kind and unit == "bytes":
        name, remedy = KINDS[kind]
        line = f"{where} is {name}, whose bytes are taken as they are: {remedy}"
        print(f"xlformer: {line}", file=sys.stderr)
    if unit == "bytes":
        return data
    if kind:
        name, remedy = KINDS[kind]
        raise UserError(f"{where} is {name} and no UTF-8 text: {remedy}")
    zeros = data.count(0)
    if zeros:
        line = f"{where} has NUL bytes ({zeros}, the first at offset {data.index(0)})"
    # A few stray NULs do not spoil a text. In UTF-16 every other byte of English is
    # one, the first of each pair where the order is big-endian.
    if zeros * 100 > len(data):
        order = "BE" if 2 * data[::2].count(0) > zeros else "LE"
        raise UserError(
            f"{line}: it is no text, or UTF-16 without a mark (iconv -f UTF-16{order}"
            " -t UTF-8 converts that); config.data.unit=bytes takes any file"
        )
    decode_utf8(data, where)
    if zeros:
        print(f"xlformer: {line}", file=sys.stderr)
    data = data.removeprefix(codecs.BOM_UTF8)
    return data if unit == "chars" else LONE_RETURN.sub(b"\n", data)


def is_read_once(name: str) -> bool:
    """Whether a name is that of a pipe, or of another file in each process."""
    if name == "-" or name.startswith(OF_A_PROCESS):
        return True
    return "://" not in name and os.path.exists(name) and not os.path.isfile(name)


def fingerprint(text: Text) -> str:
    """A sha256 of the documents and where they end."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for document in text.splits[split]:
            # With its length, so that a boundary that moves is another text.
            digest.update(len(document).to_bytes(8, "little") + document)
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


def _unit_starts(texts: list[bytes], unit: str) -> np.ndarray:
    """True at every byte of the joined texts where a unit begins."""
    data = np.frombuffer(b"".join(texts), np.uint8)
    if unit == "bytes":
        return np.ones(len(data), bool)
    if unit == "chars":
        # In UTF-8 every byte but the first of a character is 10xxxxxx.
        return (data & 0xC0) != 0x80
    inside = ~np.isin(data, SPACES)
    starts = inside.copy()
    starts[1:] &= ~inside[:-1]
    offsets = list(itertools.accumulate(map(len, texts), initial=0))[:-1]
    # A word does not run on from the end of a file into the next one.
    starts[offsets] |= inside[offsets]
    return starts


def _offset(starts: np.ndarray, number: int) -> int:
    """The position of the unit of that number, without listing all of them."""
    # The positions of all bytes would take 8 bytes each: 800 MB for enwik8.
    block = 1 << 20
    counts = [
        np.count_nonzero(starts[i : i + block]) for i in range(0, len(starts), block)
    ]
    ends = np.cumsum(counts)
    i = int(np.searchsorted(ends, number, side="right"))
    if i == len(ends):
        return len(starts)
    inside = np.flatnonzero(starts[i * block : (i + 1) * block])
    return i * block + int(inside[number - (ends[i] - counts[i])])


def _split_bytes(texts: list[bytes], cuts: list[int]) -> dict[str, list[bytes]]:
    """Cuts the joined texts at two offsets; a cut document goes on as a new one."""
    bounds = [0, *cuts, sum(map(len, texts))]
    splits = {split: [] for split in SPLITS}
    base = 0
    for text in texts:
        for split, low, high in zip(SPLITS, bounds, bounds[1:], strict=False):
            piece = text[max(low - base, 0) : max(high - base, 0)]
            if piece:
                splits[split].append(piece)
        base += len(text)
    return splits
