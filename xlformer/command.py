"""What every command shares: one-line errors, exit code 2, flags with suggestions."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

import jax

from xlformer.errors import UserError, did_you_mean

USER_ERROR_EXIT_CODE = 2


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors.

    Flags are never abbreviated: a typo must not pick a flag.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")

    def parse_with_overrides(
        self, argv: Sequence[str] | None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses argv; returns the flags and the `--config.a.b=v` items as 'a.b=v'."""
        args, rest = self.parse_known_args(argv)
        overrides = [r[len("--config.") :] for r in rest if r.startswith("--config.")]
        flags = [name for action in self._actions for name in action.option_strings]
        for item in rest:
            if not item.startswith("--config."):
                near = did_you_mean(item.split("=")[0], flags)
                raise UserError(f"unknown argument {item!r}{near}")
        return args, overrides

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parses argv; an unknown flag is an error that names the nearest known one."""
        args, overrides = self.parse_with_overrides(argv)
        if overrides:
            raise UserError(
                f"--config.{overrides[0]}: this command takes no config overrides"
            )
        return args


def run(main: Callable[[Sequence[str] | None], int], argv=None) -> int:
    """Calls main(argv); a UserError becomes its one line and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal that lacks a character shows '?'.
        sys.stdout.reconfigure(errors="replace")
    try:
        return main(argv)
    except UserError as error:
        message = str(error)
    except MemoryError as error:
        message = f"out of memory: {reason(error)}"
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        message = f"out of memory on the device: {reason(error)}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `... | head` has read what it wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR_EXIT_CODE


def reason(error: Exception) -> str:
    """The beginning of a message that may be pages long, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
