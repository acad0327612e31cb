"""The validation of a run that is being trained, with the settings of config.eval."""

from __future__ import annotations

import numpy as np

from xlformer import runs, scoring
from xlformer.data.prepared import Prepared
from xlformer.errors import UserError
from xlformer.models import Model


class Validation:
    """Scores one split; everything that does not fit shows when it is made."""

    def __init__(self, config, model: Model, prepared: Prepared, mesh):
        settings = config.eval
        if settings.split not in prepared.tokens:
            known = ", ".join(prepared.tokens)
            raise UserError(f"config.eval.split={settings.split!r} is none of {known}")
        self._tokens = prepared.tokens[settings.split]
        if settings.max_tokens:
            self._tokens = self._tokens[: settings.max_tokens]
        self._documents = prepared.documents[settings.split]
        self._in_words = prepared.vocabulary.unit in ("words", "pieces")
        visible = {
            "memory_length": settings.memory_length,
            "clamp_length": settings.clamp_length,
            "same_length": settings.same_length or None,
        }
        model = runs.for_reading(model, visible)
        self._plan = scoring.plan_for(
            model,
            len(self._tokens),
            batch_size=settings.batch_size,
            segment_length=settings.segment_length,
        )
        self._evaluator = scoring.Evaluator(
            model,
            batch_size=len(self._plan.start_B),
            segment_length=self._plan.segment_length,
            steps=self._plan.steps,
            mesh=mesh,
        )

    def compile(self, params) -> None:
        """Before training starts: later a signal would have to wait for it."""
        self._evaluator.compile(params)

    def loss(self, params, interrupted) -> float | None:
        """Nats per token; None as soon as interrupted() is true between two calls."""
        score = self._evaluator.score(
            params,
            self._tokens,
            self._plan,
            documents=self._documents,
            progress=lambda _: interrupted(),
        )
        return None if score is None else score.nats / score.targets

    def score(self, nats: float) -> tuple[str, float]:
        """Perplexity of words and pieces, bits of characters and bytes."""
        if self._in_words:
            return "ppl", float(np.exp(min(nats, 700)))
        return "bpc", float(nats / np.log(2))
