"""Times a model on the devices here: python -m xlformer.bench --config=NAME, or a table
of published speeds with --preset=NAME.

Random tokens, so no data is needed. All that is compared is compiled first and then
timed in turns, so a machine that becomes slower does so for all; the table has the
median and the spread. FLOPs are useful ones (Model.flops): MFU is their share of the
datasheet, and beside it of a step of matrix products only, timed in the same turns.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys

from etils import epath

from xlformer import command, sharding
from xlformer import config as config_lib
from xlformer.errors import Argument, UserError
from xlformer.machines import bench_plot, bench_presets, cores, rehearsal
from xlformer.machines.bench_runs import UNCHANGED, Values, bench, bench_preset
from xlformer.machines.bench_table import render
from xlformer.machines.bench_workloads import WORKLOADS


def _parser() -> command.Parser:
    parser = command.Parser(prog="python -m xlformer.bench", description=__doc__)
    parser.add_argument("--config", help="NAME[:args] or FILE.py[:args]")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="NAME[:args]",
        help="another config, of any model, timed in turns with it; may be repeated, "
        "and --config.a.b=v is then for all of them",
    )
    parser.add_argument(
        "--preset", help=f"instead of --config: {', '.join(bench_presets.PRESETS)}"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="the preset with tiny sizes"
    )
    parser.add_argument("--mode", choices=list(WORKLOADS), help="default: train")
    parser.add_argument(
        "--compare",
        default="",
        metavar="FIELD:A,B",
        help="of config.model, timed in turns: attention:xla,blocked",
    )
    parser.add_argument(
        "--sweep",
        default="",
        metavar="FIELD:A,B",
        help="of config.model, one after the other: memory_length:64,256",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each repeat")
    parser.add_argument("--mesh", help=sharding.MESH_HELP)
    cores.add_flag(parser)
    parser.add_argument(
        "--json", type=command.place, help="a file for the same in numbers"
    )
    parser.add_argument(
        "--plot", type=command.place, help="an .svg for the same against --sweep"
    )
    return parser


def _main(argv) -> int:
    args, overrides = _parser().parse_with_overrides(argv)
    compare = _values("compare", args.compare)
    sweep = _values("sweep", args.sweep)
    _check(args, sweep)
    options = {
        "compare": compare,
        "repeats": args.repeats,
        "seconds": args.seconds,
        "sizes": sharding.parse_mesh(args.mesh) if args.mesh else None,
    }
    if args.preset:
        title = args.preset + (" with tiny sizes" if args.rehearse else "")
        parts = bench_preset(args.preset, overrides, rehearse=args.rehearse, **options)
    else:
        mode = args.mode or "train"
        config = _load("config", args.config, overrides)
        against = [_load("against", spec, overrides) for spec in args.against]
        _share_cores(args, mode, [config, *against])
        title = ", ".join([one.name for one in (config, *against)] + [mode])
        parts = [bench(config, against=against, mode=mode, sweep=sweep, **options)]
    rows = []
    for part in parts:
        rows += part
        # After each part, because the next may take more time than there is.
        if args.json:
            epath.Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")
        if args.preset:
            # A preset takes long: each line is shown as it is measured, the table at
            # the end.
            print(render(part).splitlines()[1], file=sys.stderr, flush=True)
    about = rows[0]
    where = f"{about['devices']} x {about['device']}, jax {about['jax']}"
    print(f"{title}, {where}, {about['dtype'] or 'dtype not known'}")
    print(render(rows))
    if args.plot:
        bench_plot.plot(rows, args.plot)
    return 0


def _share_cores(args, mode: str, configs) -> None:
    """One number for all that is compared: that of the first, whose rows all share."""
    config, training = configs[0], mode == "train"
    section = config.train if training else config.eval
    sizes = sharding.parse_mesh(args.mesh) if args.mesh else config.mesh
    cores.prepare(
        config,
        asked=args.cpu_devices,
        rows=math.gcd(
            *(one["train" if training else "eval"].batch_size for one in configs)
        ),
        segment_length=1 if mode == "generate" else section.segment_length,
        sizes=sizes,
        training=training,
    )


def _load(flag: str, spec: str, overrides):
    try:
        config = config_lib.load(spec, overrides)
    except UserError as error:
        raise UserError(*(_of(flag, part) for part in error.parts)) from error
    config.model.vocab_size = rehearsal.vocab_size(spec, config)
    config.name = spec  # so that two forms of one config are told apart
    return config


def _of(flag: str, part):
    """A part of a line with the flag that named the config: load knows one alone."""
    named = isinstance(part, Argument) and part.name == "config"
    return dataclasses.replace(part, name=flag) if named else part


def _values(flag: str, text: str) -> Values:
    """Reads 'memory_length:64,256' or 'eval.segment_length:64,256'."""
    if not text:
        return UNCHANGED
    field, _, values = text.partition(":")
    found = [value for value in values.split(",") if value]
    if not found:
        raise UserError(f"--{flag}={text} is not FIELD:VALUE,VALUE")
    return Values(field if "." in field else f"model.{field}", found)


def _check(args, sweep: Values) -> None:
    if args.repeats < 1 or not args.seconds > 0:
        raise UserError(
            f"--repeats={args.repeats} and --seconds={args.seconds} must be positive"
        )
    if bool(args.config) == bool(args.preset):
        raise UserError(
            f"--config={args.config or ''} and --preset={args.preset or ''}: give one"
        )
    if args.preset and (args.mode or args.sweep):
        given = f"--mode={args.mode}" if args.mode else f"--sweep={args.sweep}"
        raise UserError(f"{given} is not for --preset={args.preset}, which has its own")
    if args.against and (args.preset or args.compare):
        other = (
            f"--preset={args.preset}" if args.preset else f"--compare={args.compare}"
        )
        raise UserError(
            f"--against={args.against[0]} with {other}: one thing is compared at a time"
        )
    if args.plot:
        bench_plot.check(args.plot, sweep)
    if args.rehearse and not args.preset:
        raise UserError("--rehearse is for --preset; a config has its ':debug'")


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
