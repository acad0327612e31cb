"""Scores a text with a trained model: python -m xlformer.evaluate --workdir=DIR.

Prints a card that says what was measured, as a table and as JSON, and writes both into
the work directory. See scoring.py for what --warmup means.
"""

from __future__ import annotations

import json
import sys

from xlformer import command, compiled, fields, scoring, sharding
from xlformer.data.local import is_read_once
from xlformer.errors import Argument, UserError
from xlformer.progress import Progress
from xlformer.scoring import cards
from xlformer.scoring.evaluation import check, evaluate


def _main(argv) -> int:
    parser = command.Parser(prog="python -m xlformer.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, type=command.place)
    parser.add_argument("--split", help="train, validation (the default) or test")
    parser.add_argument("--text", type=command.place, help="score this file instead")
    parser.add_argument("--data_path", help="where the run's own text lies now")
    parser.add_argument("--checkpoint", default="best", help="best, latest or a step")
    parser.add_argument("--params", help="raw or ema; default: ema where it is kept")
    parser.add_argument("--segment_length", type=int)
    parser.add_argument("--memory_length", help="one number, or several: 100,200,400")
    parser.add_argument("--clamp_length", type=int)
    parser.add_argument("--same_length", nargs="?", const="true", help="true or false")
    parser.add_argument("--batch_size", type=int, help="rows")
    parser.add_argument("--warmup", default="auto", help=", ".join(scoring.WARMUPS))
    parser.add_argument("--mesh", default="data=-1", help=sharding.MESH_HELP)
    args = parser.parse(argv)
    if args.text and args.split:
        raise UserError(
            f"--text={args.text} with --split={args.split}: a file of one's own has no "
            "splits"
        )
    compiled.keep()
    mesh = sharding.make_mesh(sharding.parse_mesh(args.mesh), where="--mesh")
    texts = [None] if args.memory_length is None else args.memory_length.split(",")
    lengths = [_parsed("memory_length", text, 0) for text in texts]
    for length in lengths:  # All of them before the first is scored.
        check(memory_length=length)
    if len(lengths) > 1 and args.text and is_read_once(args.text):
        raise UserError(
            f"--text={args.text} can be read only once, --memory_length names "
            f"{len(lengths)}: save it as a file"
        )
    found = []
    for number, length in enumerate(lengths, 1):
        which = f" {number} of {len(lengths)}:" * (len(lengths) > 1)
        card = evaluate(
            args.workdir,
            split=args.split or "validation",
            text=args.text,
            data_path=args.data_path,
            checkpoint=args.checkpoint,
            params=args.params,
            segment_length=args.segment_length,
            memory_length=length,
            clamp_length=args.clamp_length,
            same_length=_parsed("same_length", args.same_length, False),
            batch_size=args.batch_size,
            warmup=args.warmup,
            mesh=mesh,
            progress=Progress("evaluating" + which),
        )
        found.append(card)
    print(cards.table(found))
    for warning in {c["warning"] for c in found if "warning" in c}:
        print(f"warning: {warning}", file=sys.stderr)
    as_json = [cards.finite(card) for card in found]
    print(json.dumps(as_json if len(as_json) > 1 else as_json[0]))
    cards.write(args.workdir, found)
    return 0


def _parsed(name: str, text: str | None, like):
    """The value of a flag; None where it is not given."""
    return None if text is None else fields.parse(text, like, Argument(name, text))


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
