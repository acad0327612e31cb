"""What is said to the person at the keyboard: one line, and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What a command ends with, if not with 0. launch/ reads these lines and acts by them.
BAD_INPUT = 2  # one line has said what; no restart mends it
INTERRUPTED = 42  # stopped by a signal; everything worth keeping is saved
HUNG = 43  # a host made no step; all hosts have to start again


class UserError(Exception):
    """Something only the caller can change; carries exactly one line.

    Library functions raise it and never exit. `command.run` turns it into that line on
    standard error and the exit code BAD_INPUT.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class WorthAnotherTry(UserError):
    """Perhaps only this host's, or only now: in a job of several, exit code 1.

    A launcher then starts all hosts again, which it does not do for bad input.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ', did you mean X?' for the nearest known name, else the list of all."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def reason(error: Exception) -> str:
    """The beginning of a message that may be pages long, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
