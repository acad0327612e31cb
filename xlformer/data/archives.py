"""Finding what a corpus is read from: an archive under manual_dir, or a download.

Mirrors die: the URLs are tried in order, the checksums decide, and the error names the
file to put under manual_dir.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import logging
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from etils import epath

from xlformer import progress, storage
from xlformer.data import documents
from xlformer.data.documents import Document, Source
from xlformer.errors import Argument, UserError, reason

T = TypeVar("T")
# What the card says is not pinned where files of an archive lie in manual_dir.
UNPACKED = "unpacked files"


@dataclasses.dataclass(frozen=True)
class Archive:
    """A file that is published: its name under manual_dir, and where it lies."""

    file: str
    urls: tuple[str, ...] = ()  # Tried in order; the checksums decide.
    # '' where nobody published one that others confirm.
    sha256: str = ""


class Origin:
    """Where a corpus is read from, and what was seen there.

    Attributes:
      name: of the corpus, for errors.
      folder: manual_dir, where people put what they have fetched; None: downloads.
      scratch: a local folder for temporary files, which may be as large as the corpus.
      facts: for the card: checksums of what was read, and what no checksum is known of.
    """

    def __init__(self, name: str, archives: Sequence[Archive], dl, manual_dir: str):
        self.name, self._archives, self._dl = name, archives, dl
        self.folder = storage.path(manual_dir) if manual_dir else None
        self.scratch = os.fspath(dl.download_dir) if dl is not None else None
        self.facts = {"files_sha256": {}, "unpinned": []}
        if self.folder is not None and not self.folder.is_dir():
            line = f"config.data.manual_dir={self.folder}: no such directory"
            raise UserError(line)

    def has(self, archive: Archive) -> bool:
        """Whether it can be opened: False where manual_dir lacks it."""
        return self.folder is None or (self.folder / archive.file).exists()

    def first(self, archive: Archive, read: Callable[[Source], T]) -> T:
        """What `read` makes of an archive whose checksum is right.

        Of downloads it is the first one that can be read: UserError tries the next.
        """
        if self.folder is not None:
            path = self.folder / archive.file
            if not path.exists():
                raise UserError(f"{self.name}: {self.folder} has no {archive.file}")
            return self._read(archive, path, str(path), read)
        reasons = []
        for url in archive.urls:
            try:
                _reach(url)
                path = epath.Path(self._dl.download(url))
            # Whatever the HTTP library of TFDS raises, the next source is tried.
            except Exception as error:
                reasons.append(f"{url}: {type(error).__name__}: {str(error)[:120]}")
                continue
            try:
                return self._read(archive, path, url, read)
            except UserError as error:
                reasons.append(str(error))
                # TFDS would take the same file from its cache the next time.
                for stale in path.parent.glob(f"{path.name}*"):
                    stale.unlink()
        reasons = "; ".join(dict.fromkeys(reasons))
        raise UserError(f"{self.name}: no source worked: {reasons}")

    def found(self, pattern: str) -> dict[str, Document]:
        """Files of manual_dir, or of folders in it, by name and in that order.

        pattern: as 'train/*.txt', and so are the names.
        """
        depth = pattern.count("/") + 1
        for place in (pattern, f"*/{pattern}") if self.folder is not None else ():
            paths = sorted(p for p in self.folder.glob(place) if not p.is_dir())
            if paths:
                names = ("/".join(path.parts[-depth:]) for path in paths)
                sources = (documents.source(os.fspath(path)) for path in paths)
                pairs = zip(names, sources, strict=True)
                if UNPACKED not in self.facts["unpinned"]:
                    self.facts["unpinned"].append(UNPACKED)
                return {name: Document(s, 0, s.size) for name, s in pairs}
        return {}

    def verified(self, source: Source, name: str, expected: str) -> None:
        """Holds all of a source against its sha256, and notes it for the card."""
        digest = hashlib.sha256()
        with progress.counting(f"reading {source.name}", source.size):
            for block in source.pieces(0, source.size):
                digest.update(block)
                progress.passed(len(block))
        found = digest.hexdigest()
        if not expected:
            logging.getLogger(__name__).warning(
                "%s: no checksum is pinned for %s; found sha256 %s",
                self.name,
                source.name,
                found,
            )
        elif found != expected:
            raise UserError(
                f"{self.name}: wrong checksum of {source.name}: expected sha256"
                f" {expected}, found {found} ({source.size} bytes)"
            )
        self.facts["files_sha256"][name] = found
        if not expected:
            self.facts["unpinned"].append(name)

    def remedy(self) -> tuple:
        """What a person can do, for the end of an error."""
        named = ", ".join(
            f"{a.file} ({f'sha256 {a.sha256}' if a.sha256 else 'unpinned'})"
            for a in self._archives
        )
        return (
            f"put {named} or the files in it into a directory and pass ",
            Argument("manual_dir", "DIR"),
            " (config.data.manual_dir)",
        )

    def _read(self, archive: Archive, path: epath.Path, origin: str, read) -> T:
        facts = {key: type(value)(value) for key, value in self.facts.items()}
        # Before it is opened: a parser sees only what the checksum allows, where there
        # is one.
        source = documents.source(os.fspath(path), origin)
        try:
            self.verified(source, archive.file, archive.sha256)
            return read(source)
        except UserError:
            self.facts = facts
            raise


def members(origin: Origin, source: Source, wanted: Callable) -> Iterator[tuple]:
    """Yields (name, document) of the files in a tar archive, in its order.

    Documents can be read later and again, in any order: a packed archive (.tar.gz) is
    unpacked once, into a temporary file without a name. Nothing of it gets a path, so
    that no name in it can lead out of a folder.

    Args:
      wanted: of a member's name, whether it is yielded.
    """
    where = source.name
    packed = Reader(source).read(2) == b"\x1f\x8b"
    try:
        if packed:
            with gzip.open(Reader(source)) as file:
                os.makedirs(origin.scratch, exist_ok=True)
                source = documents.Copied(where, file.read, origin.scratch)
        with tarfile.open(fileobj=Reader(source), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # It would keep a million of them.
                if member.isreg() and wanted(name := member.name.removeprefix("./")):
                    start = member.offset_data
                    part = Document(source, start, start + member.size)
                    if part.stop > source.size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield name, part
            # To tarfile damage is the end, and so is a file that is cut between two.
            rest = Reader(source)
            rest.seek(tar.offset)
            if any(rest.read(tarfile.BLOCKSIZE) or b"cut"):
                raise tarfile.ReadError("it goes on with damage, or is cut")
    except documents.UNREADABLE as error:
        raise UserError(f"{where}: not a whole archive: {reason(error)}") from None


def listed(folder: str) -> str:
    """A digest of what lies in a folder and in the folders right in it: names, sizes.

    Where any files of a form make a corpus, it tells one from another.
    """
    try:
        digest = hashlib.sha256()
        for path in sorted(storage.path(folder).iterdir()):
            digest.update(f"{path.name}\n".encode())
            if not path.is_dir():
                digest.update(b"%d" % path.stat().length)
                continue
            for name, size in sorted(_sizes(path).items()):
                digest.update(f"{name} {size}\n".encode())
    except UserError:
        raise
    except Exception as error:
        line = f"config.data.manual_dir={folder}: cannot be read"
        raise storage.unreadable(line, folder, error) from error
    return digest.hexdigest()


def _sizes(folder: epath.Path) -> dict[str, int]:
    """What lies in a folder, of which there may be 30,000 files."""
    if storage.is_remote(folder):
        return storage.sizes(folder)  # in one listing
    return {path.name: path.stat().length for path in folder.iterdir()}


class Reader:
    """A source as a file that can be read and sought."""

    def __init__(self, source: Source):
        self._source, self._place = source, 0
        self._blocks, self._block, self._used = None, b"", 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes, fewer only at the end."""
        left = self._source.size - self._place
        size = left if size < 0 else min(size, left)
        if self._blocks is None:
            self._blocks = self._source.pieces(self._place, self._source.size)
        found = []
        while size > 0:
            if self._used == len(self._block):
                self._block, self._used = next(self._blocks), 0
            # Sliced where it is: of a block of 1 MiB tar headers take 512 bytes each.
            part = self._block[self._used : self._used + size]
            found.append(part)
            self._used, size = self._used + len(part), size - len(part)
            self._place += len(part)
        return found[0] if len(found) == 1 else b"".join(found)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = (0, self._place, self._source.size)[whence]
        place = min(max(base + offset, 0), self._source.size)
        used = self._used + place - self._place
        if 0 <= used <= len(self._block):
            self._used = used
        else:
            self._blocks, self._block, self._used = None, b"", 0
        self._place = place
        return place

    def tell(self) -> int:
        return self._place

    def seekable(self) -> bool:
        return True


def _reach(url: str) -> None:
    """Raises OSError at once where nobody answers: TFDS retries for three minutes."""
    try:
        urllib.request.urlopen(url, timeout=30).close()
    except urllib.error.HTTPError:
        # Somebody answers: TFDS may ask in another way, or will say what is wrong.
        pass
