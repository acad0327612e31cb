"""Runs that were never trained, and requests, for tests of the harness."""

import dataclasses
import functools
import pathlib

import counted
import trained_run

from xlformer import config as config_lib
from xlformer import models, runs
from xlformer.data.vocabulary import WordVocabulary

LINE = "the cat sat on a mat; the naïve dog\n"
CHARS = counted.chars([LINE.encode()])
WORDS = WordVocabulary(["<eos>", "<unk>", *dict.fromkeys(LINE.split())], [0] * 10)
SEGMENT, MEMORY = 5, 11
SIZES = dict(n_layer=2, d_model=14, n_head=2, d_head=7, d_inner=23, dropout=0.0)


@dataclasses.dataclass
class Request:
    """What lm_eval.api.instance.Instance has that is used."""

    args: tuple
    task_name: str | None = None
    doc_id: int | None = None


def requests(*found):
    return [Request(args) for args in found]


@functools.cache
def run(vocabulary=CHARS, name="transformer_xl", rows=3, **fields):
    """Its weights are so large that what is far back matters."""
    given = SIZES | {"memory_length": MEMORY, "scan_layers": True} | fields
    if name != "transformer_xl":
        given = fields
    config = config_lib.default_config(name, **given)
    config.eval.update(segment_length=SEGMENT, batch_size=rows)
    model = models.build(config.model, vocab_size=vocabulary.size)
    params = trained_run.random_params(model)
    return runs.Run(pathlib.Path("run"), config, model, params, vocabulary, 7, False)
