"""The validation of a run that is being trained, with the settings of config.eval."""

from __future__ import annotations

from xlformer.data import shards
from xlformer.data.prepared import Prepared
from xlformer.errors import UserError
from xlformer.models import Model
from xlformer.scoring import results
from xlformer.scoring.evaluator import Evaluator
from xlformer.scoring.rows import cut_rows_for
from xlformer.scoring.settings import EvalSettings
from xlformer.training import objectives


class Validation:
    """Scores one split; everything that does not fit shows when it is made."""

    def __init__(self, config, model: Model, prepared: Prepared, mesh):
        split, most = config.eval.split, config.eval.max_tokens
        if split not in prepared.tokens:
            known = ", ".join(prepared.tokens)
            raise UserError(f"config.eval.split={split!r} is none of {known}")
        tokens = prepared.tokens[split]
        self._tokens = shards.head(tokens, most or len(tokens))
        self._documents = prepared.documents[split]
        self._unit = prepared.vocabulary.unit
        settings = EvalSettings().filled(config.eval)
        model = settings.model(model)
        # Cut as `evaluate` cuts it by default, so that the two numbers compare.
        self._plan = cut_rows_for(
            model,
            len(self._tokens),
            batch_size=settings.batch_size,
            segment_length=settings.segment_length,
        )
        objective = objectives.build(config.train, model)
        self._evaluator = Evaluator.of(model, self._plan, mesh, objective)

    def compile(self, params) -> None:
        """Compiles before training starts: later a signal would have to wait for it."""
        self._evaluator.compile(params)

    def loss(self, params, interrupted, *, step: int = 0) -> float | None:
        """Nats per token; None as soon as interrupted() is true between two calls.

        step: of the training, for schedules inside the model.
        """
        score = self._evaluator.score(
            params,
            self._tokens,
            self._plan,
            documents=self._documents,
            step=step,
            progress=lambda _: interrupted(),
        )
        return None if score is None else score.nats / score.targets

    def score(self, nats: float) -> tuple[str, float]:
        """The name of the number that people compare, and it; see results.headline."""
        return results.headline(nats, self._unit)
