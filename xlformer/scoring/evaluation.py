"""Scores a run's text: the card says what was measured, how, and with which result."""

from __future__ import annotations

import importlib.metadata
import platform
import time

import jax

from xlformer import __version__, models, runs, sharding
from xlformer.data import preparing, shards
from xlformer.errors import UserError
from xlformer.models import parameters
from xlformer.scoring import dynamic, results, rows, texts, units
from xlformer.scoring.evaluator import Evaluator
from xlformer.scoring.rows import Plan, cut_rows_for
from xlformer.scoring.settings import EvalSettings
from xlformer.training import objectives

SOFTWARE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def evaluate(
    workdir,
    settings: EvalSettings | None = None,
    *,
    model: models.Model | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress=None,
    **fields,
) -> dict:
    """Returns the card: what was scored, how, and with which result.

    Args:
      workdir: of a run.
      settings: how; by default as config.eval of the run says.
      model: one's own, where the run was trained with one.
      mesh: shares the rows; by default it is all devices.
      progress: called with the fraction done; true gives up.
      fields: of the settings, by name: evaluate(workdir, split="test").

    Raises:
      UserError: no such run, checkpoint, text or setting.
    """
    settings = (settings or EvalSettings()).replaced(**fields)
    mesh = mesh or sharding.make_mesh({"data": -1}, rows=settings.learning_rows)
    run = runs.load(
        workdir,
        checkpoint=settings.checkpoint,
        params=settings.params,
        mesh=mesh,
        model=model,
    )
    return Scorer(settings, mesh).card(run, progress)


class Scorer:
    """Scores the checkpoints of a run in one way; all share what was compiled once."""

    def __init__(self, settings: EvalSettings, mesh: jax.sharding.Mesh):
        self._given, self._mesh = settings, mesh
        self._prepared_for = None

    def card(self, run: runs.Run, progress=None) -> dict:
        """The card of one checkpoint; see `evaluate`."""
        # Checkpoints of one run agree in both, unless it was resumed with changes.
        if self._prepared_for != (run.model, run.config):
            self._prepare(run)
            self._prepared_for = run.model, run.config
        params, learning = run.params, {}
        if self._settings.dynamic:
            # Which part of the segments that is in all; sgd looks at none of them.
            more = self._settings.dynamic_segments or 0
            share = more / (more + self._plan.steps)
            params, learning = dynamic.given(
                self._settings,
                run,
                self._model,
                self._plan,
                self._mesh,
                _within(progress, 0, share),
            )
            progress = _within(progress, share, 1)
        self._evaluator.compile(params)  # whose time is not the model's
        tally = results.Tally()
        score = self._evaluator.score(
            params,
            self._tokens,
            self._plan,
            documents=self._documents,
            step=run.step,
            progress=progress,
            tally=tally,
        )
        if score is None:
            raise UserError("the evaluation was given up")
        card = {
            **_of_run(run),
            **self._data,
            **self._how(run),
            **learning,
            **_of_objective(run, self._objective),
            **tally.results(*self._count(run)),
            "seconds": round(score.seconds, 3),
            "tokens_per_s": round(score.targets / score.seconds, 1),
            **machine(self._mesh),
        }
        if "record" in self._data:  # Images, which have no words.
            card["bits_per_dim"] = card["bits_per_byte"]
            card |= {"words_scored": None, "word_ppl": None}
        entropy = results.unigram_entropy(self._tokens, run.vocabulary.size)
        if wrong := results.warning(card, entropy):
            card["warning"] = wrong
        # Rows of such a model start without the past that one row would carry, and no
        # warm-up can bring all of it.
        if self._model.memory_length is None:
            card["note"] = "unlimited reach: equal only for an equal number of rows"
        return card

    def _prepare(self, run: runs.Run) -> None:
        """Reads the text and cuts it into rows."""
        self._settings = settings = self._given.filled(run.config.eval)
        self._model = settings.model(run.model)
        self._everything, self._documents, self._data = texts.read(
            run, settings.split or "validation", settings.text, settings.text_path
        )
        # All tokens are kept beside those that are scored: what words and bytes these
        # stand for is known only by comparing the whole split with its card.
        self._tokens = shards.head(
            self._everything, settings.max_tokens or len(self._everything)
        )
        self._plan = cut_rows_for(
            self._model,
            len(self._tokens),
            batch_size=settings.batch_size,
            segment_length=settings.scored_length,
            warmup=settings.warmup,
        )
        self._chosen = None
        # One CPU device gains a fifth by it, and two have no more to gain. Elsewhere it
        # was not measured.
        alone = self._mesh.size == 1 and self._mesh.devices.flat[0].platform == "cpu"
        asked = settings.stride or settings.dynamic
        if alone and self._given.segment_length is None and not asked:
            own = self._plan.segment_length
            self._plan = rows.faster(
                self._plan,
                self._model,
                len(self._tokens),
                batch_size=settings.batch_size,
            )
            if self._plan.segment_length != own:
                self._chosen = f"for speed: no token sees more than with {own}"
        self._objective = objectives.build(run.config.train, self._model)
        kind = Evaluator
        if settings.dynamic:
            dynamic.check(settings, run, self._model, self._objective)
            kind = dynamic.Dynamic
        self._evaluator = kind.of(self._model, self._plan, self._mesh, self._objective)

    def _how(self, run: runs.Run) -> dict:
        """The lengths and the precision with which the text was read."""
        dtype = self._model.dtype(run.params)
        return {
            "segment_length": self._plan.segment_length,
            **({"segment_chosen": self._chosen} if self._chosen else {}),
            **self._model.card(),
            **_of_window(self._settings, self._plan),
            "batch_rows": len(self._plan.start_B),
            "warmup": self._plan.warmup,
            "documents": self._documents is not None,
            "dtype": None if dtype is None else dtype.name,
        }

    def _count(self, run: runs.Run) -> units.Count:
        """Bytes and words that the scored tokens stand for; unknown of hidden ones."""
        if not self._objective.causal:
            return units.Count(None, None)
        return units.scored(
            run.vocabulary,
            self._everything,
            _spans(self._plan),
            units.Count(self._data["bytes"], self._data["words"]),
            lines=preparing.OF_LINES in self._data["words_are"],
            documents=self._documents,
        )


