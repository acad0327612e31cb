"""Scores a text with a trained model: python -m xlformer.evaluate --workdir=DIR.

Prints a card that says what was measured, as a table and as JSON, and writes both into
the work directory. See scoring.py for what --warmup means.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import sys
import time

import jax
from etils import epath

from xlformer import command, runs, scored_text, scoring, sharding
from xlformer.errors import UserError

SOFTWARE = ("xlformer", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


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
    mesh: jax.sharding.Mesh | None = None,
    progress=None,
) -> dict:
    """Returns the card: what was scored, how, and with which result.

    Settings that are None come from config.eval of the run; lengths are in tokens. With
    max_tokens only the beginning is scored, and nothing is said per byte or word.
    mesh shares the rows; by default it is all devices. progress is called with the
    fraction done. Raises UserError.
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
    tokens, documents, data = scored_text.read(run, split, text)
    if 0 < max_tokens < len(tokens):
        tokens, data = tokens[:max_tokens], {**data, "bytes": None, "words": None}
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
    score = evaluator.score(
        run.params, tokens, plan, documents=documents, progress=progress
    )
    if score is None:
        raise UserError("the evaluation was given up")
    count = sum(x.size for x in jax.tree.leaves(run.params))
    card = {
        "run": run.config.name,
        "workdir": str(run.workdir),
        "step": run.step,
        "params": "ema" if run.averaged else "raw",
        "parameters": count,
        "seed": run.config.seed,
        **data,
        "segment_length": plan.segment_length,
        "memory_length": model.memory_length,
        "clamp_length": getattr(model.config, "clamp_length", 0),
        "window": getattr(model.config, "attention_window", None),
        "batch_rows": len(plan.start_B),
        "warmup": plan.warmup,
        **results(score.nats, score.targets, data),
        "seconds": round(score.seconds, 3),
        "tokens_per_s": round(score.targets / score.seconds, 1),
        **_machine(mesh),
    }
    entropy = scoring.unigram_entropy(tokens, run.vocabulary.size)
    if not card["nats_per_token"] <= entropy:  # NaN warns too.
        card["warning"] = (
            f"the loss {card['nats_per_token']:.4f} exceeds the unigram entropy "
            f"{entropy:.4f} of this text: wrong vocabulary order, or an untrained model"
        )
    if model.memory_length is None:
        card["note"] = "unlimited reach: equal only for an equal number of rows"
    return card


def _check(**lengths) -> None:
    """-1 is the model's own; anything else below 0 is a slip."""
    for name, value in lengths.items():
        if value is not None and value < -1:
            raise UserError(f"--{name}={value} must not be negative (-1: the model's)")


def results(nats: float, targets: int, data: dict) -> dict:
    """What is derived from the summed nll.

    bits_per_byte and word_ppl divide by what the text stands for, whatever its tokens;
    None where that is unknown, or too large for a number.
    """
    per_token, (size, words) = nats / targets, (data["bytes"], data["words"])
    return {
        "tokens_scored": targets,
        "nats": nats,
        "nats_per_token": per_token,
        "bpc": per_token / math.log(2),
        "ppl": _exp(per_token),
        "bits_per_byte": nats / math.log(2) / size if size else None,
        "word_ppl": _exp(nats / words) if words else None,
    }


def _exp(x: float) -> float | None:
    return math.exp(x) if x < 700 else None


def _first(value, default):
    return default if value is None else value


def _machine(mesh) -> dict:
    device = mesh.devices.flat[0]
    return {
        "device": f"{device.device_kind} x{mesh.size}",
        "python": platform.python_version(),
        **{name: _version(name) for name in SOFTWARE},
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # Run from its source.
        return "not installed"


def table(cards: list[dict]) -> str:
    """The cards side by side, a line a field."""
    names = [name for name in cards[0] if name != "warning"]
    rows = [[name, *(_show(c.get(name)) for c in cards)] for name in names]
    widths = [max(len(row[i]) for row in rows) for i in range(len(cards) + 1)]
    pad = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in pad)


def _show(value) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


class Progress:
    """A line on standard error every few seconds."""

    def __init__(self, seconds: float = 5.0):
        self._seconds, self._last = seconds, time.perf_counter()

    def __call__(self, fraction: float) -> bool:
        if time.perf_counter() - self._last > self._seconds:
            self._last = time.perf_counter()
            print(f"evaluating {fraction:.0%}", file=sys.stderr, flush=True)
        return False


def _main(argv) -> int:
    parser = command.Parser(prog="python -m xlformer.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--split", default="validation", help="train, validation, test")
    parser.add_argument("--text", help="score this file instead of a split")
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
    mesh = sharding.make_mesh(sharding.parse_mesh(args.mesh), where="--mesh")
    lengths = [None] if args.memory_length is None else _numbers(args.memory_length)
    for length in lengths:  # All of them before the first is scored.
        _check(memory_length=length)
    cards = [
        evaluate(
            args.workdir,
            split=args.split,
            text=args.text,
            checkpoint=args.checkpoint,
            params=args.params,
            segment_length=args.segment_length,
            memory_length=length,
            clamp_length=args.clamp_length,
            same_length=_bool(args.same_length),
            batch_size=args.batch_size,
            warmup=args.warmup,
            mesh=mesh,
            progress=Progress(),
        )
        for length in lengths
    ]
    print(table(cards))
    for warning in {c["warning"] for c in cards if "warning" in c}:
        print(f"warning: {warning}", file=sys.stderr)
    found = [_finite(card) for card in cards]
    found = found if len(found) > 1 else found[0]
    print(json.dumps(found))
    _write(args.workdir, cards[0]["split"], json.dumps(found, indent=2), table(cards))
    return 0


def _finite(card: dict) -> dict:
    """JSON has no NaN and no infinity: null."""
    return {
        name: None if isinstance(x, float) and not math.isfinite(x) else x
        for name, x in card.items()
    }


def _write(workdir, split: str, as_json: str, as_table: str) -> None:
    for suffix, content in (("json", as_json), ("txt", as_table)):
        path = epath.Path(workdir) / f"evaluation-{split}.{suffix}"
        try:
            path.write_text(content + "\n", encoding="utf-8")
        except OSError as error:  # A read-only directory is no reason to lose the card.
            print(f"warning: {path} was not written: {error}", file=sys.stderr)


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
