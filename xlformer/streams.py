"""Standard streams, also closed, full or no longer read. Imports nothing heavy."""

from __future__ import annotations

import os
import sys


def say(line: str) -> None:
    """A line to people, beside what the program prints."""
    print(f"xlformer: {line}", file=sys.stderr, flush=True)


def stand_in() -> None:
    """Puts the null device where a standard stream is closed (`2>&-`).

    The next file that is opened would get its number: what libraries write to standard
    error would then go into a checkpoint.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # Python sets them to None where the descriptor is closed.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def pass_over_abandoned() -> None:
    """Leaves out what reads say that Orbax abandons where one of several fails.

    Each would end with a trace, beside the line of the one that failed.
    """
    if sys.unraisablehook is sys.__unraisablehook__:  # not a debugger's, or pytest's
        sys.unraisablehook = _unless_abandoned


def _unless_abandoned(found) -> None:
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def drop_stdout() -> bool:
    """Gives up what standard output does not take; says whether there was anything.

    Python would try again at its exit, complain, and end with code 120.
    """
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        # What is left in the buffer goes to the null device when Python flushes at its
        # exit.
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        return True
    return False
