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
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from etils import epath

from xlformer import config as config_lib
from xlformer import models, storage
from xlformer.errors import UserError
from xlformer.fields import FREE, Rule
from xlformer.instruments import fitting, learnt, sequences
from xlformer.instruments.instrument import Request, Result
from xlformer.instruments.sequences import Task

RUNS = "none"
SEEDS = {"small": 2, "tiny": 2}

SMALL_TRANSFORMER = {"n_layer": 2, "n_head": 4, "init_std": 0.06}
UNIVERSAL = {"d_model": 60, "n_head": 4, "d_inner": 180}
# About 40,000 parameters each, and the rate at which each learns best of those that
# were tried on copying (1e-3, 3e-3, 5e-3, 1e-2).
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
    "lstm": ("lstm", {"n_layer": 2, "d_model": 40, "d_hidden": 56}, 1e-2),
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


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is taught and asked.

    Attributes:
      sets: sequences in the sets.
      hardest: the largest difficulty in training, by its unit; all up to it are as
        frequent.
      asked: the difficulties of the test, by their unit.
      steps: of the training, the same for all sets.
      batch_size: rows of a step.
      every: one step in so many has rows with room for the hardest test, in which a
        sequence stands anywhere: a position that was never trained says nothing. They
        have as many tokens as the other steps.
      questions: of each difficulty.
    """

    sets: tuple[int, ...] = (1_000, 10_000, 100_000)
    hardest: tuple = (("digits", 5), ("attractors", 2))
    asked: tuple = (
        ("digits", (5, 10, 20, 50)),
        ("attractors", (0, 1, 2, 3, 4, 5, 10, 20)),
    )
    steps: int = 800
    batch_size: int = 64
    every: int = 4
    questions: int = 128

    def most(self, task: Task) -> int:
        """The largest difficulty in training."""
        return dict(self.hardest)[task.unit]

    def levels(self, task: Task) -> tuple[int, ...]:
        """The difficulties of the test."""
        return dict(self.asked)[task.unit]

    def room(self, task: Task) -> int:
        """Tokens of a row that holds the longest sequence of the training."""
        return task.longest(self.most(task)) - 1

    def longest(self) -> int:
        """Tokens of a row that holds the longest sequence of any test."""
        tasks = sequences.TASKS.values()
        return max(task.longest(max(self.levels(task))) for task in tasks) - 1


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
    settings, names = _asked(request)
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
                    one = _Run(name, member, model, rate, size, seed, settings)
                    found.append(one.found(request.runs))
    return learnt.result(found)


def _asked(request: Request) -> tuple[Settings, list[str]]:
    settings = SIZES[request.size]
    # Who calls from Python need not give flags.
    names = getattr(request.args, "task", None)
    steps = getattr(request.args, "steps", None)
    if steps is not None:
        Rule(FREE, least=1).check("--steps", steps)
        settings = dataclasses.replace(settings, steps=steps)
    if names is None:
        names = ["copy"] if request.size == "tiny" else list(sequences.TASKS)
    for name in names:
        sequences.find(name)
    if len(set(names)) < len(names):
        raise UserError(f"--task={names[-1]} is given twice")
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
        try:
            params = jax.eval_shape(model.init, jax.random.key(0))
            jax.eval_shape(functools.partial(fitting.right, model), params, batch)
        except UserError as error:
            raise UserError(f"{name}: ", *error.parts) from error


@dataclasses.dataclass(frozen=True)
class _Run:
    """One model, trained on one set of one task."""

    task: str
    member: str
    model: models.Model
    rate: float
    size: int
    seed: int
    settings: Settings

    def found(self, folder: epath.Path) -> dict:
        """What it comes to: from an earlier call, or measured."""
        name = f"{self.task}-{self.member}-{self.size}-{self.seed}"
        file = folder / (re.sub(r"[^\w.-]+", "_", name) + ".json")
        settings = self._settings()
        if file.exists():
            kept = json.loads(file.read_text())
            if kept["settings"] == settings:
                return kept
        begin = time.perf_counter()
        kept = {"settings": settings, **self._measured()}
        kept["seconds"] = round(time.perf_counter() - begin, 1)
        folder.mkdir(parents=True, exist_ok=True)
        storage.write(file, json.dumps(kept, indent=1) + "\n")
        print(
            f"{self.task}, {self.member}, {self.size:,} sequences, seed {self.seed}: "
            f"loss {kept['loss']:.4f}, {kept['seconds']} s",
            file=sys.stderr,
            flush=True,
        )
        return kept

    def _settings(self) -> dict:
        task, settings = sequences.TASKS[self.task], self.settings
        said = {
            "task": self.task,
            "member": self.member,
            "model": repr(self.model),
            "rate": self.rate,
            "set": self.size,
            "seed": self.seed,
            "hardest": settings.most(task),
            "asked": settings.levels(task),
            "longest": settings.longest(),
            **{
                name: getattr(settings, name)
                for name in ("steps", "batch_size", "every", "questions")
            },
        }
        # As it is read back.
        return json.loads(json.dumps(said))

    def _measured(self) -> dict:
        pairs = _taught(self.task, self.seed, self.settings)[: self.size]
        rng = np.random.default_rng((self.seed, 2))
        params, loss = fitting.fit(
            self.model,
            batches(pairs, self.task, self.settings, rng),
            rate=self.rate,
            steps=self.settings.steps,
            seed=self.seed,
        )
        by_difficulty = []
        for new in asked(self.task, self.seed, self.settings, seen=pairs):
            batch, weights_BT = sequences.rows(new, self.settings.longest())
            right = fitting.accuracies(self.model, params, batch, weights_BT)
            logged = fitting.metrics(self.model, params, batch)
            steps = logged.get("ponder/updates")
            by_difficulty.append(
                {
                    "characters": right[0],
                    "sequences": right[1],
                    "steps": None if steps is None else float(steps),
                }
            )
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
        return {"loss": loss, "parameters": count, "by_difficulty": by_difficulty}


@functools.lru_cache(maxsize=2)
def _taught(name: str, seed: int, settings: Settings) -> list:
    """The largest set of a seed; smaller ones are its beginnings."""
    task, rng = sequences.TASKS[name], np.random.default_rng((seed, 0))
    levels = rng.integers(task.least, settings.most(task) + 1, max(settings.sets))
    return [task.draw(rng, int(level)) for level in levels]


def asked(name: str, seed: int, settings: Settings, seen: Sequence) -> Iterator[list]:
    """What is asked at each difficulty; nothing that was seen, where there is more."""
    task, rng = sequences.TASKS[name], np.random.default_rng((seed, 1))
    known = {tuple(question) for question, _ in seen}
    for level in settings.levels(task):
        rows = []
        for _ in range(settings.questions):
            tries = (task.draw(rng, level) for _ in range(100))
            new = (pair for pair in tries if tuple(pair[0]) not in known)
            rows.append(next(new, None) or task.draw(rng, level))
        yield rows


def batches(pairs: Sequence, name: str, settings: Settings, rng) -> Iterator:
    """Rows of one sequence each, in epochs over the set, for ever."""
    short, long = settings.room(sequences.TASKS[name]), settings.longest()
    few = max(1, settings.batch_size * short // long)
    order = _epochs(len(pairs), rng)
    step = 0
    while True:
        step += 1
        anywhere = step % settings.every == 0
        count, room = (few, long) if anywhere else (settings.batch_size, short)
        chosen = [pairs[next(order)] for _ in range(count)]
        starts = [
            int(rng.integers(room + 2 - len(q) - len(a))) if anywhere else 0
            for q, a in chosen
        ]
        yield sequences.rows(chosen, room, starts)


def _epochs(size: int, rng) -> Iterator[int]:
    while True:
        yield from rng.permutation(size)
