"""How large gradients are on the training text, which dynamic evaluation goes by."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from xlformer.errors import Argument, UserError
from xlformer.scoring.learning import Learning
from xlformer.scoring.results import Tally
from xlformer.scoring.rows import Plan

# In how many places of the training text they are looked at.
PLACES = 8


class Squares(Learning):
    """Sums squared gradients at the parameters that `read` is given, over Places."""

    def _first(self, given):
        return jax.tree.map(jnp.zeros_like, given)

    def _params(self, given, tree):
        return given

    def _next(self, given, tree, grads):
        return jax.tree.map(lambda x, g: x + g * g, tree, grads)

    def _segment(self, plan: Places, tokens, documents, step: int) -> dict:
        plan, step = plan.at(step)
        return super()._segment(plan, tokens, documents, step)


@dataclasses.dataclass(frozen=True)
class Places(Plan):
    """A plan whose rows go on in another place after every so many segments.

    Attributes:
      each: how many segments follow each other, before which nothing is seen.
      offsets: of the places, in tokens from where a row starts.
    """

    each: int
    offsets: tuple[int, ...]

    def at(self, step: int) -> tuple[Plan, int]:
        """The plan that a step belongs to, and which one of it that is."""
        place = min(step // self.each, len(self.offsets) - 1)
        spans = self.start_B, self.first_B, self.last_B
        moved = (x_B + self.offsets[place] for x_B in spans)
        plan = Plan(self.segment_length, self.each, *moved, self.warmup)
        return plan, step - place * self.each


def root_mean(
    model,
    params,
    tokens: np.ndarray,
    plan: Plan,
    *,
    documents: np.ndarray | None,
    mesh: jax.sharding.Mesh,
    step: int,
    segments: int,
    progress=None,
):
    """(the root of the mean of each one's squared gradients, of how many segments).

    Args:
      model, params, step: as for Evaluator.score.
      tokens, documents: of the training text.
      plan: of the text to be scored, whose rows and segments these are like.
      mesh: shares the rows.
      segments: the most to look at.
      progress: called with the fraction done; true gives up, which is a UserError.
    """
    places = training_places(plan, len(tokens), segments)
    finished, (_, sums) = Squares.of(model, places, mesh).read(
        params,
        tokens,
        places,
        documents=documents,
        step=step,
        progress=progress,
        tally=Tally(),
    )
    if not finished:
        raise UserError("the evaluation was given up")
    n = places.steps

    def root(sums):
        return jax.tree.map(lambda x: jnp.sqrt(x / n), sums)

    return jax.jit(root, donate_argnums=0)(sums), n


def training_places(plan: Plan, tokens: int, segments: int) -> Places:
    """At most so many segments, whose rows are cut as without a warm-up."""
    T, rows = plan.segment_length, len(plan.start_B)
    length = tokens // rows
    there = (length - 1) // T
    if not there:
        raise UserError(
            Argument("dynamic", "rms"),
            f": the training split has {tokens} tokens, and {rows} rows with a segment "
            f"of {T} and the token after it need {rows * (T + 1)}",
        )
    places = min(PLACES, segments, there)
    each = min(segments, there) // places
    start_B = np.arange(rows) * length
    return Places(
        segment_length=T,
        steps=places * each,
        start_B=start_B,
        first_B=start_B,
        last_B=start_B + each * T,
        warmup="none",
        each=each,
        offsets=tuple(place * there // places * T for place in range(places)),
    )
