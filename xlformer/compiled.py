"""Compiled programs that the commands keep between two starts, in the user's own cache.

They are machine code, so they never lie in a work directory that may be a stranger's,
and a folder that another user could have filled is not used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import stat

import jax

from xlformer import storage, streams
from xlformer.errors import UserError

# Bytes. When there are more, the programs that were not used for the longest time go.
LIMIT = 1 << 30


def keep() -> None:
    """Makes JAX find what it compiled in an earlier start.

    It is for commands that run for seconds, of which compiling would be most.

    JAX_COMPILATION_CACHE_DIR goes before it. Where no folder of one's own can be had,
    one line says so and everything is compiled anew.
    """
    if _named():
        return
    try:
        folder = own_folder()
    except (OSError, UserError) as error:
        streams.say(f"compiled programs are not kept: {error}")
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    # Many small programs, not one large one, are what a start waits for; by default
    # JAX keeps those that took a second. A first call of 0.91 s took 0.17 s in a new
    # process (jax 0.10.2, 2 CPU cores).
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # JAX locks its cache with filelock before it removes any, and fails without it.
    if importlib.util.find_spec("filelock"):
        _complete(folder)
        jax.config.update("jax_compilation_cache_max_size", LIMIT)


def _complete(folder: str) -> None:
    """Gives a time of use to each program that has none.

    JAX looks at those of all programs before it writes another (jax 0.10.2), and fails
    for one without: whoever was killed between the two files, or had no filelock, would
    have every later start compile everything anew, with a warning for each program.
    """
    with os.scandir(folder) as entries:
        found = {entry.name: entry for entry in entries}
    for name, entry in found.items():
        key = name.removesuffix("-cache")
        if key != name and f"{key}-atime" not in found:
            with contextlib.suppress(OSError):  # Another process removes some.
                time = entry.stat().st_mtime_ns.to_bytes(8, "little")
                pathlib.Path(folder, f"{key}-atime").write_bytes(time)


def _named() -> str | None:
    return jax.config.jax_compilation_cache_dir


def own_folder() -> str:
    """Returns a folder that belongs to this user alone, and makes it if need be."""
    place = storage.cache()
    root = storage.path(storage.DEFAULT_CACHE if storage.is_remote(place) else place)
    # A cache of data may be shared by users, the programs are not.
    folder = os.path.join(root, f"compiled-{os.getuid()}")
    os.makedirs(root, exist_ok=True)
    try:
        os.mkdir(folder, mode=0o700)
    except FileExistsError:
        pass
    # Not stat, which follows a link that another user may have put there.
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(f"{folder} is not a directory of this user: remove it")
    # Whoever can write here has their machine code run by this user.
    if found.st_mode & 0o022:
        raise UserError(f"{folder} can be written by others: remove it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written")
    return folder
