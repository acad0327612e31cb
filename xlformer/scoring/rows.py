"""Scoring a stream of tokens in rows, each target once.

The text is one stream; cut into B rows it is scored B times as fast, but the first
tokens of each row lack their context. How that is mended is `warmup`:

- exact: rows begin on segment boundaries of the one-row stream and first replay,
  unscored, all that it would have carried, as many segments as the model says: for a
  stack n_layer x ceil(memory / segment), because the memory of a layer reaches through
  the layers below it. Any number of rows gives the score of one row, of all targets but
  the very first.
- fill: replays ceil(memory / segment) segments: the memory is full, but what is in it
  came from a shorter past.
- none: rows of n // B tokens, as the originals do: B (n // B - 1) targets.

A state of unlimited reach (a recurrence, prefix sums) is exact in one row only.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from xlformer.errors import Argument, UserError

# How much more may be read for the sake of longer segments, which gain a fifth.
MOST_MORE = 1.05
WARMUPS = ("auto", "exact", "fill", "none")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which inputs each row reads at each step, and which of them are scored.

    Row b reads inputs start_B[b] + k * segment_length onwards at step k; those before 0
    are nothing. It scores inputs first_B[b] to last_B[b] (exclusive).
    """

    segment_length: int
    steps: int
    start_B: np.ndarray
    first_B: np.ndarray
    last_B: np.ndarray
    warmup: str

    @property
    def targets(self) -> int:
        """How many tokens are scored."""
        return int((self.last_B - self.first_B).sum())


def cut_rows_for(
    model,
    tokens: int,
    *,
    batch_size: int,
    segment_length: int,
    warmup: str = "auto",
) -> Plan:
    """Cuts a stream of `tokens` into rows for a model; see `cut_rows`."""
    return _cut(tokens, batch_size, segment_length, warmup, model.replay, reach(model))


