"""Where files lie: in a local directory, or in an object store (gs://bucket/...)."""

from __future__ import annotations

import functools
import importlib
import os
import sys

from etils import epath

from xlformer.errors import UserError

TEMPORARY = ".tmp"


def path(place) -> epath.Path:
    """The path, ready for use; UserError where it needs what is not installed."""
    found = epath.Path(place)
    if is_remote(found):
        if not str(found).startswith("gs://"):
            raise UserError(f"{place}: only local directories and gs:// are known")
        _prepare()
    return found


def is_remote(place) -> bool:
    return "://" in os.fspath(place)


@functools.cache
def _prepare() -> None:
    try:
        # Orbax asks the third whether a bucket has folders.
        for name in ("fsspec.config", "gcsfs", "google.cloud.storage"):
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"gs:// needs {error.name}: pip install 'xlformer[gcs]'"
        ) from error
    # A listing that is kept would hide what other processes write: a lock, a step.
    conf = sys.modules["fsspec.config"].conf
    conf.setdefault("gcs", {})["use_listings_cache"] = False


def write(file: epath.Path, text: str) -> None:
    """Whole or not at all; UserError if not."""
    try:
        if is_remote(file):  # An object appears only when it is complete.
            file.write_text(text)
            return
        temporary = file.parent / f"{file.name}{TEMPORARY}"
        temporary.write_text(text)
        os.replace(temporary, file)
    except Exception as error:  # Of the network, of credentials: no common class.
        reason = " ".join(str(error).split())[:200]
        if not isinstance(error, OSError):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"{file}: cannot be written: {reason}") from error
