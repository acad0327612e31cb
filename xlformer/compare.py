"""Measures what makes models of one kind better than another, or cheaper.

    python -m xlformer.compare NAME[:small|:tiny] [--workdir=DIR ...] --out=DIR

NAME is an instrument; --help after it lists its flags. Each prints its tables and
writes them into --out as NAME.json, with the device, the versions and the date, and as
a picture, NAME.svg. What it trains lies in --out/runs, where another call finds it.
Without --workdir the runs are its own, of the size that is named: `small` takes minutes
on two CPU cores, `tiny` seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Iterator, Sequence

from xlformer import command, compiled, instruments, pictures, sharding, storage
from xlformer.errors import Argument, UserError, did_you_mean
from xlformer.instruments import members as members_lib
from xlformer.instruments.instrument import SIZES, Instrument, Request, Result, Table
from xlformer.machines import cores, quick
from xlformer.scoring import cards, evaluation
from xlformer.streams import say
from xlformer.tables import aligned

PROG = "python -m xlformer.compare"
MOST = (1 << 32) - 1  # of a number that a flag takes: a seed has 32 bits


def _parser(prog: str, instrument: Instrument) -> command.Parser:
    parser = command.Parser(prog=prog, description=instrument.__doc__)
    parser.add_argument(
        "--out", required=True, type=command.place, help="a folder for what is found"
    )
    if instrument.RUNS:
        members_lib.add_flags(parser)
    if instrument.SEEDS:
        parser.add_argument("--seeds", type=int, help="runs of each kind, for a spread")
    instrument.add_flags(parser)
    return parser


def _main(argv: Sequence[str] | None) -> int:
    first, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if first in ("-h", "--help", "--version"):
        _overview().parse([first])
    name, colon, size = first.partition(":")
    if name.startswith("-"):
        raise UserError(f"{first} stands where an instrument must: {PROG} NAME ...")
    instruments.find(name)
    size = size if colon else SIZES[0]
    if size not in SIZES:
        raise UserError(f"{first}: no size {size!r}{did_you_mean(size, SIZES)}")
    return measure(f"{PROG} {first}", name, size, rest)


def measure(prog: str, name: str, size: str, argv: Sequence[str]) -> int:
    """Runs an instrument with the flags of a command; returns the exit code."""
    instrument = instruments.find(name)
    _refuse(argv, "--workdir", name, instrument.RUNS, "measures no runs that are given")
    _refuse(argv, "--seeds", name, bool(instrument.SEEDS), "has no spread over seeds")
    args = _parser(prog, instrument).parse(argv)
    _check(args)
    out = storage.path(args.out)
    storage.check_writable(out, "out")
    request = Request(
        size=size,
        out=out,
        members=_members(instrument, args),
        seeds=_seeds(instrument, size, args),
        args=args,
    )
    if not pictures.can_be_made():
        say(f"there will be no picture, which needs {pictures.NEEDED}")
    if size == "tiny" and not request.members:
        quick.compile_quickly()
    compiled.keep()
    begin = time.perf_counter()
    with _made(out):
        result = instrument.measure(request)
    about = {
        "instrument": name,
        # What is given has the size that it has.
        "size": None if request.members else size,
        "command": shlex.join([*prog.split(), *argv]),
        "seconds": round(time.perf_counter() - begin, 1),
        "processor": cores.processor(),
        **evaluation.machine(sharding.make_mesh({"data": -1})),
    }
    _report(out, name, result, about)
    return 0


def _refuse(argv, flag: str, name: str, has: bool, why: str) -> None:
    """Raises UserError for a flag of other instruments: no other one is meant."""
    if not has and any(item.partition("=")[0] == flag for item in argv):
        raise UserError(f"unknown argument {flag}: {name} {why}")


def _check(args) -> None:
    """Refuses what no flag of an instrument means: nothing, and what has no end."""
    for name, value in vars(args).items():
        for one in value if isinstance(value, list) else [value]:
            # An unset variable of a script, which does not mean the default.
            if one == "":
                raise UserError(Argument(name, one), " is empty")
            if isinstance(one, int | float) and not abs(one) <= MOST:
                line = f" must be a number up to {MOST:,}"
                raise UserError(Argument(name, one), line)


@contextlib.contextmanager
def _made(out) -> Iterator[None]:
    """The folder, which is not left behind where nothing came into it."""
    new = []
    if not storage.is_remote(out):
        above = pathlib.Path(os.path.abspath(out))
        new = [p for p in (above, *above.parents) if not os.path.lexists(p)]
    storage.make_folder(out, "out")
    try:
        yield
    except BaseException:
        for folder in new:
            # It stays if another process, or a run of ours, lies in it.
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _members(instrument: Instrument, args) -> list[members_lib.Member]:
    return members_lib.plain(members_lib.given(args)) if instrument.RUNS else []


def _seeds(instrument: Instrument, size: str, args) -> int:
    if not instrument.SEEDS:
        return 1
    if args.seeds is not None and getattr(args, "workdir", None):
        given = Argument("seeds", args.seeds), " with ", Argument("workdir")
        raise UserError(*given, ": runs that are given have the seeds that they have")
    seeds = instrument.SEEDS[size] if args.seeds is None else args.seeds
    if seeds < 2:
        raise UserError(f"--seeds={seeds} shows no spread: at least 2 are needed")
    return seeds


def _report(out, name: str, result: Result, about: dict) -> None:
    try:
        _write(out, name, result, about)
    # After the files: what reads the tables may end, as `head` does, or be full. They
    # are printed also where the files cannot be written.
    finally:
        print("\n\n".join(map(_text, result.tables)))
        for note in result.notes:
            print(note)
    drawn = " and .svg" * pictures.can_be_made()
    print(f"{out / name}.json{drawn}")


def _write(out, name: str, result: Result, about: dict) -> None:
    found = {
        **about,
        "tables": [
            {"title": t.title, "columns": list(t.columns), "rows": list(t.rows)}
            for t in result.tables
        ],
        "notes": list(result.notes),
        **result.facts,
    }
    text = json.dumps(cards.finite(found), indent=1)
    storage.put(out / f"{name}.json", text + "\n")
    picture = out / f"{name}.svg"
    # What lies there from an earlier call is not of these numbers.
    with storage.answering(f"{picture}: cannot be removed", picture):
        picture.unlink(missing_ok=True)
    if pictures.can_be_made():
        figure = pictures.figure()
        result.draw(figure)
        pictures.save(figure, picture)


def _text(table: Table) -> str:
    rows = [table.columns, *([_cell(x) for x in row] for row in table.rows)]
    return "\n".join([table.title, *aligned(rows, left=table.left)])


def _cell(value) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _overview() -> command.Parser:
    """What the command says of itself before an instrument is named."""
    lines = [f"  {name:10}{about}" for name, about in instruments.NAMES.items()]
    about = "\n".join([__doc__ or "", "instruments:", *lines])
    parser = command.Parser(prog=PROG, description=about)
    parser.add_argument("name", metavar="NAME", help="of an instrument, first of all")
    return parser


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
