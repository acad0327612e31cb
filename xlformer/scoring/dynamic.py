"""Dynamic evaluation: the parameters learn from each segment, after it was scored.

Krause, Kahembwe, Murray and Renals 2018 (arXiv:1709.07432), and 2019 for Transformers
(arXiv:1904.08378). With g the gradient of a segment's mean nll at the parameters p that
scored it, and p0 the trained ones, what scores the next segment is

    sgd   p - rate g             + decay (p0 - p)
    rms   p - rate g / (s + eps) + min(decay s / mean(s), 1) (p0 - p)

where s is the root of the mean of the squared gradients of segments of the training
text, taken at p0, and mean(s) goes over all parameters. Nothing is dropped or clipped,
no gradient goes into the memory, and parameters are those of the whole text: they go
back neither at a document's beginning nor anywhere else.

The program of 2018 takes s over batches of 100 rows and mean(s) as the mean of each
array's mean, which here would depend on whether layers are stacked. That of 2019 has
the sum of n squares in place of their mean and a decay of its own: its rate, epsilon
and decay are sqrt(n) rate, sqrt(n) epsilon and decay / (sqrt(n) mean(s)) here.

One row is what was published. Rows share their parameters and each update, which is
that of their mean nll. So they must not overlap: a token that another row has read
before it is scored has already taught the parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlformer import runs
from xlformer.errors import Argument, UserError, reason
from xlformer.models.parameters import abstract_params
from xlformer.scoring import squares, texts
from xlformer.scoring.learning import Learning
from xlformer.scoring.rows import Plan
from xlformer.scoring.settings import DYNAMIC, EvalSettings


class Given(NamedTuple):
    """What dynamic evaluation goes by; it stays as it is.

    Attributes:
      params: the trained ones.
      rms: s of each of them; None is sgd.
      rate, decay, epsilon: numbers; epsilon is of rms alone.
    """

    params: Any
    rms: Any
    rate: float
    decay: float
    epsilon: float | None


def updated(given: Given, params, grads):
    """The parameters after a segment that they have scored, with its gradient."""
    rate, decay, epsilon = given.rate, given.decay, given.epsilon
    if given.rms is None:

        def sgd(p, p0, g):
            return p - rate * g + decay * (p0 - p)

        return jax.tree.map(sgd, params, given.params, grads)
    leaves = jax.tree.leaves(given.rms)
    mean = sum(x.sum() for x in leaves) / sum(x.size for x in leaves)

    # A share of more than 1 would go beyond the trained ones (Krause et al. 2018, 4.2).
    def rms(p, p0, g, s):
        back = jnp.minimum(decay * s / mean, 1)
        return p - rate * g / (s + epsilon) + back * (p0 - p)

    return jax.tree.map(rms, params, given.params, grads, given.rms)


class Dynamic(Learning):
    """Scores a text while it learns from it; `score` takes a Given as params."""

    def _first(self, given):
        return given.params

    def _params(self, given, tree):
        return tree

    def _next(self, given, tree, grads):
        return updated(given, tree, grads)


def given(
    settings: EvalSettings, run: runs.Run, model, plan: Plan, mesh, progress=None
) -> tuple[Given, dict]:
    """What `Dynamic.score` takes as params, and what the card says of it.

    Args:
      settings: filled.
      run: whose parameters and training text it is.
      model, plan, mesh: of the scoring.
      progress: called with the fraction done; true gives up.
    """
    said = {"dynamic": settings.dynamic}
    said |= {name: getattr(settings, name) for name in DYNAMIC[settings.dynamic]}
    rms = None
    if settings.dynamic == "rms":
        tokens, documents, _ = texts.read(run, "train", None, settings.data_path)
        rms, said["dynamic_segments"] = squares.root_mean(
            model,
            run.params,
            tokens,
            plan,
            documents=documents,
            mesh=mesh,
            step=run.step,
            segments=settings.dynamic_segments,
            progress=progress,
        )
    numbers = settings.dynamic_rate, settings.dynamic_decay, settings.dynamic_epsilon
    # As numbers of Python they have the dtype of what they multiply.
    numbers = (None if x is None else float(x) for x in numbers)
    return Given(run.params, rms, *numbers), said


def check(settings: EvalSettings, run: runs.Run, model, objective) -> None:
    """Raises UserError where nothing can be learnt from what was scored."""
    named = Argument("dynamic", settings.dynamic)
    if not objective.causal:
        raise UserError(
            named,
            f": the run has config.train.objective={run.config.train.objective}, whose "
            "scores follow no order in which one could learn",
        )
    check_gradient(model, named, settings.segment_length)


def check_gradient(model, named: Argument, segment_length: int) -> None:
    """Raises UserError where a model's nll cannot be differentiated."""
    params = abstract_params(model)
    T, state = segment_length, jax.eval_shape(lambda: model.init_state(1))
    inputs_BT = jax.ShapeDtypeStruct((1, T + model.extended_length), jnp.int32)
    targets_BT = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def nats(params, state, inputs_BT, targets_BT):
        return model.apply(params, inputs_BT, targets_BT, state)[0].sum()

    arrays = params, state, inputs_BT, targets_BT
    jax.eval_shape(nats, *arrays)  # what goes wrong here is no gradient's fault
    try:
        jax.eval_shape(jax.grad(nats), *arrays)
    except (TypeError, ValueError, NotImplementedError) as error:
        line = f": {type(model).__name__} has no gradient: {reason(error)}"
        raise UserError(named, line) from error
