"""The scoring function of a model: one compiled scan over segments of fixed shape."""

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
from xlformer.errors import UserError
from xlformer.models.parameters import abstract_params
from xlformer.scoring import rows as rows_lib
from xlformer.scoring.results import Scored, Tally
from xlformer.scoring.rows import Plan
from xlformer.training import objectives

# Tokens in one compiled call: enough to hide what dispatching costs, few enough to be
# interrupted (a call takes 0.8 s of the quickstart's model on two CPU cores).
TOKENS_PER_CALL = 16_384
NEXT_TOKEN = objectives.NextToken()


class Score(NamedTuple):
    """What scoring gives: the summed nll in nats, how many targets, and seconds."""

    nats: float
    targets: int
    seconds: float


class Evaluator:
    """A model's scoring function, compiled once for rows of fixed shape.

    steps: of the longest plan, if known: no call is longer than it needs to be.
    mesh: splits the rows, by default one device. Rows that score nothing are added
      until they divide.
    objective: what is asked of each segment. What it hides is a function of the place
      in the text: the same whatever the rows, segments and devices are.
    greedy: also finds which targets the model would say itself, `Scored.greedy_N`. It
      costs `Model.log_probs` of each segment that has a target.
    """

    def __init__(
        self,
        model,
        *,
        batch_size: int,
        segment_length: int,
        steps: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
        objective=NEXT_TOKEN,
        greedy: bool = False,
    ):
        self._model, self._objective, self._greedy = model, objective, greedy
        self._mesh = mesh or sharding.make_mesh({"data": 1})
        self._segment_length = segment_length
        self._rows = sharding.Rows(self._mesh, sharding.padded(batch_size, self._mesh))
        self._inputs = segment_length + model.extended_length
        at_most = max(1, TOKENS_PER_CALL // (batch_size * self._inputs))
        self._steps = min(at_most, steps or at_most)
        # Padding comes after all that is scored, so only a model whose positions count
        # from the end, or that sees ahead, must know of it. (A segment of one token has
        # no padding.) Without lengths a memory is cut at places that are known when
        # compiling.
        sees_end = model.positions_from_end or not model.causal
        self._tells_lengths = sees_end and self._inputs > 1
        placed = self._layout(abstract_params(model))
        self._begin = jax.jit(self._cold_state, out_shardings=placed)
        # The state is donated, as in training: there may be no room for a second cache
        # of keys and values.
        self._scan = jax.jit(
            self._score_segments,
            donate_argnums=1,
            out_shardings=(placed, sharding.replicated(self._mesh)),
        )
        self._compiled: dict[Any, Any] = {}

    @classmethod
    def of(cls, model, plan: Plan, mesh, objective=NEXT_TOKEN) -> Evaluator:
        """The one that scores the rows of a plan."""
        return cls(
            model,
            batch_size=len(plan.start_B),
            segment_length=plan.segment_length,
            steps=plan.steps,
            mesh=mesh,
            objective=objective,
        )

    def score(
        self,
        params,
        tokens: np.ndarray,
        plan: Plan,
        *,
        documents: np.ndarray | None = None,
        step: int = 0,
        progress: Callable[[float], bool] | None = None,
        tally: Tally | None = None,
    ) -> Score | None:
        """Sums the nll of the planned targets.

        Args:
          params: of the model.
          tokens: the whole text.
          plan: of `cut_rows`, with this evaluator's segment_length.
          documents: where each begins; nothing is seen from one in the next.
          step: of the checkpoint, for schedules inside the model.
          progress: called between calls with the fraction done; when it returns True
            the evaluation is given up and the result is None.
          tally: is given what each call has scored, token by token.
        """
        start = time.perf_counter()
        tally = Tally() if tally is None else tally
        finished, _ = self.read(
            params,
            tokens,
            plan,
            documents=documents,
            step=step,
            progress=progress,
            tally=tally,
        )
        if not finished:
            return None
        if not tally.targets:
            raise UserError(
                f"none of {plan.targets} tokens is scored: the text is too short for "
                "one of them to be hidden"
            )
        return Score(tally.nats, tally.targets, time.perf_counter() - start)

    def read(self, params, tokens, plan: Plan, *, documents, step, progress, tally):
        """(whether it was not given up, the state after the last call); see `score`."""
        # Rows that score nothing are added until all of them divide by the devices.
        padded = rows_lib.pad(plan, self._rows.batch_size)
        # Waited for, so that the memory that making it took is free before the scan
        # begins: there may be no room for both.
        state = jax.block_until_ready(self._init_state(params))
        calls = math.ceil(plan.steps / self._steps)
        pending: tuple = ()
        for call, batch in enumerate(self._batches(padded, tokens, documents, step)):
            state, found = self._get(params, state, batch)(params, state, batch)
            # A lag of one: the device works while the host sums in float64.
            if pending:
                tally.add(self._scored(padded, tokens, *pending))
            pending = call * self._steps, *found
            if progress is not None and progress((call + 1) / calls):
                return False, state
        tally.add(self._scored(padded, tokens, *pending))
        return True, state

    def compile(self, params):
        """Compiles for parameters of these shapes, so that no signal waits for it.

        Returns the compiled function of the scan, for what it needs and does.
        """
        plan = rows_lib.whole_rows(self._rows.batch_size, self._segment_length)
        tokens = np.zeros(plan.last_B.max() + 1, np.int32)
        batch = next(self._batches(plan, tokens, None, 0))
        return self._get(params, self._init_state(params), batch)

    # On the device --------------------------------------------------------------------

    def _layout(self, params):
        """Where the state lies, for parameters of these shapes."""
        axes = self._model.cache_axes(segment_length=self._inputs)
        abstract = jax.eval_shape(self._cold_state, params)
        return sharding.model_state(self._mesh, abstract, axes)

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
        # One key for all rows: what is drawn for a token follows its place in the text.
        key = jax.random.key(objectives.EVALUATION_SEED)

        def body(state, batch):
            inputs_BT, targets_BT, weights_BT = self._objective.examples(
                batch["inputs_BT"], batch["targets_BT"], key, batch.get("index_BT")
            )
            about = {
                "resets_BT": batch["resets_BT"],
                "lengths_B": batch.get("lengths_B"),
                "step": batch["step"],
            }
            before = state
            nll_BT, state, _ = self._model.apply(
                params, inputs_BT, targets_BT, state, **about
            )
            greedy_BT = None
            if self._greedy:
                greedy_BT = jax.lax.cond(
                    batch["has_targets"],
                    lambda: self._is_greedy(
                        params, inputs_BT, targets_BT, before, about
                    ),
                    lambda: jnp.zeros(targets_BT.shape, bool),
                )
            return state, (nll_BT, weights_BT, greedy_BT)

        return jax.lax.scan(body, state, batches)

    def _is_greedy(self, params, inputs_BT, targets_BT, state, about):
        """Whether generating at temperature 0 would give the target, [B, T]."""
        log_probs_BSV, _ = self._model.log_probs(params, inputs_BT, state, **about)
        T = targets_BT.shape[1]  # What leads is extended context.
        return jnp.argmax(log_probs_BSV[:, -T:], axis=-1) == targets_BT

    def _get(self, params, state, batch):
        # Compiled by hand and kept by shapes, so that `compile` can come before a text
        # is there, and no call compiles without being noticed.
        key = tuple((name, x.shape) for name, x in batch.items())
        if key not in self._compiled:
            placed = self._rows.shardings(batch, axis=1)
            batch = sharding.with_shardings(batch, placed)
            with jax.set_mesh(self._mesh):
                self._compiled[key] = self._scan.lower(params, state, batch).compile()
        return self._compiled[key]

    # On the host ----------------------------------------------------------------------

    def _batches(self, plan: Plan, tokens, documents, step: int) -> Iterator[Mapping]:
        """Yields the inputs of one call after the other, of this process's rows."""
        mine, whole = self._rows.mine, plan
        plan = dataclasses.replace(
            plan,
            start_B=plan.start_B[mine],
            first_B=plan.first_B[mine],
            last_B=plan.last_B[mine],
        )
        for first in range(0, plan.steps, self._steps):
            chunk = [
                self._segment(plan, tokens, documents, k)
                for k in range(first, first + self._steps)
            ]
            batch = {name: np.stack([b[name] for b in chunk]) for name in chunk[0]}
            if not self._tells_lengths:
                del batch["lengths_B"]
            if self._objective.causal:  # nothing is drawn
                del batch["index_BT"]
            # The same shape with documents and without: one compiled function. A model
            # whose resets cannot lie inside a segment gets one column without
            # documents, and says itself that it cannot have them.
            only_before = not self._model.resets_in_segment
            if only_before and documents is None and not self._model.extended_length:
                batch["resets_BT"] = batch["resets_BT"][:, :, :1]
            if self._greedy:  # of any row, on whatever host
                steps = range(first, first + self._steps)
                scored = [rows_lib.targets_at(whole, k)[1].any() for k in steps]
                batch["has_targets"] = np.array(scored)
            # An array, so that another checkpoint's step needs no other program.
            batch["step"] = np.full(self._steps, step, np.int32)
            yield self._rows.put(batch, axis=1)

    def _segment(self, plan: Plan, tokens, documents, step: int) -> dict:
        """What the scan is given of one step."""
        more = self._model.extended_length
        return rows_lib.batch(plan, tokens, documents, step, more)

    def _scored(
        self, plan: Plan, tokens, first: int, nll_NBT, weights_NBT=None, greedy_NBT=None
    ) -> Scored:
        """What counts of the nll of steps `first`, first + 1, ..., of all rows."""
        steps = range(first, first + self._steps)
        found = [rows_lib.targets_at(plan, step) for step in steps]
        scored_NBT = np.stack([scored_BT for _, scored_BT in found])
        # Of a masked model only what was hidden counts; it saw all else.
        if weights_NBT is not None:
            scored_NBT &= np.asarray(weights_NBT) > 0
        index_N = np.stack([index_BT for index_BT, _ in found])[scored_NBT]
        # The place of the target: the next token, or the hidden one itself.
        index_N = index_N + 1 if self._objective.causal else index_N
        # float64 before anything is summed: from 2^26 on a float32 has steps of 8, more
        # nats than most tokens have.
        nll_N = np.asarray(nll_NBT)[scored_NBT].astype(np.float64)
        greedy_N = None if greedy_NBT is None else np.asarray(greedy_NBT)[scored_NBT]
        return Scored(index_N, np.asarray(tokens[index_N]), nll_N, greedy_N)
