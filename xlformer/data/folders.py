"""Folders that are either complete or absent, however many processes make them.

A folder is filled under another name and renamed. One lock per parent directory lets
one process work while the others wait; the kernel frees it when that process is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from etils import epath

INCOMPLETE = ".incomplete-"  # in the name of a folder that is not finished


def complete(
    folder: pathlib.Path,
    build: Callable[[pathlib.Path], None],
    remote: epath.Path | None = None,
) -> pathlib.Path:
    """Returns folder once `build` has filled it; a rename shows it as a whole.

    With `remote` it is a copy of that directory, which is filled first if need be.
    """
    if folder.is_dir():
        return folder
    with _locked(folder.parent):
        if folder.is_dir():  # another process was first
            return folder
        _sweep(folder.parent)
        unfinished = folder.with_name(f"{folder.name}{INCOMPLETE}{os.getpid()}")
        unfinished.mkdir()
        try:
            _fill(unfinished, build, remote)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        _sync(folder.parent)
    return folder


def _fill(folder: pathlib.Path, build, remote: epath.Path | None) -> None:
    if remote is not None and (remote / "card.json").exists():
        _copy(remote, folder)
    else:
        build(folder)
        if remote is not None:
            _copy(folder, remote)
    for path in [*folder.iterdir(), folder]:
        _sync(path)


def _copy(source, target) -> None:
    target = epath.Path(target)
    target.mkdir(parents=True, exist_ok=True)
    # card.json comes last: where it stands, everything does
    names = sorted(
        (p.name for p in epath.Path(source).iterdir()), key="card.json".__eq__
    )
    for name in names:
        (epath.Path(source) / name).copy(target / name, overwrite=True)


@contextlib.contextmanager
def _locked(root: pathlib.Path) -> Iterator[None]:
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(root: pathlib.Path) -> None:
    """Removes what killed runs left; the lock says that no other run is alive."""
    left = [*root.glob(f"*{INCOMPLETE}*"), *root.glob("tfds/*/*/*incomplete*")]
    for path in [*left, *root.glob("downloads/**/*.tmp.*")]:
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
