"""A directory that is written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

from xlformer import runs, storage
from xlformer.errors import Argument, UserError, reason


def check(out, name: str = "out") -> None:
    """Raises UserError where no such directory can be made or filled; makes nothing.

    name: of the argument.
    """
    if storage.is_remote(out):
        line = ": a local directory is needed; copy it from there"
        raise UserError(Argument(name, out), line)
    path = storage.path(out)
    if os.path.isdir(path) and os.listdir(path):
        raise UserError(Argument(name, out), " is not empty; name a new directory")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UserError(Argument(name, out), " is not a directory")
    storage.check_writable(path, name)


@contextlib.contextmanager
def whole(out, name: str = "out", errors=OSError) -> Iterator[pathlib.Path]:
    """A directory to write into, which becomes `out` when all is written.

    It lies beside `out`, because a rename is atomic only within one file system; within
    an empty directory that is there already, which may be a file system of its own, in
    a place where nothing else may be made. An error leaves nothing behind.

    Args:
      out: a new or an empty directory.
      name: of the argument.
      errors: what becomes a UserError, besides OSError, while it is written.
    """
    check(out, name)
    path = os.path.abspath(storage.path(out))
    there, unique = os.path.isdir(path), f"{uuid.uuid4().hex}{storage.TEMPORARY}"
    temporary = os.path.join(path, unique) if there else f"{path}.{unique}"
    try:
        os.makedirs(temporary)
        yield pathlib.Path(temporary)
        if there:
            # Last what makes a run of it.
            for file in sorted(os.listdir(temporary), key=lambda x: x == runs.CONFIG):
                os.rename(os.path.join(temporary, file), os.path.join(path, file))
        else:
            os.rename(temporary, path)
    except UserError:
        raise
    except (OSError, errors) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise UserError(Argument(name, out), f": cannot be written: {why}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
