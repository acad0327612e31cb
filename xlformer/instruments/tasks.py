"""Copying, reversing, adding and agreeing, at lengths that were never trained.

    python -m xlformer.compare tasks --out=DIR [--task=copy ...] [--steps=N]

Each model is trained on a fixed set of sequences of small difficulty, in epochs, and
asked for new ones of that difficulty and of up to ten times of it; sets of several
sizes show how much data a model needs. Accuracies are of characters, and of sequences
whose characters are all right, each given those before it. For models that ponder
there are their mean steps by difficulty. A finished model's numbers lie in --out/runs,
where another call finds them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Mapping

import jax

from xlformer import config as config_lib
from xlformer import models
from xlformer.errors import Argument, UserError, about
from xlformer.instruments import fitting, learnt, sequences
from xlformer.instruments.instrument import Request, Result
from xlformer.instruments.lessons import Lesson, Settings
from xlformer.models.parameters import abstract_params

RUNS = False
SEEDS = {"small": 2, "tiny": 2}

SMALL_TRANSFORMER = {"n_layer": 2, "n_head": 4, "init_std": 0.06}
UNIVERSAL = {"d_model": 60, "n_head": 4, "d_inner": 180}
# About 40,000 parameters each, and a rate at which each learns copying: of four that
# were tried for the LSTM, of two for Transformer-XL; for the others the first one did.
MEMBERS: Mapping[str, tuple[str, dict, float]] = {
    "universal": ("universal", {**UNIVERSAL, "n_step": 4}, 3e-3),
    "universal, ACT": (
        "universal",
        {**UNIVERSAL, "n_step": 2, "act": "accumulate", "act_max_steps": 4},
        3e-3,
    ),
    "vanilla": (
        "vanilla",
        {
            **SMALL_TRANSFORMER,
            "d_model": 36,
            "d_inner": 108,
            "layer_losses": False,
            "second_target_weight": 0.0,
        },
        3e-3,
    ),
    # Its tables begin as large as others' do: with 0.1, the usual range, it had learnt
    # nothing of agreement in 1,000 steps, and with 0.6 all of it in 200.
    "lstm": (
        "lstm",
        {"n_layer": 2, "d_model": 40, "d_hidden": 56, "init_range": 0.6},
        1e-2,
    ),
    # Before its layers it has norms: after them it needs twice the steps for copying.
    "transformer_xl": (
        "transformer_xl",
        {
            **SMALL_TRANSFORMER,
            "d_model": 40,
            "d_inner": 128,
            "pre_norm": True,
            "final_norm": True,
        },
        5e-3,
    ),
}


SIZES = {
    "small": Settings(),
    "tiny": Settings(
        sets=(30, 60),
        hardest=(("digits", 2), ("attractors", 1)),
        asked=(("digits", (2, 4)), ("attractors", (0, 2))),
        steps=3,
        batch_size=4,
        questions=5,
    ),
}
# What the test trains: with pondering and without, of sizes that compile quickly.
TINY = ("universal, ACT", "lstm")
LITTLE = {
    "n_layer": 1,
    "d_model": 16,
    "d_hidden": 16,
    "d_inner": 16,
    "act_max_steps": 2,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", action="append", help="may be repeated; default: all")
    parser.add_argument("--steps", type=int, help="of each training")


def measure(
    request: Request,
    own: Mapping[str, models.Model] | None = None,
    rate: float = 3e-3,
) -> Result:
    """Trains and asks; see the module.

    Args:
      own: models of one's own by name, in place of those that are here; they know
        sequences.SYMBOLS ids.
      rate: at which they learn.
    """
    settings, names = _asked(request.with_flags(add_flags))
    if own is None:
        taught = _members(settings, request.size)
    else:
        _check(own, settings)
        taught = {name: (model, rate) for name, model in own.items()}
    found = []
    for name in names:
        for member, (model, rate) in taught.items():
            for size in settings.sets:
                for seed in range(request.seeds):
                    one = Lesson(name, member, model, rate, size, seed, settings)
                    found.append(one.found(request.runs))
    return learnt.result(found)


def _asked(request: Request) -> tuple[Settings, list[str]]:
    settings = SIZES[request.size]
    names, steps = request.args.task, request.args.steps
    if steps is not None:
        if steps < 1:
            raise UserError(Argument("steps", steps), " must be at least 1")
        settings = dataclasses.replace(settings, steps=steps)
    if names is None:
        names = ["copy"] if request.size == "tiny" else list(sequences.TASKS)
    for i, name in enumerate(names):
        sequences.find(name)
        if name in names[:i]:
            raise UserError(Argument("task", name), " is given twice")
    return settings, names


def _members(settings: Settings, size: str) -> dict[str, tuple[models.Model, float]]:
    names = TINY if size == "tiny" else MEMBERS
    found = {}
    for member in names:
        kind, fields, rate = MEMBERS[member]
        if size == "tiny":
            fields = {**fields, **{k: n for k, n in LITTLE.items() if k in fields}}
        found[member] = (build(kind, fields, settings.longest()), rate)
    return found


def build(kind: str, fields: Mapping, room: int) -> models.Model:
    """A model without dropout, whose state begins anew in each row."""
    config = config_lib.default_config(kind, **fields).model
    # Sequences are read in one segment: nothing has to be carried.
    also = {"memory_length": 0, "context_length": room}
    also |= {field: 0.0 for field in config if "drop" in field}
    config.update({k: v for k, v in also.items() if k in config})
    config.vocab_size = sequences.SYMBOLS
    return models.build(config)


def _check(own: Mapping[str, models.Model], settings: Settings) -> None:
    """Raises UserError for a model that cannot be asked, before one is trained."""
    batch, _ = sequences.rows([([0], [0])], settings.longest())
    for name, model in own.items():
        if model.vocab_size < sequences.SYMBOLS:
            raise UserError(
                f"{name} knows {model.vocab_size} ids, the tasks have "
                f"{sequences.SYMBOLS} symbols"
            )
        if not model.causal:
            raise UserError(f"{name} sees what comes after a token: its answer")
        with about(name):
            params = abstract_params(model)
            jax.eval_shape(functools.partial(fitting.right, model), params, batch)
