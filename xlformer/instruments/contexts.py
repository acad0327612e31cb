"""Losses of tokens of which a model has seen exactly so many tokens before.

A context of c tokens is a fresh state that is fed tokens[t - c : t]; the loss is that
of tokens[t]. It is one segment: of Transformer-XL one of c tokens with an empty memory,
and not a memory of c tokens, through which a stack of layers reaches further back. Only
a state without limit, which is what it is however it is fed, is fed in parts where the
model takes no longer ones.

Where no output depends on what follows, a window that begins at s gives the losses with
c tokens of context of s + c for all c at once. Targets that lie as far from each other
as context lengths do share windows, so that each one costs little more than its longest
context, and not the sum of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlformer.errors import Argument, UserError
from xlformer.models import Model

TOKENS_PER_CALL = 8192  # of all rows of one call, at most, but one row
# Targets that follow each other, in context lengths: their first and last windows are
# read for a part of the contexts only, an eighth more than is needed.
RUN = 8


class Targets(NamedTuple):
    """Which tokens are measured.

    Attributes:
      places_N: ascending, of a text.
      spacing: from one to the next, within a run.
      runs: of targets, evenly spread over the text.
    """

    places_N: np.ndarray
    spacing: int
    runs: int

    def facts(self) -> dict:
        return {
            "targets": len(self.places_N),
            "spacing": self.spacing,
            "runs": self.runs,
            "first_target": int(self.places_N[0]),
            "last_target": int(self.places_N[-1]),
        }


def spread(
    tokens: int,
    count: int,
    contexts: Sequence[int],
    documents: np.ndarray | None = None,
) -> Targets:
    """Places of about `count` targets, all of which have the longest context.

    Args:
      tokens: of the text.
      count: how many targets, at most what the text has.
      contexts: multiples of the first one.
      documents: where each begins; a context lies within one.

    Raises:
      UserError: no target has so long a context.
    """
    step, longest = contexts[0], contexts[-1]
    named = Argument("max_context", longest)
    room = tokens - longest
    if room < 1:
        line = f" is longer than the text, which has {tokens} tokens"
        raise UserError(named, line)
    # The largest part of a step that leaves room for so many.
    spacing = max(
        (d for d in range(1, step + 1) if step % d == 0 and room // d >= count),
        default=1,
    )
    count = min(count, -(-room // spacing))
    length = RUN * len(contexts) * (step // spacing)
    runs = max(1, min(-(-count // length), room // (length * spacing)))
    begins_R = np.linspace(0, room, runs, endpoint=False).astype(int)
    length = min(-(-count // runs), -(-(room // runs) // spacing))
    places_N = longest + (begins_R[:, None] + spacing * np.arange(length)).reshape(-1)
    if documents is not None:
        begins_D = np.concatenate([[0], documents])
        begins_N = begins_D[np.searchsorted(begins_D, places_N, "right") - 1]
        places_N = places_N[places_N - begins_N >= longest]
        if not len(places_N):
            line = " is longer than every document of the text, or nearly so"
            raise UserError(named, line)
    return Targets(places_N, spacing, runs)


def reader(model: Model) -> tuple[Model, int | None]:
    """The model as it is fed contexts, and the longest it can be fed; None is any.

    Raises UserError where a model sees what comes after a token.
    """
    if not model.causal:
        raise UserError(
            f"{type(model).__name__} sees what comes after a token (causal=False): its "
            "loss is not that of a context"
        )
    if model.extended_length:
        model = model.for_reading(extended_length=0)
    if model.memory_length is None:
        return model.for_generation(), None
    ends = model.longest_segment, _window(model)
    return model, min((end for end in ends if end is not None), default=None)


def _window(model: Model) -> int | None:
    """The last tokens that a model continues a text with, where they are bounded."""
    try:
        return model.for_generation().sight
    except UserError:  # Without a memory none is continued.
        return None


def score(
    model: Model,
    params,
    tokens: np.ndarray,
    places_N: np.ndarray,
    contexts: Sequence[int],
    found_CN: np.ndarray,
    *,
    step: int = 0,
    progress: Callable[[float], None] = lambda fraction: None,
) -> None:
    """Writes the nats of each target with each context into found_CN.

    Args:
      model, params: `reader` says as what the model is read. A context longer than it
        can be fed gives what the longest one does.
      tokens: the text.
      places_N: of targets, ascending.
      contexts: ascending.
      found_CN: float32, of any memory: it is written in pieces.
      step: of the checkpoint, for schedules inside the model.
      progress: called with the fraction done.
    """
    model, most = reader(model)
    fed = [c if most is None else min(c, most) for c in contexts]
    # What a model can be fed at most need not be a multiple of the steps between
    # contexts: its windows begin elsewhere.
    groups = [[c for c in contexts if c in fed], sorted(set(fed) - set(contexts))]
    if model.positions_from_end:  # What a window gives is of its last target alone.
        groups = [[c] for group in groups for c in group]
    groups = [group for group in groups if group]
    for k, group in enumerate(groups):
        rows = {c: fed.index(c) for c in group}
        for context, index_N, nll_N in _losses(
            model, params, tokens, places_N, group, step
        ):
            if not np.isfinite(nll_N).all():
                raise UserError(
                    f"{type(model).__name__} gives a loss that is not finite"
                )
            found_CN[rows[context], index_N] = nll_N
            done = (index_N[-1] + 1) / len(places_N)
            progress((k + done) / len(groups))
    for row, context in enumerate(fed):
        if row != fed.index(context):
            found_CN[row] = found_CN[fed.index(context)]


def _losses(model, params, tokens, places_N, contexts, step):
    """Yields (context, which targets, their nats), in pieces."""
    longest = contexts[-1]
    starts = np.unique(np.subtract.outer(places_N, contexts))
    B = min(len(starts), max(1, TOKENS_PER_CALL // longest))
    program = jax.jit(_program(model, contexts))
    step = np.int32(step)
    for first in range(0, len(starts), B):
        begin_B = starts[np.minimum(np.arange(first, first + B), len(starts) - 1)]
        # Windows of the last targets end behind the text; it is nothing that counts.
        index_BT = begin_B[:, None] + np.arange(longest + 1)
        ids_BT = tokens[np.minimum(index_BT, len(tokens) - 1)].astype(np.int32)
        nll_BC = np.asarray(program(params, ids_BT, step))
        begin_B = begin_B[: len(starts) - first]
        for column, context in enumerate(contexts):
            index_B = np.searchsorted(places_N, begin_B + context)
            index_B = np.minimum(index_B, len(places_N) - 1)
            row_R = np.flatnonzero(places_N[index_B] == begin_B + context)
            if len(row_R):
                yield context, index_B[row_R], nll_BC[row_R, column]


def _program(model: Model, contexts: Sequence[int]):
    """(params, ids_BT, step) -> nll_BC, of ids that follow so many of the row."""
    longest = contexts[-1]
    size = min(longest, model.longest_segment or longest)
    parts = -(-longest // size)
    size = -(-longest // parts)
    padding = parts * size - longest
    # Only where something depends on it are lengths told: see Evaluator.
    told = padding and model.positions_from_end

    def cut(ids_BT):
        ids_BT = jnp.pad(ids_BT, ((0, 0), (0, padding)))
        return jnp.swapaxes(ids_BT.reshape(len(ids_BT), parts, size), 0, 1)

    def run(params, ids_BT, step):
        def part(state, segment):
            inputs_BS, targets_BS, length = segment
            nll_BS, state, _ = model.apply(
                params,
                inputs_BS,
                targets_BS,
                state,
                lengths_B=length if told else None,
                step=step,
            )
            return state, nll_BS

        state = model.init_state(len(ids_BT), model.dtype(params))
        length_P = jnp.minimum(longest - size * jnp.arange(parts), size)
        segments = cut(ids_BT[:, :-1]), cut(ids_BT[:, 1:]), length_P
        if parts == 1:  # No loop, which would hide constants from the compiler.
            _, nll_BT = part(state, [x[0] for x in segments])
        else:
            _, nll_PBS = jax.lax.scan(part, state, segments)
            nll_BT = jnp.swapaxes(nll_PBS, 0, 1).reshape(len(ids_BT), -1)
        return nll_BT[:, np.array(contexts) - 1]

    return run
