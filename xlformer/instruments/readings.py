"""Weights read by other mechanisms than they were trained with, and how well they say.

Accuracy is the share of symbols that a model finds the most probable: the next one of
each, or the hidden ones where a model sees what comes after (config.train.objective).
Each segment is read alone, from a fresh state.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlformer.errors import Argument, UserError
from xlformer.models import Model
from xlformer.training import objectives

ROWS = 16  # segments of one call, at most
# Softmax's own fields are at their defaults, and a segment sees itself alone, as there.
FAVOR = {
    "mechanism": "favor",
    "carry_sums": False,
    "attention": "auto",
    "attention_dropout": 0.0,
}
# Maps of the features, as tables call them.
MAPS = {
    "positive": "positive",
    "SMREG": "regularised",
    "trigonometric": "trigonometric",
}


class Found(NamedTuple):
    """How well a model says the symbols of a text."""

    accuracy: float
    nats: float
    targets: int


def model_of(source: Model, **fields) -> Model:
    """The source's model with FAVOR in place of softmax; raises UserError."""
    return source.for_reading(**{**FAVOR, **fields})


def is_softmax(model: Model) -> bool:
    """Whether a model attends by softmax; UserError where it has no mechanism."""
    mechanism = model.card().get("mechanism")
    if mechanism is None:
        raise UserError(f"{type(model).__name__} has no mechanism of attention")
    return mechanism == "softmax"


def read(
    model: Model, params, objective, tokens: np.ndarray, length: int, steps=(0,)
) -> list[Found]:
    """What a model says of a text, at each of some steps.

    Args:
      objective: objectives.NextToken or Masked.
      tokens: the text; a few segments at its end may be left out.
      length: of the segments.
      steps: of the training, which say what projections are drawn.
    """
    count = (len(tokens) - 1) // length
    if not count:
        line = f" must be more than a segment of {length}"
        raise UserError(Argument("tokens", len(tokens)), line)
    # Calls of equal shape: so many rows that the fewest segments are left out.
    most = min(ROWS, count)
    rows = min(range(-(-most // 2), most + 1), key=lambda rows: (count % rows, -rows))
    count -= count % rows
    places_CBT = np.arange(count * length).reshape(-1, rows, length)
    batches = {
        "inputs": np.asarray(tokens)[places_CBT].astype(np.int32),
        "targets": np.asarray(tokens)[places_CBT + 1].astype(np.int32),
        "places": places_CBT.astype(np.int32),
    }
    found = []
    for step in steps:
        sums = _read(model, objective, params, batches, np.int32(step))
        hits, nats, weight = (float(np.asarray(x, np.float64).sum()) for x in sums)
        # Of very few symbols none may be hidden.
        found.append(Found(*(x / max(weight, 1) for x in (hits, nats)), int(weight)))
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(model: Model, objective, params, batches: Mapping[str, Any], step):
    """Hits, nats and weights, each summed for every batch."""
    key = jax.random.key(objectives.EVALUATION_SEED)

    def one(batch):
        inputs_BT, targets_BT, weights_BT = objective.examples(
            batch["inputs"], batch["targets"], key, batch["places"]
        )
        state = model.init_state(inputs_BT.shape[0])
        log_p_BTV, _ = model.log_probs(params, inputs_BT, state, step=step)
        if weights_BT is None:
            weights_BT = jnp.ones(targets_BT.shape, jnp.float32)
        log_p_BT = jnp.take_along_axis(log_p_BTV, targets_BT[..., None], -1)[..., 0]
        hit_BT = log_p_BTV.argmax(-1) == targets_BT
        # What is not a number is said by no one.
        hit_BT &= jnp.isfinite(log_p_BT)
        sums = hit_BT * weights_BT, -log_p_BT * weights_BT, weights_BT
        return [x.sum() for x in sums]

    return jax.lax.map(one, batches)


def most_frequent(tokens: np.ndarray) -> float:
    """The accuracy of who always says the most frequent symbol."""
    return float(np.bincount(tokens).max() / len(tokens))


def at_first(
    source: Model,
    params,
    objective,
    tokens,
    length: int,
    *,
    maps: Sequence[str],
    draws: int,
    counts: Sequence[int],
) -> list[dict]:
    """Accuracy of softmax weights as they are: by softmax, and by each map.

    Args:
      maps: of MAPS.
      draws: of the projections, of each map.
      counts: of the rows of positive features, beside the model's own.
    """

    def entry(name, model, steps, rows):
        read_ = read(model, params, objective, tokens, length, steps)
        accuracies = [found.accuracy for found in read_]
        return {
            "reading": name,
            "rows": rows,
            "accuracy": float(np.mean(accuracies)),
            "standard_deviation": (
                float(np.std(accuracies, ddof=1)) if len(read_) > 1 else None
            ),
            "nats": float(np.mean([found.nats for found in read_])),
            "draws": len(read_),
            "targets": read_[0].targets,
        }

    # A new draw at every step: so all draws are of one program.
    asked = [(name, {"features": MAPS[name]}) for name in maps]
    asked += [("positive", {"n_features": count}) for count in counts]
    found = [entry("softmax", source, [0], None)]
    for name, fields in asked:
        model = model_of(source, redraw_interval=1, **fields)
        found.append(entry(name, model, range(draws), model.config.projection_rows))
    return found
