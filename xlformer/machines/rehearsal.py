"""What a training step needs of its data, without them: to compile it, to time it."""

from __future__ import annotations

import numpy as np

from xlformer import config as config_lib
from xlformer import storage
from xlformer.data.stream import Stream
from xlformer.errors import Argument, UserError
from xlformer.models import Model


def vocab_size(spec: str, config) -> int:
    """What the config says, or its file in VOCAB_SIZE, or the data.

    Data is looked at only in a config.data.directory that exists, as training would.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    found = getattr(config_lib.module(spec.partition(":")[0]), "VOCAB_SIZE", None)
    # VOCAB_SIZE is of the corpus as its field counts it.
    if found and not config.data.tokenizer and config.data.unit == "bytes":
        return config_lib.vocab_size(config, found)
    directory = config.data.directory
    if directory and storage.path(directory).exists():
        # Here and not above: it imports what reads texts, which only this case needs.
        from xlformer.data import preparing

        symbols = preparing.prepare(config.data).vocabulary.size
        return config_lib.vocab_size(config, symbols)
    raise UserError(
        Argument("config", spec),
        ": the size of the vocabulary comes from the data: pass ",
        Argument("config.model.vocab_size"),
        ", or ",
        Argument("config.data.directory"),
        " with it prepared",
    )


def batch(config, model: Model) -> dict:
    """One batch as training has it: the first of a text of zeros."""
    train = config.train
    longest = train.segment_length + model.extended_length
    return Stream(
        # Two segments a row, so that variable lengths have room for their longest.
        np.zeros(train.batch_size * (2 * longest + 2), np.int32),
        batch_size=train.batch_size,
        segment_length=train.segment_length,
        extended_length=model.extended_length,
        documents=np.zeros(1, np.int64) if config.data.documents else None,
        variable_length=train.variable_length,
        seed=config.seed,
    ).at(0)
