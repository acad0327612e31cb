"""What is said to the person at the keyboard: one line, and an exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

# What a command ends with, if not with 0. The programs in launch/ act by these numbers:
# a shell reads the lines, and Python runs this file alone, without jax and without the
# rest of the package.
BAD_INPUT = 2  # one line has said what; no restart mends it
INTERRUPTED = 42  # stopped by a signal; everything worth keeping is saved
HUNG = 43  # a host made no step; all hosts have to start again
# Control characters that are no white space.
_STEERING = dict.fromkeys([*range(32), *range(127, 160)], "\ufffd")
# Stands for a value that is not given, because None is one.
_UNSAID = object()


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument as the line of a UserError names it.

    Who calls a function reads `warmup='fill'`; who types a command that has this flag
    reads `--warmup=fill`.
    """

    name: str
    value: Any = _UNSAID

    def __str__(self) -> str:
        if self.value is _UNSAID:
            return self.name
        is_path = isinstance(self.value, os.PathLike)
        value = os.fspath(self.value) if is_path else self.value
        return f"{self.name}={value!r}"

    def as_flag(self) -> str:
        return f"--{self.name}" + ("" if self.value is _UNSAID else f"={self.value}")


@dataclasses.dataclass(frozen=True)
class Advice:
    """Words around an argument that helps, for a line that is complete without them.

    A command that has no such flag leaves them out.
    """

    before: str
    argument: Argument
    after: str = ""


class UserError(Exception):
    """Something only the caller can change; carries exactly one line.

    Library functions raise it and never exit. `command.run` turns it into that line on
    standard error and the exit code BAD_INPUT.

    Attributes:
      parts: texts, each Argument that the line names, and Advice; joined they are the
        line.
    """

    def __init__(self, *parts: str | Argument | Advice):
        self.parts = parts
        super().__init__(self.line())

    def line(self, flags: Collection[str] = ()) -> str:
        """The line, with arguments whose name is among `flags` as the flags they are.

        The flag 'config.' stands for every override of a field of the config.
        """

        def shown(part) -> str:
            if isinstance(part, Advice):
                if flags and part.argument.name not in flags:
                    return ""
                return part.before + shown(part.argument) + part.after
            if not isinstance(part, Argument):
                return str(part)
            override = part.name.startswith("config.") and "config." in flags
            return part.as_flag() if override or part.name in flags else str(part)

        # One line, whatever messages of libraries were put into it; what steers a
        # terminal may come from a stranger's directory.
        text = "".join(map(shown, self.parts))
        return " ".join(text.split()).translate(_STEERING)


class WorthAnotherTry(UserError):
    """An error that is perhaps only this host's, or only of this moment.

    Its exit code is 1: a launcher then starts again, in a job of several hosts all of
    them, which it does not do for bad input.
    """


@contextlib.contextmanager
def about(what: str | Argument) -> Iterator[None]:
    """Lets the lines of UserErrors begin with a place or an argument: "what: "."""
    try:
        yield
    except UserError as error:
        raise type(error)(what, ": ", *error.parts) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ', did you mean X?' for the nearest known name, else the list of all."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def some(names: Iterable[str]) -> str:
    """The first eight of many, as a line lists them."""
    names = list(names)
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of JAX says that the memory of a device does not suffice."""
    # JAX has no class of its own for it: the status stands in the message.
    return "RESOURCE_EXHAUSTED" in str(error)


def reason(error: Exception) -> str:
    """The beginning of a message that may be pages long, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