def _within(progress, start: float, stop: float):
    """The progress of what takes from `start` to `stop` of the whole."""
    if progress is None:
        return None
    return lambda fraction: progress(start + fraction * (stop - start))


def _of_window(settings: EvalSettings, plan: Plan) -> dict:
    """What a window that slides reads, and what that costs."""
    if not settings.stride:
        return {}
    # Those, too, with which a row begins only to have what it would have seen.
    windows = plan.steps * len(plan.start_B)
    read = windows * settings.segment_length
    return {
        "segment_length": settings.segment_length,
        "stride": settings.stride,
        "windows": windows,
        "tokens_read_per_target": round(read / plan.targets, 2),
    }


def _spans(plan: Plan) -> list[tuple[int, int]]:
    """[start, stop) of the tokens that are scored: each target follows its input."""
    pairs = zip(plan.first_B, plan.last_B, strict=True)
    return [(int(first) + 1, int(last) + 1) for first, last in pairs]


def _of_run(run: runs.Run) -> dict:
    return {
        "run": run.config.name,
        "workdir": str(run.workdir),
        "step": run.step,
        **({"steps_averaged": [*run.mean_of]} if run.mean_of else {}),
        "params": "ema" if run.averaged else "raw",
        "parameters": parameters.count(run.params),
        "seed": run.config.seed,
    }


def _of_objective(run: runs.Run, objective) -> dict:
    """Which tokens were hidden, where some were."""
    if objective.causal:
        return {}
    train = run.config.train
    return {
        "objective": train.objective,
        "mask_rate": train.mask_rate,
        "mask_seed": objectives.EVALUATION_SEED,
    }


def machine(mesh: jax.sharding.Mesh) -> dict:
    """On what something was measured: devices, versions, the day."""
    device = mesh.devices.flat[0]
    return {
        "device": f"{device.device_kind} x{mesh.size}",
        "python": platform.python_version(),
        "xlformer": __version__,  # What runs; an old checkout may be what is installed.
        **{name: _version(name) for name in SOFTWARE},
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # Run from its source.
        return "not installed"
