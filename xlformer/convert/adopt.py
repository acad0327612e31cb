"""Makes a work directory of other programs' weights, to be read like any run's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from xlformer import config as config_lib
from xlformer import models, runs, storage, strangers
from xlformer.convert import place, tensorflow_vocabulary, vocab
from xlformer.data import preparing, vocabularies
from xlformer.data.vocabulary import CharVocabulary, Vocabulary, WordVocabulary
from xlformer.errors import Argument, UserError
from xlformer.models.parameters import abstract_params
from xlformer.runs import leaves
from xlformer.runs.checkpoints import Checkpoints

VOCAB_HELP = (
    "vocabulary.json, the TensorFlow original's cache.pkl, or a symbol a line: words "
    "with <eos>, byte values, or characters"
)


def adopt(
    model_config,
    params,
    workdir,
    *,
    vocabulary=None,
    segment_length=64,
    overrides=(),
    step=0,
    base=None,
):
    """Writes config.json, vocabulary.json and one checkpoint, in float32.

    Args:
      model_config, params: of any model that has a name, as the readers of this package
        return them.
      workdir: new or empty.
      vocabulary: symbols in the order of the weights' ids; None leaves it to the data.
      segment_length: of training and evaluation.
      overrides: 'a.b=v' of the written config, such as data.corpus=wikitext103.
      step: of the training that made the weights.
      base: a config to start from, whose segment length stays; None has the defaults.
    """
    # Parameters are kept in float32 here, whatever precision a file had.
    with np.errstate(over="ignore"):
        params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    _check_finite(params)
    if base is None:
        base = _fresh(model_config, segment_length)
    config = _config(base, model_config, params, overrides)
    _check_size(config, vocabulary, model_config.vocab_size)
    # With what a checkpoint takes beside its numbers.
    size = (1 << 20) + sum(x.nbytes for x in jax.tree.leaves(params)) * 11 // 10
    with _new_directory(workdir, size) as folder:
        with Checkpoints(folder / runs.CHECKPOINTS) as checkpoints:
            tree = {"params": params}
            checkpoints.save(step, tree, config=config_lib.to_dict(config))
        if vocabulary is not None:
            storage.write(folder / runs.VOCABULARY, vocabulary.to_json())
        storage.write(folder / runs.CONFIG, config_lib.to_json(config))


def _check_finite(params) -> None:
    """Raises UserError where a weight is no number, which no score says so well."""
    for name, x in leaves.flatten(params).items():
        if bad := int(np.sum(~np.isfinite(x))):
            raise UserError(
                f"the weights of {name} are no numbers of float32: {bad} of {x.size} "
                "are nan or infinite"
            )


def _fresh(model_config, segment_length: int):
    config = config_lib.default_config(models.name_of(model_config))
    config.name = "converted"
    config.data.corpus = "text"
    # The weights say which words there are: none is left out for being rare.
    config.data.min_count = 1
    config.train.segment_length = config.eval.segment_length = segment_length
    return config


def _config(base, model_config, params, overrides):
    fields = dataclasses.asdict(model_config)
    model = models.default_config(models.name_of(model_config), **fields)
    config = ConfigDict({**base.to_dict(), "model": model})
    config_lib.set_fields(config, overrides)
    config_lib.check(config)
    # Overrides may change what the model does, not its parameters.
    expected = abstract_params(models.build(config.model))
    if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, expected):
        raise UserError(
            Argument("config.model"),
            f" overrides ({', '.join(overrides)}) ask for another shape than the "
            "weights have",
        )
    return config


def _check_size(config, vocabulary, vocab_size) -> None:
    """Raises UserError where there are more ids than weights, or fewer."""
    name: str | Argument = Argument("vocab")
    if vocabulary is None:
        if not runs.names_data(config):
            return
        vocabulary, name = preparing.prepare(config.data).vocabulary, "the data"
    # The mask of a masked model is no symbol.
    if config_lib.vocab_size(config, vocabulary.size) != vocab_size:
        raise UserError(
            name, f" has {vocabulary.size} symbols, the weights have {vocab_size}"
        )


def check_new(workdir) -> None:
    """Raises UserError where a directory is not empty or cannot be made."""
    if not storage.is_remote(workdir):
        place.check(workdir, "workdir")
    elif storage.path(workdir).exists() and any(storage.path(workdir).iterdir()):
        line = " is not empty; name a new directory"
        raise UserError(Argument("workdir", workdir), line)


@contextlib.contextmanager
def _new_directory(workdir, size: int) -> Iterator[epath.Path]:
    if storage.is_remote(workdir):
        check_new(workdir)
        # The config comes last, and without it there is no run.
        storage.make_folder(storage.path(workdir), "workdir")
        yield storage.path(workdir)
        return
    # Orbax prints pages of traces where it finds the disk full.
    elsewhere = "name a directory on another disk"
    storage.check_room(workdir, size, "the weights", elsewhere)
    with place.whole(workdir, "workdir") as folder:
        yield epath.Path(folder)


def read_vocabulary(path: str) -> Vocabulary:
    """Reads our JSON, the TensorFlow original's cache.pkl, or a list of symbols.

    A list is a text file with one symbol a line in the order of their ids.

    With `<eos>` among them the symbols are words. Different numbers below 256 are bytes
    (the original's enwik8), unless all of them are of one digit; all else are single
    characters.
    """
    if path.endswith(".json"):
        return vocabularies.load(path)
    if path.endswith(".pkl"):
        return tensorflow_vocabulary.read(path)
    try:
        # Not splitlines(), which also cuts at characters that may be symbols, such as
        # U+2028.
        symbols = strangers.read(path).decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(
            Argument("vocab", path), f": cannot be read: {error}"
        ) from error
    # The last line's own end.
    symbols = symbols[:-1] if symbols[-1] == "" else symbols
    # A list of symbols says nothing of how often they occur.
    counts = [0] * len(symbols)
    try:
        if values := vocab.byte_values(symbols):
            return vocab.of_bytes(values, counts)
        if "<eos>" in symbols:
            return WordVocabulary(symbols, counts)
        return CharVocabulary(symbols, counts)
    except ValueError as error:
        raise UserError(
            Argument("vocab", path),
            f": not a list of symbols: {error}; a line each: words with <eos> among "
            "them, byte values (0 to 255), or single characters",
        ) from error
