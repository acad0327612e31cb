"""Text that is already on this machine: your own files, and Python's standard library.

The standard library is the corpus that every machine has without a network.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import pathlib
import platform
import sysconfig

import numpy as np

from xlformer import storage
from xlformer.data.sources import SPLITS, Text, check_not_empty
from xlformer.data.vocabulary import decode_utf8
from xlformer.errors import UserError

# tests and generated tables; site-packages is not the interpreter's own
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
LEFT_OUT |= {"site-packages"}


def read_stdlib(root: str | None = None) -> Text:
    """The bytes of the interpreter's own library, 90/5/5.

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
    """Your own files, each a document, 90/5/5 of the whole counted in `unit`."""
    try:
        paths = _expand(path)
        documents = [(name, storage.path(name).read_bytes()) for name in paths]
    except UserError:
        raise
    except Exception as error:  # of whatever library reads gs://
        why = " ".join(str(error).split())[:200]
        raise UserError(f"config.data.path={path}: cannot be read: {why}") from error
    if unit != "bytes":
        for name, data in documents:
            decode_utf8(data, name)
    texts = [data for _, data in documents if data]
    origin = f"config.data.path ({paths[0]}{', ...' if len(paths) > 1 else ''})"
    check_not_empty({"train": texts}, origin)
    starts = _unit_starts(texts, unit)
    total = int(np.count_nonzero(starts))
    cuts = [_offset(starts, total * share // 100) for share in (90, 95)]
    splits = _split_bytes(texts, cuts)
    check_not_empty(splits, origin)
    return Text(splits, {"files": len(texts), "path": path})


def fingerprint(text: Text) -> str:
    """A sha256 of the documents and where they end."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for document in text.splits[split]:
            digest.update(len(document).to_bytes(8, "little") + document)
        digest.update(b"end of split")
    return digest.hexdigest()


def _expand(path: str) -> list[str]:
    if not path.strip():
        raise UserError("config.data.corpus=text needs config.data.path=FILE[;FILE...]")
    found = []
    for entry in filter(None, (part.strip() for part in path.split(";"))):
        name = os.path.expanduser(entry)
        if storage.path(name).is_dir():
            raise UserError(f"config.data.path: {entry} is a directory: use {entry}/*")
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
            raise UserError(f"config.data.path: no such file: {entry}")
        found += matches
    return list(dict.fromkeys(found))


def _unit_starts(texts: list[bytes], unit: str) -> np.ndarray:
    """True at every byte of the joined texts where a unit begins."""
    data = np.frombuffer(b"".join(texts), np.uint8)
    if unit == "bytes":
        return np.ones(len(data), bool)
    if unit == "chars":
        return (data & 0xC0) != 0x80
    inside = ~np.isin(data, np.frombuffer(b" \t\n\r\x0b\x0c", np.uint8))
    starts = inside.copy()
    starts[1:] &= ~inside[:-1]
    offsets = list(itertools.accumulate(map(len, texts), initial=0))[:-1]
    starts[offsets] |= inside[offsets]  # a word never runs on into the next file
    return starts


def _offset(starts: np.ndarray, number: int) -> int:
    """The position of the unit of that number, without listing all of them."""
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
