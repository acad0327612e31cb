"""Files that anybody may have made: read without waiting for ever and without end.

A work directory, a prepared corpus or a card may come from another user or machine. A
pipe in the place of a file has nobody who writes into it, JSON may be nested until
Python's stack ends, and a device gives bytes as long as somebody takes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Iterator

from xlformer import storage

# Bytes of settings, of a card, of what may lie in their place.
MOST = 1 << 26
# Of what grows with a text: its symbols, the list of its shards.
MOST_OF_TEXT = 1 << 30
# Levels of lists and objects; nothing of ours has ten. Whoever goes through a tree, or
# prints it, is deeper in the stack than the parser was.
DEEPEST = 50
OF_PROCESSES = ("/dev/fd", "/proc/self/fd")
ENDLESS = "a pipe or a device, which may never end"


def read(file, most: int = MOST) -> bytes:
    """All of a file.

    Raises OSError; ValueError for what is no file, or has more than `most` bytes; and
    WorthAnotherTry where a store does not answer.
    """
    if storage.is_remote(file):
        try:
            found = storage.path(file).read_bytes()
        except FileNotFoundError:
            raise
        # Errors of the network and of credentials have no common class.
        except Exception as error:
            line = f"{os.fspath(file)}: cannot be read"
            raise storage.unreadable(line, file, error) from error
    else:
        check_file(file)
        with open(file, "rb") as opened:
            found = opened.read(most + 1)
    if len(found) > most:
        raise ValueError(f"it has more than {most} bytes")
    return found


def read_json(file, most: int = MOST):
    """What a file says in JSON; raises what `read` does, and nothing else."""
    try:
        found = json.loads(read(file, most).decode())
    except RecursionError as error:
        raise ValueError(str(error)) from None
    check_depth(found)
    return found


def check_depth(found) -> None:
    """Raises ValueError for more than DEEPEST lists and objects in each other."""
    level = [found]
    for _ in range(DEEPEST + 1):
        nodes = [x.values() if isinstance(x, dict) else x for x in level if _holds(x)]
        if not nodes:
            return
        level = [child for node in nodes for child in node]
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def _holds(found) -> bool:
    return isinstance(found, list | dict)


def check_file(path) -> None:
    """Raises ValueError for a local path that may never end."""
    if is_endless(path):
        raise ValueError(f"it is {ENDLESS}")


def endless(folder, names: Iterable[str]) -> str | None:
    """The first of `below` that may never end."""
    for path in below(folder, names):
        with contextlib.suppress(OSError):  # gone meanwhile
            if is_endless(path):
                return path
    return None


def below(folder, names: Iterable[str]) -> Iterator[str]:
    """Paths of these names in a folder, and of all that lies in them.

    None in an object store, which has no links, no pipes and no devices.
    """
    if storage.is_remote(folder):
        return
    tops = [os.path.join(folder, name) for name in sorted(names)]
    yield from tops
    for top in tops:
        for directory, folders, files in os.walk(top):
            yield from (os.path.join(directory, name) for name in (*folders, *files))


def is_endless(path) -> bool:
    """Whether a local path that is there is a pipe or a device."""
    # What a shell makes of <(command): a person has named it, and waits for its end.
    if os.path.dirname(path) in OF_PROCESSES:
        return False
    mode = os.stat(path).st_mode
    # Whoever opens a folder as a file is told so.
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
