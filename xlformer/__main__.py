"""All commands by name: python -m xlformer, or xlformer where it is installed."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from xlformer import streams
from xlformer.errors import UserError, did_you_mean

COMMANDS = {
    "train": ("train", "trains a model, or resumes; its data is prepared by itself"),
    "evaluate": ("evaluate", "scores a text and writes a card of what was measured"),
    "generate": ("generate", "continues a text, or talks with --interactive"),
    "prepare": ("prepare", "downloads and encodes a corpus ahead of training"),
    "convert": (
        "convert.__main__",
        "makes a work directory of other programs' weights",
    ),
    "export": ("export", "writes a trained model for other programs"),
    "plan": ("plan", "says whether a run fits onto a slice, and what it costs"),
    "bench": ("bench", "times a model on the devices here"),
    "compare": ("compare", "measures what makes one model better than another"),
    "recl": ("recl", "says how much context models make use of"),
    "harness": ("harness.__main__", "scores tasks of lm-evaluation-harness"),
    "report": ("report", "writes a page on runs, with pictures, to open from the disk"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code of the one that is named first in argv."""
    streams.stand_in()
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        module, _ = COMMANDS[name]
        try:
            command = importlib.import_module(f"xlformer.{module}")
        # The import takes a second, most of it jax, and is outside of command.run.
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
        return command.main(rest)
    if name in ("-h", "--help", "help"):
        return _said(usage())
    if name == "--version":
        # Here, because --help needs no jax, which takes a second to import.
        from xlformer import command

        return _said(command.version())
    known = COMMANDS if name[:1] != "-" else ("--help", "--version")
    error = UserError(f"unknown command {name!r}{did_you_mean(name, known)}")
    print(f"error: {error}", file=sys.stderr)
    return 2


def _said(text: str) -> int:
    # `... | head` has read what it wanted, and closes the pipe.
    with contextlib.suppress(OSError):
        print(text)
    streams.drop_stdout()
    return 0


def usage() -> str:
    installed = os.path.basename(sys.argv[0]) == "xlformer"
    start = "xlformer" if installed else "python -m xlformer"
    lines = [f"  {name:10}{about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [f"usage: {start} COMMAND ... ({start} COMMAND --help)", "", *lines]
    )


if __name__ == "__main__":
    sys.exit(main())
