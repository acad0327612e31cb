"""The smallest run of every system, as `runs.load` would give it."""

import functools
import importlib.util

import jax
import numpy as np
import trained_run

from xlformer import config as config_lib
from xlformer import models, runs
from xlformer.data.vocabulary import CharVocabulary

VOCABULARY = CharVocabulary("etaoin shrdluйф日\n", range(17, 0, -1))
STEP, T = 7, 5
SMALL = dict(d_model=8, n_head=2, d_inner=11, n_layer=1)
SYSTEMS = {
    "transformer_xl": dict(SMALL, memory_length=7, scan_layers=True),
    "lstm": dict(n_layer=1, d_model=8, d_hidden=11),
    # Two blocks, the last but one of which attends; not collapsed.
    "sha_rnn": dict(n_layer=2, d_model=8, d_inner=16, memory_length=11),
    "universal": dict(SMALL, n_step=2, act="convex", act_max_steps=2),
    "vanilla": dict(SMALL, context_length=13),
    "performer": SMALL,
}


def run_of(name, *, own=None, config=(), **fields):
    """A run with random weights; config: what is set in its sections, as a.b=v."""
    made = config_lib.default_config(name, **SYSTEMS[name] | fields)
    made.name, made.seed = "tiny", 29
    made.data.corpus = "text"
    made.train.segment_length, made.eval.segment_length = 7, T
    config_lib.set_fields(made, config)
    config_lib.check(made)
    size = config_lib.vocab_size(made, VOCABULARY.size)
    model = own or models.build(made.model, vocab_size=size)
    return runs.Run(None, made, model, weights(model), VOCABULARY, STEP, False)


@functools.cache
def weights(model):
    params = trained_run.random_params(model)
    return jax.tree.map(lambda x: np.float32(0.5) * x, params)


def script(folder):
    """run_exported.py of a folder as a module."""
    spec = importlib.util.spec_from_file_location(
        "exported", folder / "run_exported.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
