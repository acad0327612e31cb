"""A directory that is written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

from xlformer import storage
from xlformer.errors import Argument, UserError, reason


def check(out) -> None:
    """Raises UserError where no directory of that name can be made; makes nothing."""
    if storage.is_remote(out):
        line = ": a local directory is needed; copy it from there"
        raise UserError(Argument("out", out), line)
    if os.path.isdir(out) and os.listdir(out):
        raise UserError(Argument("out", out), " is not empty; name a new directory")
    if os.path.lexists(out) and not os.path.isdir(out):
        raise UserError(Argument("out", out), " is not a directory")
    storage.check_writable(os.path.dirname(os.path.realpath(out)), "out")


@contextlib.contextmanager
def whole(out) -> Iterator[pathlib.Path]:
    """A directory to write into, which becomes `out` when all is written.

    It lies beside `out`, because a rename is atomic only within one file system; an
    error leaves nothing behind.
    """
    check(out)
    # Nothing can be renamed to a link, but to what it points to.
    place = os.path.realpath(out)
    temporary = f"{place}.{uuid.uuid4().hex}{storage.TEMPORARY}"
    try:
        os.makedirs(temporary)
        yield pathlib.Path(temporary)
        os.rename(temporary, place)
    except OSError as error:
        line = f": cannot be written: {error.strerror or reason(error)}"
        raise UserError(Argument("out", out), line) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
