"""Folders that are either complete or absent, however many processes make them.

A folder is filled under another name and renamed. One that a killed process has left is
filled on by the next, which need not begin again. One lock per parent directory lets
one process work while the others wait; the kernel frees it when that process is killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from etils import epath

from xlformer import storage, strangers, streams
from xlformer.data import shards
from xlformer.errors import UserError, WorthAnotherTry, reason

# It stands in the name of a folder that is not finished, before the process id.
INCOMPLETE = ".incomplete-"
CARD = "card.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL = [os.strerror(number) for number in FULL]


def complete(
    folder: pathlib.Path,
    build: Callable[[pathlib.Path], None],
    remote: epath.Path | None = None,
) -> pathlib.Path:
    """Returns `folder` once `build` has filled it; a rename shows it as a whole.

    With `remote` it is a copy of that directory, which is filled first if need be,
    without the shards that can be read there by ranges. What is copied is compared with
    its card's checksums at every start, and made again if it is damaged: a disk of this
    machine is not what the run trusts.
    """
    if folder.is_dir() and (remote is None or not damaged(folder, by_ranges=True)):
        return folder
    with _locked(folder.parent):
        unfinished = folder.with_name(f"{folder.name}{INCOMPLETE}{os.getpid()}")
        if folder.is_dir():
            bad = "" if remote is None else damaged(folder, by_ranges=True)
            # Another process was first: it had the lock while this one waited.
            if not bad:
                return folder
            line = f"{folder / bad} does not match its card: copying {remote} again"
            streams.say(line)
            # Out of the way in one step, for `_sweep` to delete: half deleted in its
            # place it would be a folder that looks complete.
            folder.rename(unfinished)
        _adopt(folder, unfinished)
        _sweep(folder.parent, unfinished)
        unfinished.mkdir(exist_ok=True)
        try:
            _fill(unfinished, build, remote)
            unfinished.rename(folder)
        # What an interrupt leaves is worth as much as what a kill leaves, and so is
        # what another try goes on from.
        except WorthAnotherTry:
            raise
        except Exception as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            full = _full(error)
            if full and not isinstance(error, UserError):
                line = f"{folder.parent}: {full}: nothing is kept of {folder.name}"
                raise UserError(f"{line}: {storage.ELSEWHERE}") from error
            raise
        # The rename itself is an entry of the parent directory.
        _sync(folder.parent)
    return folder


def _fill(folder: pathlib.Path, build, remote: epath.Path | None) -> None:
    if remote is not None and _is_prepared(remote):
        _copy(remote, folder, without=_by_ranges)
        if bad := damaged(folder, by_ranges=True):
            raise UserError(
                f"{remote / bad} does not match the sha256 in its {CARD}: delete "
                f"{remote} and prepare again"
            )
    else:
        build(folder)
        if remote is not None:
            _copy(folder, remote)
    # Before the rename, which may reach the disk before the data do: after a loss of
    # power a folder would be there whose files are empty.
    for path in [*folder.iterdir(), folder]:
        _sync(path)


def _by_ranges(remote: epath.Path) -> set[str]:
    """The shards that need no copy: all, if each of their blocks has a checksum."""
    try:
        listed = shards.read_index(remote, strangers.read_json(remote / CARD))
        found = [shard for split in listed.values() for shard in split]
    except OSError:
        raise
    # Of the copy it is said what is damaged.
    except shards.DAMAGE:
        return set()
    if all(shard.crc32 for shard in found):
        return {shard.file for shard in found}
    line = f"{remote} has no checksums of blocks: it is copied whole"
    streams.say(line)
    return set()


def damaged(folder: pathlib.Path, *, by_ranges: bool = False) -> str:
    """The name of a file that is not what the folder's card says, '' if all are.

    by_ranges: a shard that can be read so may be elsewhere.
    """
    name = CARD
    try:
        card = {"splits": {}} | strangers.read_json(folder / CARD)
        name = shards.INDEX
        found = shards.read_index(folder, card)
        listed = {shard.file: shard for split in found.values() for shard in split}
    # What is damaged may hold any JSON, or none.
    except shards.DAMAGE:
        return name
    for name, shard in listed.items():
        try:
            found = shards.checksum(folder / name)
        except FileNotFoundError:
            if by_ranges and shard.crc32:
                continue
            return name
        if found != shard.sha256:
            return name
    return ""


def _is_prepared(remote: epath.Path) -> bool:
    with _one_line(f"{remote}: not read", remote):
        return (remote / CARD).exists()


def _copy(source, target, *, without=lambda _: set()) -> None:
    """Copies a folder, but for the names without(folder)."""
    source, target = epath.Path(source), epath.Path(target)
    with _one_line(f"{source}: not copied to {target}", source):
        target.mkdir(parents=True, exist_ok=True)
        # The card comes last: where it stands, everything does.
        names = {path.name for path in source.iterdir()} - without(source)
        for name in sorted(names, key=CARD.__eq__):
            (source / name).copy(target / name, overwrite=True)


@contextlib.contextmanager
def _one_line(what: str, source) -> Iterator[None]:
    """Says in one line what cannot be read or written; a store may answer later."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _full(error):
            raise UserError(f"{what}: {reason(error)}") from error
        raise storage.unreadable(what, source, error) from error


def _full(error: Exception) -> str | None:
    """What a disk that is full says; the array_record library has no class for it."""
    return next((x for x in FULL if x in str(error)), None)


@contextlib.contextmanager
def _locked(root: pathlib.Path) -> Iterator[None]:
    root.mkdir(parents=True, exist_ok=True)
    path = root / ".lock"
    # Whoever opens a pipe waits for its reader.
    if path.exists() and strangers.is_endless(path):
        raise UserError(f"{path} is {strangers.ENDLESS}")
    with open(path, "w") as file:
        # Of the open file, not of its name: a killed process leaves no lock behind.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            line = f"another process is preparing in {root}: waiting for it"
            streams.say(line)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _adopt(folder: pathlib.Path, unfinished: pathlib.Path) -> None:
    """Takes over what a killed process has made of the folder."""
    for left in sorted(folder.parent.glob(f"{folder.name}{INCOMPLETE}*")):
        # With a card it was complete, and may be damaged.
        if not (left / CARD).exists() and not unfinished.exists():
            left.rename(unfinished)


def _sweep(root: pathlib.Path, kept: pathlib.Path) -> None:
    """Removes what killed runs left; the lock says that no other run is alive."""
    left = [*root.glob(f"*{INCOMPLETE}*"), *root.glob("tfds/*/*/*incomplete*")]
    left = [path for path in left if path != kept or (kept / CARD).exists()]
    for path in [*left, *root.glob("downloads/**/*.tmp.*")]:
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
