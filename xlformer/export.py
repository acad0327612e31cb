"""Writes a trained model for other programs:
python -m xlformer.export --workdir=DIR --format=safetensors --out=NEW.

safetensors  weights, config and vocabulary; convert --format=safetensors reads them
original     what the program of the paper loads: Transformer-XL, AWD-LSTM, SHA-RNN
hf           what Hugging Face's TransfoXL loads
stablehlo    functions that run with jax alone, on CPU, GPU and TPU (docs/export.md)
"""

from __future__ import annotations

import argparse
import json
import sys

from xlformer import command, runs
from xlformer.convert import place, portable, writing
from xlformer.convert.hparams import MOST_TOKENS
from xlformer.errors import Argument, UserError
from xlformer.exporting import stablehlo

__all__ = ["main"]

FORMATS = ("safetensors", "original", "hf", "stablehlo")
ONLY_STABLEHLO = ("segment_length", "batch_size", "dtype")


def _arguments(argv) -> argparse.Namespace:
    parser = command.Parser(prog="python -m xlformer.export", description=__doc__)
    parser.add_argument("--workdir", required=True, type=command.place)
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", required=True, type=command.place, help="new or empty")
    parser.add_argument("--checkpoint", default="best", help=runs.CHECKPOINT_HELP)
    parser.add_argument("--params", help="raw or ema; default: ema where it is kept")
    parser.add_argument(
        "--segment_length",
        type=int,
        help="of stablehlo: targets in one call; default: config.eval's",
    )
    parser.add_argument(
        "--batch_size", type=int, help="of stablehlo: rows; default: any number"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of stablehlo: to compute in; default: the config's, float32 for auto",
    )
    args = parser.parse(argv)
    for name in ONLY_STABLEHLO:
        value = getattr(args, name)
        if value is None:
            continue
        if args.format != "stablehlo":
            line = f" is of --format=stablehlo, not of --format={args.format}"
            raise UserError(Argument(name, value), line)
        if name != "dtype" and not 1 <= value <= MOST_TOKENS:
            line = f" must be at least 1 and at most {MOST_TOKENS}"
            raise UserError(Argument(name, value), line)
    return args


def _main(argv) -> int:
    args = _arguments(argv)
    place.check(args.out)
    run = runs.load(args.workdir, checkpoint=args.checkpoint, params=args.params)
    said = {"out": args.out, "format": args.format, "step": run.step}
    if args.format in ("original", "hf"):
        _write_original(args, run)
    else:
        with place.whole(args.out) as folder:
            if args.format == "safetensors":
                portable.write(run, folder)
            else:
                options = {name: getattr(args, name) for name in ONLY_STABLEHLO}
                stablehlo.write(run, folder, **options)
    print(json.dumps(said))
    return 0


def _write_original(args, run: runs.Run) -> None:
    write = {"original": writing.write_original, "hf": writing.write_hf}[args.format]
    write(
        args.out,
        run.model.config,
        run.params,
        run.vocabulary,
        segment_length=run.config.train.segment_length,
    )


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
