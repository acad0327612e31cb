"""Where files lie: in a local directory, or in an object store (gs://bucket/...)."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Iterator

from etils import epath

from xlformer.errors import Argument, UserError, WorthAnotherTry, reason

# The ending of a file that is being written, before it is renamed.
TEMPORARY = ".tmp"
# Seconds for a range of a few blocks: gcsfs tries six times, with 31 to 36 s between.
RANGE_LIMIT = 40.0
CACHE_VARIABLE, DEFAULT_CACHE = "XLFORMER_DATA", "~/.cache/xlformer"
# What is said where there is no room for prepared text.
ELSEWHERE = f"config.data.directory or {CACHE_VARIABLE} names another place"


def path(place) -> epath.Path:
    """The path, ready for use: every one that a person gave goes through here.

    `~` becomes the home directory, which no shell does in --workdir=~/run. UserError
    where there is no home, or where the path needs what is not installed.
    """
    if is_remote(place):
        if not os.fspath(place).startswith("gs://"):
            raise UserError(f"{place}: only local directories and gs:// are known")
        _prepare()
        return epath.Path(place)
    found = os.path.expanduser(place)
    # In a container the user id may have no entry in passwd: `~` stays as it is then,
    # and would become a directory of that name.
    if found == "~" or found.startswith("~/"):
        other = f" or {CACHE_VARIABLE}" if found.startswith(DEFAULT_CACHE) else ""
        raise UserError(f"{place}: this user has no home directory: set HOME{other}")
    return epath.Path(found)


def cache() -> str:
    """Where what can be made again is kept, as a person would write it."""
    return os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE


def check_writable(folder, name: str) -> None:
    """Raises UserError where a folder cannot be made or not be filled; makes nothing.

    Said before hours of preparing, as far as it can be known. name: of the argument.
    """
    if is_remote(folder):
        return
    place = os.path.abspath(folder)
    # The nearest folder that exists: those between will be made in it.
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    # The rights that the process has, not those of the user who started it.
    effective = os.access in os.supports_effective_ids
    if not os.path.isdir(place):
        raise UserError(Argument(name, folder), f": {place} is not a directory")
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=effective):
        line = f": {place} cannot be written by this user"
        raise UserError(Argument(name, folder), line)


def make_folder(folder: epath.Path, name: str) -> None:
    """Makes a folder and those above it; raises one line where a store does not answer.

    name: of the argument.
    """
    with answering(f"{name}={folder}: cannot be made", folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def answering(what: str, place) -> Iterator[None]:
    """Makes one line of a store's errors, which have no common class.

    Of a local disk's command.run makes one.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(place):
            raise
        raise unreadable(what, place, error) from error


def check_room(folder, size: int, what: str, elsewhere: str = ELSEWHERE) -> None:
    """Raises UserError where a local folder has no room for that many bytes."""
    place = os.path.abspath(folder)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free
    if free < size:
        raise UserError(
            f"{folder}: no room for {what}: it needs {size / 1e6:,.0f} MB, "
            f"{free / 1e6:,.0f} MB are free: {elsewhere}"
        )


def unreadable(what: str, place, error: Exception) -> UserError:
    """What is raised where something cannot be read: a store may answer later.

    Errors of the network and of credentials have no common class.
    """
    stays = isinstance(error, FileNotFoundError) or not is_remote(place)
    kind = UserError if stays else WorthAnotherTry
    return kind(f"{what}: {reason(error)}")


def read_range(place: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of an object; whatever error its library raises."""
    store, name = _store(place)
    # Neither gcsfs nor aiohttp ends an answer that does not go on before 5 minutes.
    limit = {"timeout": RANGE_LIMIT} if store.async_impl else {}
    return store.cat_file(name, start=start, end=stop, **limit)


def sizes(folder) -> dict[str, int]:
    """The files in a folder and their bytes, in one listing."""
    store, name = _store(os.fspath(folder))
    found = store.ls(name, detail=True)
    return {one["name"].rpartition("/")[2]: one["size"] for one in found}


def _store(place: str):
    import fsspec

    return fsspec.core.url_to_fs(place)


def is_remote(place) -> bool:
    return "://" in os.fspath(place)


@functools.cache
def _prepare() -> None:
    try:
        # The third is for Orbax, which asks it whether a bucket has folders.
        for name in ("fsspec.config", "gcsfs", "google.cloud.storage"):
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"gs:// needs {error.name}: pip install 'xlformer[gcs]'"
        ) from error
    # What it gives up it raises too, and we say it in one line: no traces beside it.
    log = logging.getLogger("gcsfs")
    if log.level == logging.NOTSET:
        log.setLevel(logging.CRITICAL)
    # A listing that is kept would hide what other processes write: a lock, a step.
    conf = sys.modules["fsspec.config"].conf
    conf.setdefault("gcs", {})["use_listings_cache"] = False


def write(file: epath.Path, text: str) -> None:
    """Writes a file whole or not at all; raises UserError where it cannot."""
    _replaced(file, text.encode(), f"{os.fspath(file)}{TEMPORARY}")


def put(file, content: str | bytes) -> None:
    """Writes a file whole or not at all, whoever writes the same name at once.

    Each process has a temporary file of its own, and a rename replaces at once; of one
    that is killed it stays. Raises UserError where the file cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    _replaced(file, content, f"{os.fspath(file)}.{uuid.uuid4().hex}{TEMPORARY}")


def _replaced(file, content: bytes, temporary: str) -> None:
    """temporary: beside the file; a rename is atomic only within one file system."""
    try:
        # An object appears only when it is complete.
        if is_remote(file):
            epath.Path(file).write_bytes(content)
            return
        with open(temporary, "wb") as opened:
            opened.write(content)
        os.replace(temporary, file)
    # Errors of the network and of credentials have no common class.
    except Exception as error:
        line = f"{os.fspath(file)}: cannot be written"
        if is_remote(file):
            raise unreadable(line, file, error) from error
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        # Without the temporary file, of which nobody knows.
        why = getattr(error, "strerror", None) or reason(error)
        raise UserError(f"{line}: {why}") from error
