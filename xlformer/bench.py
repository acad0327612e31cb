"""Times a model on the devices here: python -m xlformer.bench --config=NAME.

Random tokens with the frequencies of words (Zipf's law), so no data is needed. All that
is compared is compiled first and then timed in turns, so a machine that becomes slower
does so for all; the table has the median and the spread. Two steps are in flight at
most. FLOPs are useful ones (flops.py): MFU is their share of the datasheet, and beside
it of a step of matrix products only, timed in the same turns.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from xlformer import chips, command, flops, models, rehearsal, runs, scoring, sharding
from xlformer import config as config_lib
from xlformer import generate as generation
from xlformer.errors import UserError
from xlformer.models.base import compute_dtype
from xlformer.training.metrics import binary_size

MODES = ("train", "eval", "generate")
SEGMENTS = 4  # of one timed evaluation
TOKENS = 64  # of one timed generation
PROMPT = 17


@dataclasses.dataclass
class Case:
    """One thing to time.

    Attributes:
      run: does it so many times; returns the seconds that it took, and for how many of
        them the host was busy, None if not known.
      tokens, flops: of one.
      at_once: tokens that go through a layer together.
      memory: bytes that the compiled program takes on a device, None if not known.
      seconds: measured, of one.
    """

    name: str
    run: Callable[[int], tuple[float, float | None]]
    tokens: int
    at_once: int
    flops: float
    compile_seconds: float = 0.0
    memory: int | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    host_seconds: list[float] = dataclasses.field(default_factory=list)


def train_case(name, config, vocab_size, mesh) -> Case:
    """The training step as `xlformer.train` compiles it."""
    train = config.train
    sharding.check(config, mesh)
    model = models.build(config.model, vocab_size=vocab_size)
    step = rehearsal.step(config, model, mesh)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = step.function.lower(step.abstract, step.batch).compile()
    compile_seconds = time.perf_counter() - start
    state = step.create(jax.random.key(config.seed))
    batch, shares = dict(step.batch), None
    for key in ("inputs_BT", "targets_BT"):
        batch[key] = _tokens(vocab_size, batch[key].shape)
    if model.config.cutoffs:
        edges = (0, *model.config.cutoffs, vocab_size)
        counts, _ = np.histogram(batch["targets_BT"], bins=edges)
        shares = (counts / counts.sum()).tolist()

    def run(times: int):
        nonlocal state
        busy, pending, start = 0.0, None, time.perf_counter()
        for _ in range(times):
            began = time.perf_counter()
            state, found = compiled(state, batch)
            busy += time.perf_counter() - began
            if pending is not None:
                pending.block_until_ready()  # two in flight, no more
            pending = found["train/loss_nats"]
        pending.block_until_ready()
        return time.perf_counter() - start, busy

    stats = compiled.memory_analysis()
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    counted = flops.segment(
        model.config,
        batch_size=train.batch_size,
        segment_length=train.segment_length,
        shares=shares,
    )
    return Case(
        name,
        run,
        tokens=train.batch_size * train.segment_length,
        at_once=train.batch_size * train.segment_length // train.micro_batches,
        flops=counted.training,
        compile_seconds=compile_seconds,
        memory=stats.argument_size_in_bytes + stats.temp_size_in_bytes + max(0, new),
    )


def eval_case(name, config, vocab_size, mesh) -> Case:
    """Scoring with the settings of config.eval and the cached form of the memory."""
    settings = config.eval
    visible = {
        "memory_length": settings.memory_length,
        "clamp_length": settings.clamp_length,
        "same_length": settings.same_length or None,
    }
    model = runs.for_reading(models.build(config.model, vocab_size=vocab_size), visible)
    params = _parameters(model, mesh, config.seed)
    rows, T = settings.batch_size, settings.segment_length
    evaluator = scoring.Evaluator(
        model, batch_size=rows, segment_length=T, steps=SEGMENTS, mesh=mesh
    )
    start = time.perf_counter()
    evaluator.compile(params)
    compile_seconds = time.perf_counter() - start
    tokens = _tokens(vocab_size, (rows * (SEGMENTS * T + 1),))
    plan_ = scoring.plan(
        len(tokens),
        batch_size=rows,
        segment_length=T,
        memory_length=scoring.reach(model),
        n_layer=model.config.n_layer,
        warmup="none",
    )

    def run(times: int):
        start = time.perf_counter()
        for _ in range(times):
            evaluator.score(params, tokens, plan_)
        return time.perf_counter() - start, None

    counted = flops.segment(
        model.config, batch_size=rows, segment_length=T, cached=True
    )
    total = plan_.steps * counted.forward
    return Case(name, run, plan_.targets, rows * T, total, compile_seconds)


def generate_case(name, config, vocab_size, mesh) -> Case:
    """config.eval.batch_size rows after a short prompt.

    The first block is not timed: before it the prompt is read and the cache filled.
    """
    model = models.build(config.model, vocab_size=vocab_size)
    model = generation.for_generation(model)
    params = _parameters(model, mesh, config.seed)
    rows = config.eval.batch_size
    prompts = list(_tokens(vocab_size, (rows, PROMPT)))

    def run(times: int):
        total = 0.0
        for _ in range(times):
            ends = []
            generation.generate(
                *(model, params, prompts),
                num_tokens=TOKENS,
                mesh=mesh,
                on_tokens=lambda _, ends=ends: ends.append(time.perf_counter()),
            )
            total += ends[-1] - ends[0]
        return total, None

    counted = flops.segment(
        model.config, batch_size=rows, segment_length=1, cached=True
    )
    start = time.perf_counter()
    run(1)
    compile_seconds = time.perf_counter() - start
    timed = TOKENS - generation.BLOCK
    total = timed * counted.forward
    return Case(name, run, rows * timed, rows, total, compile_seconds)


def matmul_case(config, at_once: int, mesh) -> Case:
    """Products of the shapes of the feed-forward layers, on each device its rows."""
    fields = config.model
    dtype = compute_dtype(fields.dtype)
    rows = max(1, at_once // mesh.size)
    x_ND = jnp.ones((rows, fields.d_model), dtype)
    up_DF = jnp.full((fields.d_model, fields.d_inner), 1e-3, dtype)
    each = 4.0 * rows * fields.d_model * fields.d_inner
    rounds = int(min(64, max(2, 2e10 // each)))

    @jax.jit
    def products(x_ND, up_DF):
        def one(x_ND, _):
            return (x_ND @ up_DF) @ up_DF.T, None

        return jax.lax.scan(one, x_ND, length=rounds)[0]

    def run(times: int):
        start = time.perf_counter()
        for _ in range(times):
            products(x_ND, up_DF).block_until_ready()
        return time.perf_counter() - start, None

    run(1)
    # One device is timed; all do the same at once in a step.
    return Case("matrix products", run, rows, rows, each * rounds * mesh.size)


def _tokens(vocab_size: int, shape) -> np.ndarray:
    rng = np.random.default_rng(0)
    ids = rng.choice(vocab_size, size=shape, p=flops.frequencies(vocab_size))
    return ids.astype(np.int32)


def _parameters(model, mesh, seed: int):
    key = jax.random.key(seed)
    abstract = jax.eval_shape(model.init, key)
    placed = sharding.parameters(mesh, abstract, model.param_axes(abstract))
    return jax.jit(model.init, out_shardings=placed)(key)


# Timing -------------------------------------------------------------------------------


def measure(cases: list[Case], *, repeats: int, seconds: float) -> None:
    """Times all in turns: `repeats` turns of about `seconds` for each."""
    times = []
    for case in cases:
        case.run(1)  # warm
        once, _ = case.run(1)
        times.append(max(1, min(1000, round(seconds / max(once, 1e-9)))))
    for _ in range(repeats):
        for case, count in zip(cases, times, strict=True):
            taken, busy = case.run(count)
            case.seconds.append(taken / count)
            if busy is not None:
                case.host_seconds.append(busy / count)


def report(case: Case, products: Case, mesh) -> dict:
    """One case in numbers; the spread is (slowest - fastest) / median."""
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
        "compile_seconds": case.compile_seconds,
        "host_ms": 1e3 * statistics.median(case.host_seconds)
        if case.host_seconds
        else None,
        "seconds": case.seconds,
    }


CASES = {"train": train_case, "eval": eval_case, "generate": generate_case}


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
    field, values = sweep
    found = []
    for value in values:
        cases = []
        for implementation in implementations or (config.model.attention,):
            tried = config.copy_and_resolve_references()
            if field:
                config_lib.set_field(tried, field, value)
            config_lib.set_field(tried, "model.attention", implementation)
            name = f"{implementation} {field}={value}" if field else implementation
            cases.append(CASES[mode](name, tried, vocab_size, mesh))
        products = matmul_case(tried, cases[0].at_once, mesh)
        measure([*cases, products], repeats=repeats, seconds=seconds)
        found += [report(case, products, mesh) for case in cases]
    return found


# The command --------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    width = max(len(row["case"]) for row in rows)
    head = ("tokens/s", "ms", "spread", "GFLOP", "MFU", "of matmul", "memory")
    head = (*head, "compile s", "host ms")
    lines = [f"{'':{width}}" + "".join(f"{h:>12}" for h in head)]
    for row in rows:
        cells = [
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ms']:.2f}",
            f"{row['spread']:.1%}",
            f"{row['flops'] / 1e9:,.3g}",
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['of_matrix_products']:.1%}",
            "-" if row["memory"] is None else binary_size(row["memory"]),
            f"{row['compile_seconds']:.1f}",
            "-" if row["host_ms"] is None else f"{row['host_ms']:.2f}",
        ]
        lines.append(f"{row['case']:{width}}" + "".join(f"{c:>12}" for c in cells))
    return "\n".join(lines)


def _main(argv) -> int:
    parser = command.Parser(prog="python -m xlformer.bench", description=__doc__)
    parser.add_argument("--config", required=True, help="NAME[:args] or FILE.py[:args]")
    parser.add_argument("--mode", default="train", choices=MODES)
    parser.add_argument("--implementation", default="", help="of attention: a,b")
    parser.add_argument("--sweep", default="", help="FIELD:A,B of config.model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each repeat")
    parser.add_argument("--mesh", help=sharding.MESH_HELP)
    parser.add_argument("--json", help="a file for the same in numbers")
    args, overrides = parser.parse_with_overrides(argv)
    if args.repeats < 1 or not args.seconds > 0:
        raise UserError(
            f"--repeats={args.repeats} and --seconds={args.seconds} must be positive"
        )
    config = config_lib.load(args.config, overrides)
    sizes = sharding.parse_mesh(args.mesh) if args.mesh else dict(config.mesh)
    mesh = sharding.make_mesh(sizes, rows=config.train.batch_size, where="--mesh")
    device = mesh.devices.flat[0]
    print(
        f"{config.name}, {args.mode}, {mesh.size} x {device.device_kind}, "
        f"jax {jax.__version__}, {compute_dtype(config.model.dtype).name}"
    )
    rows = bench(
        config,
        rehearsal.vocab_size(args.config, config),
        mode=args.mode,
        implementations=[i for i in args.implementation.split(",") if i],
        sweep=_sweep(args.sweep),
        repeats=args.repeats,
        seconds=args.seconds,
        mesh=mesh,
    )
    print(table(rows))
    if args.json:
        epath.Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")
    return 0


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
