"""What lm-evaluation-harness asks of a model, answered by a run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from xlformer import __version__, runs, sharding
from xlformer.errors import Argument, UserError, did_you_mean
from xlformer.generation.continuation import Continuation
from xlformer.harness import continuations
from xlformer.harness.likelihoods import Likelihoods
from xlformer.harness.texts import Text, Texts
from xlformer.models import parameters
from xlformer.progress import Progress
from xlformer.scoring import EvalSettings

# Of EvalSettings, what says how a text is read, and which weights read it.
OF_READING = ("segment_length", "memory_length", "clamp_length", "same_length")
OF_READING += ("stride", "batch_size", "checkpoint", "params")
OWN = ("prefix", "seed", "max_gen_toks")
ARGUMENTS = ("workdir", *OF_READING, *OWN)


class Answerer:
    """A run that says how probable texts are, and continues them.

    A request is any object with `args`, as lm_eval.api.instance.Instance has them; its
    task_name and doc_id are named in errors. All requests are encoded before the first
    is answered.

    Args:
      run: of `runs.load`.
      settings: how texts are read; what is None is the run's own, as in `evaluate`. A
        model without memory reads with a window that slides by half of itself, where it
        can and no stride is given.
      mesh: shares the rows; by default all devices. run.params lie on it.
      prefix: whether a text follows the end of a line; else its first token is not
        scored, as evaluate does not score it.
      seed: of generated texts that are not greedy.
      max_gen_toks: tokens to generate where a task does not say.
    """

    def __init__(
        self,
        run: runs.Run,
        settings: EvalSettings | None = None,
        *,
        mesh: jax.sharding.Mesh | None = None,
        prefix: bool = True,
        seed: int = 0,
        max_gen_toks: int = 256,
    ):
        if not run.model.causal:
            raise UserError(
                f"{type(run.model).__name__} sees what comes after a token "
                "(causal=False): it has no likelihood of a text"
            )
        _check(prefix=prefix, seed=seed, max_gen_toks=max_gen_toks)
        self._run, self._mesh = run, mesh or sharding.make_mesh({"data": -1})
        self._seed, self._most = seed, max_gen_toks
        self.settings = _filled(settings or EvalSettings(), run)
        self._model = self.settings.model(run.model)
        self.texts = Texts(run.vocabulary, prefix)
        self._likelihoods = Likelihoods(
            self._model,
            run.params,
            segment_length=self.settings.scored_length,
            batch_size=self.settings.batch_size,
            step=run.step,
            mesh=self._mesh,
        )

    @classmethod
    def open(cls, **arguments) -> Answerer:
        """Reads a run, by what --model_args says: ARGUMENTS, by name.

        batch_size may be 'auto', which is the run's own.
        """
        for name, value in arguments.items():
            if name not in ARGUMENTS:
                near = did_you_mean(name, ARGUMENTS)
                raise UserError(f"model_args: no argument {name}={value}{near}")
        if arguments.get("workdir") in (None, ""):
            raise UserError("model_args has no workdir: give workdir=DIR")
        given = {name: x for name, x in arguments.items() if x is not None}
        given["batch_size"] = _rows(given.get("batch_size"))
        settings = {name: given[name] for name in OF_READING if name in given}
        settings, mesh = EvalSettings(**settings), sharding.make_mesh({"data": -1})
        run = runs.load(
            str(given["workdir"]),
            checkpoint=settings.checkpoint,
            params=settings.params,
            mesh=mesh,
        )
        own = {name: given[name] for name in OWN if name in given}
        return cls(run, settings, mesh=mesh, **own)

    def info(self) -> dict:
        """How texts are read, for the results."""
        run = self._run
        return {
            "xlformer": __version__,
            "run": run.config.name,
            "step": run.step,
            "params": "ema" if run.averaged else "raw",
            "model_num_parameters": parameters.count(run.params),
            "vocabulary": f"{run.vocabulary.size} {run.vocabulary.unit}",
            "prefix_token_ids": self.texts.prefix.tolist(),
            "segment_length": self.settings.segment_length,
            "stride": self.settings.stride or 0,
            "batch_rows": self.settings.batch_size,
            **self._model.card(),
        }

    def tok_encode(self, text: str) -> list[int]:
        """The ids of a text, without the prefix."""
        return self.texts.encode(text, "text").tolist()

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p in nats, and whether it is greedy."""
        texts = [
            self.texts.pair(*request.args, _where(request, i))
            for i, request in enumerate(requests)
        ]
        found = self._scored(texts, greedy=True)
        return [(-one.nats, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p of each (document,), the memory carried through all of it."""
        texts = [
            self.texts.document(*request.args, _where(request, i))
            for i, request in enumerate(requests)
        ]
        return [-one.nats for one in self._scored(texts, greedy=False)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What follows each (context, how), up to a text that ends it."""
        prompts, wanted = [], []
        for i, request in enumerate(requests):
            where, (context, how) = _where(request, i), request.args
            prompts.append(self.texts.prompt(context, where))
            wanted.append(continuations.Wanted.of(how, self._most, where))
        # A window that slides reads for scoring; generation has its own.
        reading = dataclasses.replace(self.settings, stride=None)
        start = functools.partial(
            Continuation,
            reading.model(self._run.model),
            self._run.params,
            mesh=self._mesh,
            step=self._run.step,
        )
        return continuations.continued(
            start,
            self._run.vocabulary,
            prompts,
            wanted,
            rows=self.settings.batch_size,
            seed=self._seed,
            progress=_progress("generating"),
        )

    def _scored(self, texts: list[Text], *, greedy: bool):
        return self._likelihoods.of(texts, greedy=greedy, progress=_progress("scoring"))


def _progress(what: str) -> Callable[[float], bool]:
    progress = Progress(what)
    progress(0.0)
    return progress


def _where(request, number: int) -> str:
    """What a request is called in errors."""
    task, document = (getattr(request, n, None) for n in ("task_name", "doc_id"))
    if task is None:
        return f"request {number}"
    return f"task {task}, document {document}"


def _filled(settings: EvalSettings, run: runs.Run) -> EvalSettings:
    stride, settings = settings.stride, settings.filled(run.config.eval)
    if stride is not None:
        return settings
    model = settings.model(run.model)
    # Else a continuation that begins a segment would know nothing of its context.
    slides = hasattr(model.config, "extended_length") and model.resets_in_segment
    if model.memory_length != 0 or model.extended_length or not slides:
        return settings
    half = max(1, settings.segment_length // 2)
    return dataclasses.replace(settings, stride=half)


def _rows(given) -> int | None:
    """Rows by what --batch_size may be: a number, as text too, auto or auto:N."""
    if given is None or str(given).partition(":")[0] == "auto":
        return None
    if not str(given).isdecimal() or int(given) < 1:
        line = " is neither a number from 1 on nor auto"
        raise UserError(Argument("batch_size", given), line)
    return int(given)


def _check(*, prefix, seed, max_gen_toks) -> None:
    if not isinstance(prefix, bool):
        raise UserError(Argument("prefix", prefix), " is neither true nor false")
    # A key of JAX has 32 bits of the seed.
    if not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        line = f" must be a whole number from 0 to {(1 << 32) - 1}"
        raise UserError(Argument("seed", seed), line)
    if not isinstance(max_gen_toks, int) or max_gen_toks < 1:
        line = " must be a whole number from 1 on"
        raise UserError(Argument("max_gen_toks", max_gen_toks), line)
