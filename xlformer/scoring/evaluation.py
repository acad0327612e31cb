"""Scores a run's text: the card says what was measured, how, and with which result."""

from __future__ import annotations

import importlib.metadata
import platform
import time

import jax

from xlformer import __version__, models, runs, scoring, sharding
from xlformer.errors import Argument, UserError
from xlformer.scoring import cards, texts, units

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
    check(memory_length=memory_length, clamp_length=clamp_length)
    mesh = mesh or sharding.make_mesh({"data": -1})
    run = runs.load(workdir, checkpoint=checkpoint, params=params, mesh=mesh)
    defaults = run.config.eval
    visible = {
        "memory_length": _first(memory_length, defaults.memory_length),
        "clamp_length": _first(clamp_length, defaults.clamp_length),
        "same_length": _first(same_length, defaults.same_length or None),
    }
    model = runs.for_reading(run.model, visible)
    everything, documents, data = texts.read(run, split, text, data_path)
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


def check(**lengths) -> None:
    """-1 is the model's own; anything else below 0 is a slip."""
    for name, value in lengths.items():
        if value is not None and value < -1:
            line = " must not be negative (-1: the model's)"
            raise UserError(Argument(name, value), line)


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
