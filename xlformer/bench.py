"""Times a model on the devices here: python -m xlformer.bench --config=NAME, or a table
of published speeds with --preset=NAME.

Random tokens, so no data is needed. All that is compared is compiled first and then
timed in turns, so a machine that becomes slower does so for all; the table has the
median and the spread. FLOPs are useful ones (Model.flops): MFU is their share of the
datasheet, and beside it of a step of matrix products only, timed in the same turns.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import sys

import jax
from etils import epath

from xlformer import command, sharding
from xlformer import config as config_lib
from xlformer.errors import UserError, reason
from xlformer.kernels.relative_attention import relative_attention
from xlformer.machines import bench_plot, bench_presets, chips, rehearsal
from xlformer.machines.bench_cases import CASES, Case, matmul_case
from xlformer.machines.bench_table import table
from xlformer.models.base import compute_dtype

REHEARSED_VOCABULARY = 32  # more than the cutoffs of config.shrink


@contextlib.contextmanager
def _memory_may_end(case: Case):
    """Out of memory is one case's result: the others go on."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        case.out_of_memory = reason(error)
        case.run = None  # with all that it holds


def measure(cases: list[Case], *, repeats: int, seconds: float) -> None:
    """Times all in turns: `repeats` turns of about `seconds` for each."""
    times = {}
    for case in cases:
        if not case.out_of_memory:
            with _memory_may_end(case):
                case.run(1)  # warm
                once, _ = case.run(1)
                turns = round(seconds / max(once, 1e-9))
                times[id(case)] = max(1, min(1000, turns))
    for _ in range(repeats):
        for case in cases:
            if case.out_of_memory:
                continue
            with _memory_may_end(case):
                count = times[id(case)]
                taken, busy = case.run(count)
                case.seconds.append(taken / count / case.steps)
                case.host_seconds.append(busy / count / case.steps)


def report(case: Case, products: Case | None, mesh) -> dict:
    """One case in numbers, of a step; spread is (slowest - fastest) / median."""
    if case.out_of_memory or products is None:
        return {"case": case.name, "out_of_memory": case.out_of_memory}
    median = statistics.median(case.seconds)
    rate = case.flops / median
    best = products.flops / statistics.median(products.seconds)
    chip = chips.of_kind(mesh.devices.flat[0].device_kind)
    return {
        "case": case.name,
        "tokens_per_second": case.tokens / median,
        "ms": 1e3 * median,
        "spread": (max(case.seconds) - min(case.seconds)) / median,
        "flops": case.flops,
        "flops_per_second": rate,
        "mfu": rate / mesh.size / chip.flops if chip else None,
        "of_matrix_products": rate / best,
        "memory": case.memory,
        "bytes_accessed": case.accessed,
        "compile_seconds": case.compile_seconds,
        "host_ms": 1e3 * statistics.median(case.host_seconds),
        "seconds": case.seconds,
    }


def bench(
    config,
    vocab_size: int,
    *,
    mode: str = "train",
    implementations=(),
    sweep: tuple[str, list[str]] = ("", [""]),
    repeats: int = 5,
    seconds: float = 1.0,
    mesh=None,
) -> list[dict]:
    """Times every implementation at every value of the field that `sweep` names."""
    mesh = mesh or sharding.make_mesh(config.mesh, rows=config.train.batch_size)
    _check_implementations(implementations, mesh)
    field, values = sweep
    found = []
    for value in values:
        cases = []  # and with it what the last value held on the device
        for implementation in implementations or (config.model.attention,):
            tried = config.copy_and_resolve_references()
            if field:
                config_lib.set_field(tried, field, value)
            config_lib.set_field(tried, "model.attention", implementation)
            name = f"{implementation} {field}={value}" if field else implementation
            cases.append(Case(name))
            with _memory_may_end(cases[-1]):
                cases[-1] = CASES[mode](name, tried, vocab_size, mesh)
        at_once = max(case.at_once for case in cases)
        products = [matmul_case(tried, at_once, mesh)] if at_once else []
        measure([*cases, *products], repeats=repeats, seconds=seconds)
        for case in cases:
            row = report(case, products[0] if products else None, mesh)
            row |= _circumstances(tried, mode, mesh)
            row["implementation"] = case.name.partition(" ")[0]
            found.append(row | ({"field": field, "value": value} if field else {}))
    return found


