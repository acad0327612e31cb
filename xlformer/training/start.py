"""Weights that a new run starts from: --init_from=DIR[:best|latest|average:N|STEP].

Of DIR, a work directory of train or of convert, come the parameters, config.model and
the vocabulary. The optimizer, the step and the place in the text are new.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from xlformer import config as config_lib
from xlformer import models, runs, storage
from xlformer.data import shards
from xlformer.data.prepared import Prepared
from xlformer.data.vocabulary import Vocabulary
from xlformer.errors import Argument, UserError
from xlformer.fields import UNSAID
from xlformer.models.parameters import abstract_params
from xlformer.runs import leaves, resume
from xlformer.runs.checkpoints import Checkpoints


@dataclasses.dataclass(frozen=True)
class Source:
    """Names the checkpoint of a run whose weights another run starts from.

    Attributes:
      name: as the person wrote it.
      workdir: a work directory.
      checkpoint: best, latest, average:N or a step.
    """

    name: str
    workdir: str
    checkpoint: str

    @classmethod
    def parse(cls, name: str, own_workdir) -> Source:
        """'DIR' is DIR:best; a suffix is one only if it names a checkpoint."""
        # From the right, because a path may have colons, as gs://bucket/run has.
        workdir, colon, which = name.rpartition(":")
        # Of a folder that is called so, :best or another suffix tells it.
        if workdir.endswith(":average"):
            workdir, which = workdir.removesuffix(":average"), f"average:{which}"
        if not colon or not runs.is_checkpoint(which):
            # What stands before the colon is a run, so the rest is a typo and no name.
            if workdir and (storage.path(workdir) / runs.CONFIG).exists():
                raise UserError(
                    Argument("init_from", name),
                    f": after {workdir}: stands best, latest, average:N or a step, not "
                    f"{which!r}",
                )
            workdir, which = name, "best"
        if not workdir:
            raise UserError(Argument("init_from", name), " names no directory")
        # One directory may have many names: links and .. are followed where the file
        # system is local.
        here, own = storage.path(workdir), storage.path(own_workdir)
        same = os.fspath(here) == os.fspath(own)
        if not same and not storage.is_remote(here) and not storage.is_remote(own):
            same = os.path.realpath(here) == os.path.realpath(own)
        if same:
            raise UserError(
                Argument("init_from", name),
                " is ",
                Argument("workdir"),
                " itself: without ",
                Argument("init_from"),
                " it goes on; to start anew from its weights name another ",
                Argument("workdir"),
            )
        return cls(name, workdir, which)

    def config(self) -> ConfigDict:
        """What the weights were trained with."""
        with self._named():
            return runs.read_sealed(self.workdir, self.checkpoint)

    def vocabulary(self) -> Vocabulary:
        """What their ids mean."""
        with self._named():
            return runs.read_vocabulary(self.workdir, self.checkpoint)

    def load(
        self, mesh: jax.sharding.Mesh, model: models.Model | None = None
    ) -> runs.Run:
        """model: needed where the weights are those of a model of one's own."""
        is_own = self.config().own_model not in ("", UNSAID)
        own = {"model": model} if is_own else {}
        with self._named():
            return runs.load(self.workdir, checkpoint=self.checkpoint, mesh=mesh, **own)

    @contextlib.contextmanager
    def _named(self):
        """Errors of reading a run name the argument that this one was given by."""
        named = Argument("init_from", self.name)
        try:
            yield
        except OSError as error:
            raise UserError(named, f": {error}") from error
        except UserError as error:
            first, *rest = error.parts
            own = isinstance(first, Argument) and first.name == "workdir"
            parts = rest if own else (": ", *error.parts)
            raise type(error)(named, *parts) from error


def with_model(
    config: ConfigDict, name: str, workdir, overrides: Sequence[str] = ()
) -> ConfigDict:
    """`config` with the model of the weights that --init_from=name means.

    In a work directory that has a checkpoint already it is the model of that, since
    the run goes on from there. overrides 'model.x=v' are applied to it; `from_weights`
    refuses those that ask for other shapes.
    """
    checkpoints = Checkpoints(storage.path(workdir) / runs.CHECKPOINTS, read_only=True)
    found = resume.sealed(workdir, checkpoints)
    if found is None:
        found = Source.parse(name, workdir).config()
    if found.model.name != config.model.name:
        raise UserError(
            Argument("init_from", name),
            f" holds a {found.model.name}, ",
            Argument("config"),
            f" asks for a {config.model.name}",
        )
    config = ConfigDict(config.to_dict())
    config.model, config.init_from = found.model, name
    config.lock()
    # The flags that were applied to the config came before its model was replaced.
    of_model = [override for override in overrides if override.startswith("model.")]
    config_lib.set_fields(config, of_model)
    config_lib.check(config)
    return config


def from_weights(
    create: Callable, config: ConfigDict, model: models.Model, run: runs.Run
) -> Callable:
    """Makes of create(key) -> TrainState one of (key, parameters), those of `run`.

    Raises UserError naming the field of config.model that asks for other shapes.
    """
    wanted = abstract_params(model)
    if leaves.layouts(wanted) != leaves.layouts(run.params):
        raise UserError(
            Argument("init_from", config.init_from),
            ": its weights have other shapes than "
            f"{', '.join(_changed(config, run)) or 'this model'} would give",
        )

    def created(key, params):
        fresh = create(key)
        # Two copies: the state is donated, which would delete the arrays of `run`, and
        # parameters and their average must not share a buffer that is donated once.
        params, ema = (jax.tree.map(_copy, params) for _ in range(2))
        return fresh._replace(params=params, ema=None if fresh.ema is None else ema)

    return created


def with_every_word(config: ConfigDict) -> ConfigDict:
    """`config` for text that is put into the ids of other weights.

    Which of its words they know is theirs to say: a word that stands once in this text
    may be one, so the text's own vocabulary must not have left it out.
    """
    data = config.data
    for name, value, free in (
        ("min_count", data.min_count, (0, 1)),
        ("max_vocab", data.max_vocab, (0,)),
    ):
        if value not in free:
            raise UserError(
                f"config.data.{name}={value} with ",
                Argument("init_from", config.init_from),
                ": the vocabulary is that of its weights",
            )
    config = ConfigDict(config.to_dict())
    config.data.min_count = 1
    config.lock()
    return config


def lines(config: ConfigDict, run: runs.Run, prepared: Prepared) -> list[str]:
    """What a run says that starts from the weights of `run`."""
    averaged = " (their average)" if run.averaged else ""
    steps = f"step {run.step}"
    if run.mean_of:
        steps = f"steps {', '.join(map(str, run.mean_of))}, their mean,"
    first = (
        f"no checkpoint: starting from the parameters of {steps} of "
        f"{config.init_from}{averaged}; all else is fresh"
    )
    said = [first, *(f"{x}: not what they saw" for x in _changed(config, run))]
    tokens, unknown = prepared.tokens["train"], getattr(run.vocabulary, "unk_id", None)
    if unknown is None:
        return said
    found = sum(np.count_nonzero(block == unknown) for block in shards.blocks(tokens))
    if share := found / len(tokens):
        said.append(f"{share:.1%} of the training tokens are <unk> in its vocabulary")
    return said


def _changed(config: ConfigDict, run: runs.Run) -> list[str]:
    """'config.model.x=1 (2 there)' for what differs from how they were trained."""
    found = resume.differences(run.config, config)
    return [line for line in found if line.startswith("config.model.")]


def _copy(x: jax.Array) -> jax.Array:
    return jnp.array(x, copy=True)
