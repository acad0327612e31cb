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
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlformer import sharding
from xlformer.errors import Argument, UserError

WARMUPS = ("auto", "exact", "fill", "none")
# Tokens in one compiled call: long enough to hide dispatch, short enough to interrupt.
TOKENS_PER_CALL = 16_384


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


def plan_for(
    model,
    tokens: int,
    *,
    batch_size: int,
    segment_length: int,
    warmup: str = "auto",
) -> Plan:
    """Cuts a stream of `tokens` into rows for a model; see `plan`."""
    return _plan(tokens, batch_size, segment_length, warmup, model.replay, reach(model))


def plan(
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

    return _plan(tokens, batch_size, segment_length, warmup, replay, memory_length)


def _plan(tokens, batch_size, segment_length, warmup, replay, memory_length) -> Plan:
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
    segments = math.ceil((tokens - 1) / T)
    rows = min(batch_size, segments)
    each = math.ceil(segments / rows)
    rows = math.ceil(segments / each)
    if warmup == "auto":
        # More than a quarter of extra work is worth asking for.
        exact = 0 if rows == 1 else replayed["exact"]
        warmup = "exact" if exact is not None and 4 * exact < each else "fill"
    before = min(replayed[warmup], (rows - 1) * each)
    first_B = np.arange(rows) * each * T
    last_B = np.minimum(first_B + each * T, tokens - 1)
    return Plan(T, before + each, first_B - before * T, first_B, last_B, warmup)


class Score(NamedTuple):
    """Attributes: summed nll, in nats; the number of targets; seconds it took."""

    nats: float
    targets: int
    seconds: float


class Evaluator:
    """A model's scoring function, compiled once for rows of fixed shape.

    steps: of the longest plan, if known: no call is longer than it needs to be.
    mesh: splits the rows, by default one device. Rows that score nothing are added
      until they divide.
    """

    def __init__(
        self,
        model,
        *,
        batch_size: int,
        segment_length: int,
        steps: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self._model = model
        self._mesh = mesh or sharding.make_mesh({"data": 1})
        self._segment_length = segment_length
        self._rows = sharding.Rows(self._mesh, sharding.padded(batch_size, self._mesh))
        at_most = max(1, TOKENS_PER_CALL // (batch_size * segment_length))
        self._steps = min(at_most, steps or at_most)
        self._inputs = segment_length + model.extended_length
        # Padding comes after all that is scored; only such a model must know of it.
        # (A segment of one token has none.)
        self._tells_lengths = model.positions_from_end and self._inputs > 1
        params = jax.eval_shape(model.init, jax.random.key(0))
        axes = model.cache_axes(segment_length=self._inputs)
        abstract = jax.eval_shape(self._cold_state, params)
        placed = sharding.carried(self._mesh, abstract, axes)
        self._begin = jax.jit(self._cold_state, out_shardings=placed)
        self._scan = jax.jit(
            self._score_segments,
            donate_argnums=1,
            out_shardings=(placed, sharding.replicated(self._mesh)),
        )
        self._compiled: dict[Any, Any] = {}

    def _cold_state(self, params):
        """In the form that the model likes for scoring, of these very parameters."""
        state = self._model.init_state(1)
        state = self._model.to_cache(params, state, segment_length=self._inputs)
        # Rows that have read nothing are alike: one is made, not all.
        leaves, structure = jax.tree.flatten(state)
        axes = self._model.cache_axes(segment_length=self._inputs)
        for i, names in enumerate(structure.flatten_up_to(axes)):
            if "batch" in names:
                rows, axis = self._rows.batch_size, names.index("batch")
                leaves[i] = jnp.repeat(leaves[i], rows, axis)
        return structure.unflatten(leaves)

    def _init_state(self, params):
        with jax.set_mesh(self._mesh):
            return self._begin(params)

    def _score_segments(self, params, state, batches):
        def body(state, batch):
            nll_BT, state, _ = self._model.apply(
                params,
                batch["inputs_BT"],
                batch["targets_BT"],
                state,
                resets_BT=batch["resets_BT"],
                lengths_B=batch.get("lengths_B"),
            )
            return state, jnp.where(batch["scored_BT"], nll_BT, 0).sum(axis=1)

        return jax.lax.scan(body, state, batches)

    def compile(self, params):
        """Compiles for parameters of these shapes, so that no signal waits for it.

        Returns the compiled function of the scan, for what it needs and does.
        """
        plan_ = _whole_rows(self._rows.batch_size, self._segment_length)
        batch = next(
            self._batches(plan_, np.zeros(plan_.last_B.max() + 1, np.int32), None)
        )
        return self._get(params, self._init_state(params), batch)

    def _get(self, params, state, batch):
        key = tuple((name, x.shape) for name, x in batch.items())
        if key not in self._compiled:
            placed = self._rows.shardings(batch, axis=1)
            batch = sharding.with_shardings(batch, placed)
            with jax.set_mesh(self._mesh):
                self._compiled[key] = self._scan.lower(params, state, batch).compile()
        return self._compiled[key]

    def _batches(self, plan_: Plan, tokens, documents) -> Iterator[Mapping]:
        """Of this process's rows."""
        mine = self._rows.mine
        plan_ = dataclasses.replace(
            plan_,
            start_B=plan_.start_B[mine],
            first_B=plan_.first_B[mine],
            last_B=plan_.last_B[mine],
        )
        for step in range(0, plan_.steps, self._steps):
            chunk = [
                _batch(plan_, tokens, documents, k, self._model.extended_length)
                for k in range(step, step + self._steps)
            ]
            batch = {name: np.stack([b[name] for b in chunk]) for name in chunk[0]}
            if not self._tells_lengths:
                del batch["lengths_B"]
            # The same shape with documents and without: one compiled function.
            only_before = not self._model.resets_in_segment
            if only_before and documents is None and not self._model.extended_length:
                batch["resets_BT"] = batch["resets_BT"][:, :, :1]
            yield self._rows.put(batch, axis=1)

    def score(
        self,
        params,
        tokens: np.ndarray,
        plan_: Plan,
        *,
        documents: np.ndarray | None = None,
        progress: Callable[[float], bool] | None = None,
    ) -> Score | None:
        """Sums the nll of the planned targets.

        progress is called between calls with the fraction done; when it returns True
        the evaluation is given up and the result is None.
        """
        start = time.perf_counter()
        plan_ = _pad(plan_, self._rows.batch_size)
        state = jax.block_until_ready(self._init_state(params))  # or there is no room
        nats, calls = 0.0, math.ceil(plan_.steps / self._steps)
        pending = None
        for call, batch in enumerate(self._batches(plan_, tokens, documents)):
            state, nll_NB = self._get(params, state, batch)(params, state, batch)
            # A lag of one: the device works while the host sums in float64.
            nats += (
                0.0 if pending is None else float(np.asarray(pending, np.float64).sum())
            )
            pending = nll_NB
            if progress is not None and progress((call + 1) / calls):
                return None
        nats += float(np.asarray(pending, np.float64).sum())
        return Score(nats, plan_.targets, time.perf_counter() - start)


def _pad(plan_: Plan, rows: int) -> Plan:
    """More rows, which read the beginning and score nothing."""
    more = (0, rows - len(plan_.start_B))
    return dataclasses.replace(
        plan_,
        start_B=np.pad(plan_.start_B, more),
        first_B=np.pad(plan_.first_B, more),
        last_B=np.pad(plan_.last_B, more),
    )


def _whole_rows(batch_size, segment_length) -> Plan:
    start_B = np.arange(batch_size) * segment_length
    return Plan(segment_length, 1, start_B, start_B, start_B + segment_length, "none")


def _batch(plan_: Plan, tokens, documents, step: int, extended: int) -> dict:
    """One segment of every row.

    Inputs, targets, resets, which targets count, and how many inputs come before the
    end of the row: what follows is padding, or the next row's.
    """
    T, N = plan_.segment_length, len(tokens)
    start_B = plan_.start_B + step * T
    index_BT = start_B[:, None] + np.arange(-extended, T)[None]
    inside_BT = (index_BT >= 0) & (index_BT < N)
    inputs_BT = np.where(inside_BT, tokens[np.clip(index_BT, 0, N - 1)], 0)
    target_BT = index_BT[:, extended:]
    targets_BT = tokens[np.clip(target_BT + 1, 0, N - 1)]
    scored_BT = (target_BT >= plan_.first_B[:, None]) & (
        target_BT < plan_.last_B[:, None]
    )
    # A row that starts before the text, and the first token of one that does not,
    # which comes again with as many segments as an extended length repeats.
    resets_BT = (index_BT == 0) | (index_BT == plan_.start_B[:, None])
    if documents is not None:
        found_BT = np.searchsorted(documents, index_BT)
        found_BT = np.minimum(found_BT, len(documents) - 1)
        resets_BT |= documents[found_BT] == index_BT
    return {
        "inputs_BT": inputs_BT.astype(np.int32),
        "targets_BT": targets_BT.astype(np.int32),
        "resets_BT": resets_BT,
        "scored_BT": scored_BT,
        "lengths_B": extended + np.clip(plan_.last_B - start_B, 0, T).astype(np.int32),
    }


def unigram_entropy(tokens: np.ndarray, vocab_size: int) -> float:
    """Entropy in nats of the tokens' own frequencies: what no model may exceed."""
    p = np.bincount(np.asarray(tokens), minlength=vocab_size) / len(tokens)
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def reach(model) -> int | None:
    """Earlier positions that a segment's layer reads from outside of it."""
    if model.memory_length is None:
        return None
    return model.memory_length + model.extended_length
