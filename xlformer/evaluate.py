"""Scores a text with a trained model: python -m xlformer.evaluate --workdir=DIR.

Prints a card that says what was measured, as a table and as JSON, and writes both into
the work directory. See scoring/rows.py for what --warmup means. With --follow it stays
beside a training, on devices of its own, and scores each checkpoint that it saves.
Each host of a job makes the same call; the first of them prints and writes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable

from xlformer import command, compiled, hosts, runs, scoring, sharding
from xlformer import fields as fields_lib
from xlformer.data.documents import is_read_once
from xlformer.errors import Argument, UserError
from xlformer.machines import cores
from xlformer.progress import Progress
from xlformer.runs import following
from xlformer.scoring import EvalSettings, cards
from xlformer.scoring.evaluation import Scorer, evaluate

__all__ = ["EvalSettings", "evaluate", "main"]


def _parser() -> command.Parser:
    parser = command.Parser(prog="python -m xlformer.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, type=command.place)
    parser.add_argument("--split", help="train, validation (the default) or test")
    parser.add_argument("--text", type=command.place, help="score this file instead")
    parser.add_argument("--data_path", help="where the run's own text lies now")
    parser.add_argument("--checkpoint", help=f"{runs.CHECKPOINT_HELP} (best)")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="score every checkpoint, those to come too, until the run is complete",
    )
    parser.add_argument("--params", help="raw or ema; default: ema where it is kept")
    parser.add_argument("--segment_length", type=int)
    parser.add_argument("--stride", type=int, help="of a window that slides, in tokens")
    parser.add_argument("--memory_length", help="one number, or several: 100,200,400")
    parser.add_argument("--clamp_length", type=int)
    parser.add_argument("--same_length", nargs="?", const="true", help="true or false")
    parser.add_argument("--batch_size", type=int, help="rows")
    parser.add_argument("--warmup", default="auto", help=", ".join(scoring.WARMUPS))
    parser.add_argument("--dynamic", help="sgd or rms: learn from what was scored")
    parser.add_argument("--dynamic_rate", help="one number, or several: 1e-5,1e-4")
    parser.add_argument("--dynamic_decay", type=float, help="to what was trained")
    parser.add_argument("--dynamic_epsilon", type=float, help="of rms")
    parser.add_argument(
        "--dynamic_segments", type=int, help="of the training text, for rms"
    )
    parser.add_argument("--mesh", default="data=-1", help=sharding.MESH_HELP)
    cores.add_flag(parser)
    hosts.add_flags(parser)
    return parser


def _main(argv) -> int:
    args = _parser().parse(argv)
    if args.follow and args.checkpoint is not None:
        raise UserError(
            f"--checkpoint={args.checkpoint} with --follow, which scores every one"
        )
    if args.follow and args.dynamic is not None:
        raise UserError(f"--dynamic={args.dynamic} with --follow: score one checkpoint")
    if args.checkpoint is None:
        args.checkpoint = "best"
    settings = _settings(args)
    compiled.keep()
    with hosts.reading(args, args.workdir):
        sizes = sharding.parse_mesh(args.mesh)
        _share_cores(args, settings[0], sizes)
        rows = settings[0].learning_rows
        mesh = sharding.make_mesh(sizes, rows=rows, where="--mesh")
        scorers = [Scorer(one, mesh) for one in settings]
        # Scorers are made once: with --follow each checkpoint uses the same programs.
        for run in _runs(args, mesh):
            found = [
                scorer.card(run, _progress(number, len(scorers)))
                for number, scorer in enumerate(scorers, 1)
            ]
            del run  # or its parameters would lie beside the next one's
            if hosts.is_first():
                _report(args.workdir, found)
    return 0


def _settings(args) -> list[EvalSettings]:
    """The settings of each card, all checked before the first is scored."""
    several = {
        "memory_length": _several("memory_length", args.memory_length, 0),
        "dynamic_rate": _several("dynamic_rate", args.dynamic_rate, 0.0),
    }
    same_length = _parsed("same_length", args.same_length, False)
    # The flags are named as the fields of EvalSettings are.
    given = vars(args) | {"same_length": same_length}
    names = {field.name for field in dataclasses.fields(EvalSettings)}
    given = {k: v for k, v in given.items() if k in names}
    settings = [
        EvalSettings(**given | dict(zip(several, values, strict=True)))
        for values in itertools.product(*several.values())
    ]
    if args.text and is_read_once(args.text):
        again = ""
        named = [name for name, values in several.items() if len(values) > 1]
        if named:
            again = f"--{named[0]} names {len(several[named[0]])}"
        elif args.follow:
            again = "--follow scores it again and again"
        if again:
            raise UserError(
                f"--text={args.text} can be read only once, {again}: save it as a file"
            )
    return settings


def _share_cores(args, settings: EvalSettings, sizes) -> None:
    config = runs.read_config(args.workdir)
    settings = settings.filled(config.eval)
    cores.prepare(
        config,
        asked=args.cpu_devices,
        rows=settings.batch_size or 1,
        segment_length=settings.scored_length,
        sizes=sizes,
    )


def _runs(args, mesh) -> Iterable[runs.Run]:
    options = {"params": args.params, "mesh": mesh}
    if args.follow:
        return following.follow(args.workdir, **options)
    return [runs.load(args.workdir, checkpoint=args.checkpoint, **options)]


def _progress(number: int, count: int) -> Progress | None:
    if not hosts.is_first():
        return None
    return Progress("evaluating" if count == 1 else f"evaluating {number} of {count}:")


def _report(workdir, found: list[dict]) -> None:
    print(cards.table(found))
    for warning in {c["warning"] for c in found if "warning" in c}:
        print(f"warning: {warning}", file=sys.stderr)
    as_json = [cards.finite(card) for card in found]
    # Flushed: whoever reads a pipe of --follow shall not wait for the next card.
    print(json.dumps(as_json if len(as_json) > 1 else as_json[0]), flush=True)
    cards.write(workdir, found)


def _several(name: str, text: str | None, like) -> list:
    """The values of a flag that takes several, between commas."""
    texts = [None] if text is None else text.split(",")
    return [_parsed(name, one, like) for one in texts]


def _parsed(name: str, text: str | None, like):
    """The value of a flag; None where it is not given."""
    return None if text is None else fields_lib.parse(text, like, Argument(name, text))


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
