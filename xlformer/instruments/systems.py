"""All systems under one budget: equal parameters, steps and batches.

    python -m xlformer.compare systems --out=DIR [--manual_dir=DIR] [--steps=N]

Bytes of Python's own library, and words of Penn Treebank where it is prepared already
or --manual_dir has its files. Each system gets the width with which its parameters come
nearest to the budget, and is trained at three learning rates, of which the best in
validation counts. Each run has a process of its own, whose peak memory is known; what
is finished is found by another call, what was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from xlformer import compiled, sharding, storage
from xlformer import config as config_lib
from xlformer.data import preparing
from xlformer.errors import Argument, UserError, did_you_mean
from xlformer.instruments import apart, library_text, records
from xlformer.instruments import systems_tables as tables
from xlformer.instruments.instrument import Request, Result
from xlformer.instruments.widths import Shape, fitting
from xlformer.machines import cores
from xlformer.runs import locks, log
from xlformer.scoring import evaluation
from xlformer.training.run import train

RUNS = False
SEEDS: Mapping[str, int] = {}

# By system, the config that its options come from.
BASES = {
    "transformer_xl": "quickstart",
    "vanilla": "vanilla_small",
    "lstm": "lstm_small",
    "sha_rnn": "sha_rnn_small",
    "performer": "performer_small",
    "universal": "universal_small",
}
SEGMENT = 64  # tokens, those of all these configs
NO_WORDS = (
    "no words: Penn Treebank is not prepared on this machine; --manual_dir=DIR names "
    "the folder of its ptb.train.txt, ptb.valid.txt and ptb.test.txt"
)
# Seconds; no run of the sizes below takes a tenth of it on two cores.
LIMIT = 3600.0


class Budget(NamedTuple):
    """What every system gets of a corpus."""

    corpus: str
    data: Mapping[str, Any]
    parameters: int
    widest: int
    steps: int
    batch_size: int
    validation: int  # tokens
    test: int
    model: Mapping[str, Any] = {}  # of all systems, beside their widths


class Size(NamedTuple):
    systems: Sequence[str]
    rates: Sequence[float]
    budgets: Sequence[Budget]


BYTES = Budget(
    corpus="stdlib",
    data={"corpus": "stdlib"},
    parameters=680_000,
    widest=512,
    steps=600,
    batch_size=16,
    validation=65_536,
    test=131_072,
)
WORDS = Budget(
    corpus="penn",
    data={"corpus": "penn"},
    parameters=2_000_000,
    widest=512,
    steps=600,
    batch_size=8,
    validation=32_768,
    test=131_072,  # all of it
)
TINY = Budget(
    corpus="text",
    data={"corpus": "text", "unit": "bytes"},
    parameters=15_500,
    widest=32,
    steps=2,
    batch_size=1,
    validation=128,
    test=128,
    model={"n_layer": 1},
)
SIZES = {
    "small": Size(tuple(BASES), (1e-3, 2e-3, 4e-3), (BYTES, WORDS)),
    "tiny": Size(("transformer_xl", "lstm"), (2e-3,), (TINY,)),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--manual_dir",
        help="where ptb.train.txt, ptb.valid.txt and ptb.test.txt of Penn Treebank "
        "lie; not needed where it was prepared before",
    )
    parser.add_argument("--steps", type=int, help="of each run, not the size's")
    parser.add_argument("--systems", help=f"some of {','.join(BASES)}; default: all")


def measure(request: Request) -> Result:
    """Trains what is not trained yet, and compares."""
    request = request.with_flags(add_flags)
    size, notes = _size(request)
    # All texts and widths before the first run: what cannot be is said at once.
    plans = [_plan(budget, size.systems, request) for budget in size.budgets]
    found = []
    for budget, vocabulary, shapes in plans:
        rows = [
            _trial(system, shape, rate, budget, request.runs)
            for system, shape in shapes.items()
            for rate in size.rates
        ]
        notes += [f"{row.name}: {row.why}" for row in rows if row.why]
        found.append(tables.Found(budget, vocabulary.unit, rows))
    return Result(
        tables=[table for one in found for table in tables.of(one)],
        facts={
            "segment_length": SEGMENT,
            "learning_rates": list(size.rates),
            "corpora": [one.facts() for one in found],
        },
        draw=functools.partial(tables.draw, found),
        notes=notes,
    )


def _size(request: Request) -> tuple[Size, list[str]]:
    """What is trained, and what must be said of it."""
    args, size, notes = request.args, SIZES[request.size], []
    if args.systems is not None:
        asked = args.systems.split(",")
        for i, name in enumerate(asked):
            if name not in BASES:
                line = f": no system {name!r}{did_you_mean(name, BASES)}"
                raise UserError(Argument("systems", args.systems), line)
            if name in asked[:i]:
                line = f" has {name} twice, which would be compared with itself"
                raise UserError(Argument("systems", args.systems), line)
        size = size._replace(systems=asked)
    if args.steps is not None:
        if args.steps < 1:
            raise UserError(Argument("steps", args.steps), " must be at least 1")
        budgets = [budget._replace(steps=args.steps) for budget in size.budgets]
        size = size._replace(budgets=budgets)
    if WORDS.corpus in [budget.corpus for budget in size.budgets]:
        if args.manual_dir is None:
            if not preparing.is_prepared(_base(WORDS).data):
                budgets = [b for b in size.budgets if b.corpus != WORDS.corpus]
                size = size._replace(budgets=budgets)
                notes.append(NO_WORDS)
        elif not storage.path(args.manual_dir).is_dir():
            line = ": there is no such folder"
            raise UserError(Argument("manual_dir", args.manual_dir), line)
    elif args.manual_dir is not None:
        line = f": {request.size} reads no Penn Treebank"
        raise UserError(Argument("manual_dir", args.manual_dir), line)
    return size, notes


def _plan(budget: Budget, systems: Sequence[str], request: Request) -> tuple:
    """(the budget with its text, the vocabulary, the config of each system)."""
    budget = _with_text(budget, request)
    # By this process: those that train are no parents of others.
    vocabulary = preparing.prepare(_base(budget).data).vocabulary
    shapes = {}
    for system in systems:
        make = functools.partial(_config, system, budget)
        shapes[system] = fitting(
            make, vocabulary.size, budget.parameters, widest=budget.widest
        )
    return budget, vocabulary, shapes


def _with_text(budget: Budget, request: Request) -> Budget:
    data = dict(budget.data)
    if budget.corpus == WORDS.corpus:
        data["manual_dir"] = request.args.manual_dir or ""
    if budget.corpus == TINY.corpus:
        path = request.put("library.txt", library_text.head(20_000))
        data |= {"path": str(path), "directory": str(path.parent / "prepared")}
    return budget._replace(data=data)


def _base(budget: Budget, system: str = "transformer_xl") -> ConfigDict:
    config = config_lib.load(BASES[system])
    data = config_lib.default_config().data
    data.update(budget.data)
    config.data = data
    return config


def _config(system: str, budget: Budget, width: int) -> ConfigDict:
    """Of a system of this width, without a learning rate."""
    config = _base(budget, system)
    model = config.model
    model.d_model = width
    # Of each model that has it; all in the proportions of these configs.
    shapes = {"n_head": 4, "d_head": 0, "d_inner": 4 * width, "d_hidden": 2 * width}
    model.update({k: v for k, v in shapes.items() if k in model})
    # Most see less than one epoch: there is nothing to overfit.
    model.update({k: 0.0 for k in model if k.endswith("dropout")}, **budget.model)
    if budget.corpus == WORDS.corpus and "layer_losses" in model:
        # Their classifiers of 10,000 words would be five sixths of the parameters.
        model.update(layer_losses=False, second_target_weight=0.0)
    steps = budget.steps
    config.train.update(steps=steps, batch_size=budget.batch_size)
    config.train.update(segment_length=SEGMENT, eval_every=0)
    config.train.update(log_every=max(1, steps // 20), save_every=max(1, steps // 5))
    config.optimizer.warmup_steps = steps // 20
    config.eval.update(segment_length=SEGMENT, batch_size=budget.batch_size)
    config.eval.max_tokens = budget.validation
    return config


def _trial(system: str, shape: Shape, rate: float, budget: Budget, folder: epath.Path):
    """A run that is done, now or by an earlier call."""
    config = ConfigDict(shape.config.to_dict())
    config.optimizer.learning_rate = rate
    config.name = f"{budget.corpus}-{system}-{rate:g}-{budget.steps}"
    workdir = folder / config.name
    record = folder / f"{config.name}.json"
    asked = json.loads(config_lib.to_json(config))
    # Of another release, or another place, it may be of another run.
    found = records.read(record, config=asked)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        # What another call trains now is refused, and is no run that failed.
        with locks.WorkdirLock(workdir):
            pass
        arguments = {"config": asked, "workdir": str(workdir)}
        arguments["test"] = budget.test
        outcome = apart.run(run, arguments, seconds=LIMIT)
        found = {
            "config": asked,
            "value": outcome.value,
            "why": outcome.why,
            "peak_bytes": outcome.peak_bytes,
            "seconds": outcome.seconds,
        }
        # Of an hour's work, whose processes write into files.
        done = outcome.why or f"step {outcome.value['step']}"
        line = f"{config.name}: {done} after {outcome.seconds:.0f} s"
        print(line, file=sys.stderr, flush=True)
        # What ran out of time goes on; what failed may do better another day.
        if not outcome.why:
            storage.put(record, json.dumps(found, indent=1) + "\n")
    del found["config"]
    return tables.Row(config.name, system, shape.width, shape.parameters, rate, **found)


def run(config: dict, workdir: str, test: int) -> dict:
    """In a process of its own: trains as the command does, and scores test."""
    found = config_lib.from_dict(config)
    cores.prepare_training(found, asked=None, sizes=found.mesh)
    compiled.keep()
    result = train(found, workdir)
    if result["interrupted"]:
        raise KeyboardInterrupt
    # No more devices than there are rows.
    mesh = sharding.make_mesh({"data": -1}, rows=found.eval.batch_size)
    card = evaluation.evaluate(
        workdir, mesh=mesh, split="test", checkpoint="latest", max_tokens=test
    )
    rates = [one["perf/tokens_per_s"] for one in log.read(workdir, kind="train")]
    return {
        "devices": jax.device_count(),
        "validation_nats": result["eval/nats_per_token"],
        "tokens_per_s": statistics.median(rates),
        "test": card,
        "step": result["step"],
    }
