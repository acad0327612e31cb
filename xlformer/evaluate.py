"""Scores a text with a trained model: python -m xlformer.evaluate --workdir=DIR.

Prints a card that says what was measured, as a table and as JSON, and writes both into
the work directory. See scoring.py for what --warmup means.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import time

import jax

from xlformer import (
    __version__,
    cards,
    command,
    compiled,
    models,
    runs,
    scored_text,
    scoring,
    sharding,
    units,
)
from xlformer.data.local import is_read_once
from xlformer.errors import UserError
from xlformer.progress import Progress

SOFTWARE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def evaluate(
    workdir,
    *,
    split: str = "validation",
    text: str | None = None,
    checkpoint: str = "best",
    params: str | None = None,
    segment_length: int | None = None,
    memory_length: int | None = None,
    clamp_length: int | None = None,
    same_length: bool | None = None,
    batch_size: int | None = None,
    warmup: str = "auto",
    max_tokens: int = 0,
    data_path: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress=None,
) -> dict:
    """Returns the card: what was scored, how, and with which result.

    Settings that are None come from config.eval of the run; lengths are in tokens. With
    max_tokens only the beginning is scored. data_path: where the run's text lies now,
    if it is neither prepared nor at config.data.path. mesh shares the rows; by default
    it is all devices. progress is called with the fraction done. Raises UserError.
    """
    _check(memory_length=memory_length, clamp_length=clamp_length)
    mesh = mesh or sharding.make_mesh({"data": -1})
    run = runs.load(workdir, checkpoint=checkpoint, params=params, mesh=mesh)
    defaults = run.config.eval
    visible = {
        "memory_length": _first(memory_length, defaults.memory_length),
        "clamp_length": _first(clamp_length, defaults.clamp_length),
        "same_length": _first(same_length, defaults.same_length or None),
    }
    model = runs.for_reading(run.model, visible)
    everything, documents, data = scored_text.read(run, split, text, data_path)
    tokens = everything[: max_tokens or None]
    plan = scoring.plan_for(
        model,
        len(tokens),
        batch_size=_first(batch_size, defaults.batch_size),
        segment_length=_first(segment_length, defaults.segment_length),
        warmup=warmup,
    )
    evaluator = scoring.Evaluator(
        model,
        batch_size=len(plan.start_B),
        segment_length=plan.segment_length,
        steps=plan.steps,
        mesh=mesh,
    )
    evaluator.compile(run.params)  # whose time is not the model's
    score = evaluator.score(
        run.params, tokens, plan, documents=documents, progress=progress
    )
    if score is None:
        raise UserError("the evaluation was given up")
    count = units.scored(
        run.vocabulary,
        everything,
        [(a + 1, b + 1) for a, b in zip(plan.first_B, plan.last_B, strict=True)],
        units.Count(data["bytes"], data["words"]),
        lines="<eos>" in data["words_are"],
        documents=documents,
    )
    card = {
        "run": run.config.name,
        "workdir": str(run.workdir),
        "step": run.step,
        "params": "ema" if run.averaged else "raw",
        "parameters": sum(x.size for x in jax.tree.leaves(run.params)),
        "seed": run.config.seed,
        **data,
        "segment_length": plan.segment_length,
        "memory_length": model.memory_length,
        "extended_length": model.extended_length,
        "clamp_length": getattr(model.config, "clamp_length", 0),
        "window": getattr(model.config, "attention_window", None),
        "batch_rows": len(plan.start_B),
        "warmup": plan.warmup,
        "documents": documents is not None,
        "dtype": _dtype(model, run.params),
        **cards.results(score.nats, score.targets, count.bytes, count.words),
        "seconds": round(score.seconds, 3),
        "tokens_per_s": round(score.targets / score.seconds, 1),
        **_machine(mesh),
    }
    entropy = scoring.unigram_entropy(tokens, run.vocabulary.size)
    if wrong := cards.warning(card, entropy):
        card["warning"] = wrong
    if model.memory_length is None:
        card["note"] = "unlimited reach: equal only for an equal number of rows"
    return card


def _check(**lengths) -> None:
    """-1 is the model's own; anything else below 0 is a slip."""
    for name, value in lengths.items():
        if value is not None and value < -1:
            raise UserError(f"--{name}={value} must not be negative (-1: the model's)")


def _first(value, default):
    return default if value is None else value


def _dtype(model, params) -> str | None:
    """Computed in; on an accelerator `auto` is another than on a CPU."""
    name = getattr(model.config, "dtype", None)
    return name and models.base.compute_dtype(name, params).name


def _machine(mesh) -> dict:
    device = mesh.devices.flat[0]
    return {
        "device": f"{device.device_kind} x{mesh.size}",
        "python": platform.python_version(),
        "xlformer": __version__,  # What runs; an old checkout may be what is installed.
        **{name: _version(name) for name in SOFTWARE},
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # Run from its source.
        return "not installed"


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
    lengths = [None] if args.memory_length is None else _numbers(args.memory_length)
    for length in lengths:  # All of them before the first is scored.
        _check(memory_length=length)
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
            same_length=_bool(args.same_length),
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


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--memory_length={text}: numbers, separated by commas"
        ) from None


def _bool(text: str | None) -> bool | None:
    if text is None:
        return None
    if text.lower() not in ("true", "false"):
        raise UserError(f"--same_length={text} is neither true nor false")
    return text.lower() == "true"


def main(argv=None) -> int:
    """The command; returns its exit code."""
    return command.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