def _check_implementations(names, mesh) -> None:
    """UserError for an unknown one, or of another machine, before any is compiled."""
    x_BTHK = jax.ShapeDtypeStruct((1, 128, 1, 64), "bfloat16")
    for name in names:
        attend = functools.partial(relative_attention, implementation=name)
        with jax.set_mesh(mesh):
            jax.eval_shape(attend, x_BTHK, None, x_BTHK, x_BTHK, None)


def _circumstances(config, mode, mesh) -> dict:
    return {
        "config": config.name,
        "mode": mode,
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "dtype": compute_dtype(config.model.dtype).name,
        "jax": jax.__version__,
    }


def bench_preset(name: str, overrides=(), *, rehearse=False, sizes=None, **options):
    """Yields the rows of each line of a preset as they are measured.

    Args:
      rehearse: with tiny sizes, to see that all of it runs; nothing is compared.
      sizes: of the mesh.
    """
    for line in bench_presets.find(name):
        config = config_lib.load(line.config, [*line.overrides, *overrides])
        vocab_size = rehearsal.vocab_size(line.config, config)
        if rehearse:
            config, vocab_size = config_lib.shrink(config), REHEARSED_VOCABULARY
        mesh = sharding.make_mesh(
            sizes or dict(config.mesh), rows=config.train.batch_size, where="--mesh"
        )
        rows = bench(config, vocab_size, mode=line.mode, mesh=mesh, **options)
        for row in rows:
            row["case"] = f"{line.label}, {row['case']}"
            if line.published and not rehearse:
                row["published"] = line.published._asdict()
        yield rows


# The command --------------------------------------------------------------------------


def _main(argv) -> int:
    parser = command.Parser(prog="python -m xlformer.bench", description=__doc__)
    parser.add_argument("--config", help="NAME[:args] or FILE.py[:args]")
    parser.add_argument(
        "--preset", help=f"instead of --config: {', '.join(bench_presets.PRESETS)}"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="the preset with tiny sizes"
    )
    parser.add_argument("--mode", choices=list(CASES), help="default: train")
    parser.add_argument("--implementation", default="", help="of attention: a,b")
    parser.add_argument("--sweep", default="", help="FIELD:A,B of config.model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each repeat")
    parser.add_argument("--mesh", help=sharding.MESH_HELP)
    parser.add_argument(
        "--json", type=command.place, help="a file for the same in numbers"
    )
    parser.add_argument(
        "--plot", type=command.place, help="an .svg for the same against --sweep"
    )
    args, overrides = parser.parse_with_overrides(argv)
    _check(args)
    options = {
        "implementations": [i for i in args.implementation.split(",") if i],
        "repeats": args.repeats,
        "seconds": args.seconds,
    }
    sizes = sharding.parse_mesh(args.mesh) if args.mesh else None
    if args.preset:
        title = args.preset + (" with tiny sizes" if args.rehearse else "")
        options |= {"rehearse": args.rehearse, "sizes": sizes}
        parts = bench_preset(args.preset, overrides, **options)
    else:
        config = config_lib.load(args.config, overrides)
        title = f"{config.name}, {args.mode or 'train'}"
        options |= {"mode": args.mode or "train", "sweep": _sweep(args.sweep)}
        parts = [_bench_config(args.config, config, sizes, options)]
    rows = []
    for part in parts:
        rows += part
        if args.json:  # after each, as the next may take more time than there is
            epath.Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")
        if args.preset:
            print(table(part).splitlines()[1], file=sys.stderr, flush=True)
    about = rows[0]
    print(
        f"{title}, {about['devices']} x {about['device']}, jax {about['jax']}, "
        f"{about['dtype']}"
    )
    print(table(rows))
    if args.plot:
        bench_plot.plot(rows, args.plot)
    return 0


def _check(args) -> None:
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
    if args.plot:
        bench_plot.check(args.plot, _sweep(args.sweep))
    if args.rehearse and not args.preset:
        raise UserError("--rehearse is for --preset; a config has its ':debug'")


def _bench_config(spec, config, sizes, options) -> list[dict]:
    mesh = sharding.make_mesh(
        sizes or dict(config.mesh), rows=config.train.batch_size, where="--mesh"
    )
    vocab_size = rehearsal.vocab_size(spec, config)
    return bench(config, vocab_size, mesh=mesh, **options)


def _sweep(text: str) -> tuple[str, list[str]]:
    if not text:
        return "", [""]
    field, _, values = text.partition(":")
    found = [v for v in values.split(",") if v]
    if not found:
        raise UserError(f"--sweep={text} is not FIELD:VALUE,VALUE")
    return (field if "." in field else f"model.{field}"), found


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
