"""Scoring with gradients: a scan that learns something from each segment."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xlformer import sharding
from xlformer.scoring import rows as rows_lib
from xlformer.scoring.evaluator import Evaluator
from xlformer.scoring.rows import Plan


class Learning(Evaluator):
    """An Evaluator that computes gradients and carries a tree like the parameters.

    Its `params` are whatever the three functions below take as `given`.
    """

    def _first(self, given):
        """The tree before the first segment."""
        raise NotImplementedError

    def _params(self, given, tree):
        """The parameters that a segment is scored with."""
        raise NotImplementedError

    def _next(self, given, tree, grads):
        """The tree after a segment."""
        raise NotImplementedError

    def _layout(self, params):
        state = jax.eval_shape(self._fresh, params)
        placed = sharding.model_state(self._mesh, state, self._model.state_axes())
        axes = self._model.param_axes(params)
        return placed, sharding.parameters(self._mesh, params, axes)

    def _cold_state(self, given):
        tree = self._first(given)
        return self._fresh(tree), tree

    def _fresh(self, params):
        # The plain state: what a cache holds was computed from parameters that change.
        dtype = self._model.dtype(params)
        wide = dtype if dtype == jnp.float64 else None
        return self._model.init_state(self._rows.batch_size, wide)

    def _score_segments(self, given, carried, batches):
        def body(carried, batch):
            (state, tree), scored_BT = carried, batch["scored_BT"]
            nll_BT, state, grads = self._gradients(
                self._params(given, tree), state, batch
            )
            # What follows the end of the text, and a row that is only there to divide
            # by the devices, teaches nothing.
            some = scored_BT.any()
            tree = jax.tree.map(
                lambda new, old: jnp.where(some, new, old),
                self._next(given, tree, grads),
                tree,
            )
            return (state, tree), (nll_BT, None)

        return jax.lax.scan(body, carried, batches)

    def _gradients(self, params, state, batch):
        """(nll_BT, the new state, the gradient of the mean nll of what is scored)."""
        scored_BT = batch["scored_BT"]

        def loss(params):
            nll_BT, after, _ = self._model.apply(
                params,
                batch["inputs_BT"],
                batch["targets_BT"],
                state,
                resets_BT=batch["resets_BT"],
                lengths_B=batch.get("lengths_B"),
                step=batch["step"],
            )
            nats = jnp.where(scored_BT, nll_BT, 0).sum()
            return nats / jnp.maximum(scored_BT.sum(), 1), (nll_BT, after)

        grads, (nll_BT, after) = jax.grad(loss, has_aux=True)(params)
        return nll_BT, jax.lax.stop_gradient(after), grads

    def _segment(self, plan: Plan, tokens, documents, step: int) -> dict:
        _, scored_BT = rows_lib.targets_at(plan, step)
        found = super()._segment(plan, tokens, documents, step)
        return found | {"scored_BT": scored_BT}