def cut_rows(
    tokens: int,
    *,
    batch_size: int,
    segment_length: int,
    memory_length: int | None,
    n_layer: int,
    warmup: str = "auto",
) -> Plan:
    """Cuts a stream of `tokens` into rows, for n_layer layers of this memory each.

    'auto' is exact where that adds less than a quarter of the work, else fill; with
    unlimited reach, memory_length None, it is none. A segment is never longer than the
    text.
    """

    def replay(T):
        return None if memory_length is None else n_layer * -(-memory_length // T)

    return _cut(tokens, batch_size, segment_length, warmup, replay, memory_length)


def _cut(tokens, batch_size, segment_length, warmup, replay, memory_length) -> Plan:
    if warmup not in WARMUPS:
        raise UserError(Argument("warmup", warmup), f" is none of {', '.join(WARMUPS)}")
    if tokens < 2:
        raise UserError(f"the text has {tokens} tokens; at least 2 are needed to score")
    if batch_size < 1 or segment_length < 1:
        raise UserError(
            Argument("batch_size", batch_size),
            " and ",
            Argument("segment_length", segment_length),
            " must be at least 1",
        )
    T = min(segment_length, tokens - 1)
    # None is without limit. A memory of 0 is filled by 0 segments.
    replayed = {"exact": replay(T), "fill": memory_length and -(-memory_length // T)}
    if batch_size == 1:  # There is nothing before the row.
        replayed = {"exact": 0, "fill": 0}
    if warmup in replayed and replayed[warmup] is None:
        raise UserError(
            Argument("warmup", warmup),
            " with ",
            Argument("batch_size", batch_size),
            ": this model's state reaches back without limit; use 1 row, or ",
            Argument("warmup", "none"),
        )
    if warmup == "none" or replayed["fill"] is None:
        batch_size = min(batch_size, tokens // 2)
        length = tokens // batch_size
        start_B = np.arange(batch_size) * length
        steps = math.ceil((length - 1) / T)
        return Plan(T, steps, start_B, start_B, start_B + length - 1, "none")
    # Rows begin where segments of the one-row stream begin, or they could not carry
    # what it carries. Rounding up to whole segments may leave fewer rows than asked.
    segments = math.ceil((tokens - 1) / T)
    rows = min(batch_size, segments)
    each = math.ceil(segments / rows)
    rows = math.ceil(segments / each)
    if warmup == "auto":
        # More than a quarter of extra work is worth asking for.
        exact = 0 if rows == 1 else replayed["exact"]
        warmup = "exact" if exact is not None and 4 * exact < each else "fill"
    # The last row replays from the beginning of the text at most. Rows nearer to it
    # start before it; those inputs are nothing, and end with a reset.
    before = min(replayed[warmup], (rows - 1) * each)
    first_B = np.arange(rows) * each * T
    last_B = np.minimum(first_B + each * T, tokens - 1)
    return Plan(T, before + each, first_B - before * T, first_B, last_B, warmup)


def faster(plan: Plan, model, tokens: int, *, batch_size: int) -> Plan:
    """The same rows in segments of half a memory, where no score depends on them.

    Each segment's products are larger, and fewer segments read the memory. Of a plan
    that fills the memory once the score does depend on them; and rounding up to whole
    segments may cost more than longer ones gain.
    """
    if not model.segments_of_any_length or plan.warmup == "fill":
        return plan
    longer = model.memory_length // 2
    if longer <= plan.segment_length:
        return plan
    found = cut_rows_for(
        model,
        tokens,
        batch_size=batch_size,
        segment_length=longer,
        warmup=plan.warmup,
    )
    return found if _read(found) <= MOST_MORE * _read(plan) else plan


def _read(plan: Plan) -> int:
    """Tokens that go through the model."""
    return plan.steps * plan.segment_length * len(plan.start_B)


def pad(plan: Plan, rows: int) -> Plan:
    """More rows, which read the beginning and score nothing."""
    more = (0, rows - len(plan.start_B))
    return dataclasses.replace(
        plan,
        start_B=np.pad(plan.start_B, more),
        first_B=np.pad(plan.first_B, more),
        last_B=np.pad(plan.last_B, more),
    )


def whole_rows(batch_size: int, segment_length: int) -> Plan:
    """One segment a row: a plan to compile with."""
    start_B = np.arange(batch_size) * segment_length
    return Plan(segment_length, 1, start_B, start_B, start_B + segment_length, "none")


def targets_at(plan: Plan, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Says which inputs a step has targets for, in each row, and which of them count.

    Returns:
      index_BT: places in the text; before its beginning they are negative.
      scored_BT: whether that target is scored, in this row.
    """
    T = plan.segment_length
    index_BT = (plan.start_B + step * T)[:, None] + np.arange(T)[None]
    after_BT = index_BT >= plan.first_B[:, None]
    return index_BT, after_BT & (index_BT < plan.last_B[:, None])


def batch(plan: Plan, tokens, documents, step: int, extended: int) -> dict:
    """One segment of every row.

    Inputs, targets, where the targets' inputs stand, resets, and how many inputs come
    before the end of the row: what follows is padding, or the next row's. Which targets
    count says `targets_at`.
    """
    T, N = plan.segment_length, len(tokens)
    target_BT, _ = targets_at(plan, step)
    start_B = plan.start_B + step * T
    index_BT = start_B[:, None] + np.arange(-extended, T)[None]
    # Places outside of the text are read as token 0. What it gives is not scored, and
    # the resets hide it from what is.
    inside_BT = (index_BT >= 0) & (index_BT < N)
    inputs_BT = np.where(inside_BT, tokens[np.clip(index_BT, 0, N - 1)], 0)
    targets_BT = tokens[np.clip(target_BT + 1, 0, N - 1)]
    # A row that starts before the text, and the first token of one that does not,
    # which comes again with as many segments as an extended length repeats.
    resets_BT = (index_BT == 0) | (index_BT == plan.start_B[:, None])
    if documents is not None:
        # Documents ascend: where the next beginning is the place itself, one begins.
        found_BT = np.searchsorted(documents, index_BT)
        found_BT = np.minimum(found_BT, len(documents) - 1)
        resets_BT |= documents[found_BT] == index_BT
    return {
        "inputs_BT": inputs_BT.astype(np.int32),
        "targets_BT": targets_BT.astype(np.int32),
        "index_BT": target_BT.astype(np.int32),
        "resets_BT": resets_BT,
        "lengths_B": extended + np.clip(plan.last_B - start_B, 0, T).astype(np.int32),
    }


def reach(model) -> int | None:
    """Earlier positions that a segment's layer reads from outside of it."""
    if model.memory_length is None:
        return None
    return model.memory_length + model.extended_length
