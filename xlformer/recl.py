"""How much context models make use of: python -m xlformer.recl --workdir=A --workdir=B
--out=DIR. It is `python -m xlformer.compare recl`."""

from __future__ import annotations

import sys

from xlformer import command, compare


def _main(argv) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return compare.measure("python -m xlformer.recl", "recl", "small", argv)


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
