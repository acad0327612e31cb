"""One tiny trained run of characters, shared by the tests that only read it."""

import contextlib
import functools
import io
import shutil

import jax
import numpy as np

from xlformer import config as config_lib
from xlformer import runs
from xlformer.models.parameters import abstract_params
from xlformer.train import train

TEXT = "the naïve café — déjà vu: 17 ∑ x²\nа б в, 日本\n"  # 1, 2 and 3 bytes
LINES = 61
STEPS = (1, 2)


def make_config(directory, text, **model):
    """Three layers, since exact warm-up differs from fill only with several."""
    sizes = {"n_layer": 3, "d_model": 14, "n_head": 2, "d_head": 8, "d_inner": 29}
    fields = {"memory_length": 7, "untie_r": True, "dropout": 0.0, "init_std": 0.3}
    fields["scan_layers"] = True  # compiles faster
    config = config_lib.default_config("transformer_xl", **sizes, **fields, **model)
    config.name = "tiny"
    config.data.update(corpus="text", path=str(text), unit="chars")
    config.data.directory = str(directory / "prepared")
    config.mesh.data = 1
    config.train.update(steps=STEPS[-1], batch_size=2, segment_length=5, ema_decay=0.7)
    config.train.update(log_every=1, eval_every=1, save_every=1, keep=2)
    config.optimizer.learning_rate = 0.05
    config.eval.update(batch_size=3, segment_length=5, max_tokens=101)
    config.lock()
    return config


def random_params(model):
    """Without compiling; so large that what is far back matters."""
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract_params(model)
    )


@functools.cache
def trained(base):
    """The work directory; treat it as read-only. base: a directory of this session."""
    directory = base / "trained_run"
    directory.mkdir()
    text = directory / "text.txt"
    text.write_text(TEXT * LINES, encoding="utf-8")
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        train(make_config(directory, text), directory / "run")
    return directory / "run"


@functools.cache
def loaded(base):
    """The same, loaded."""
    return runs.load(trained(base))


def copy(base, target):
    """One to damage."""
    shutil.copytree(trained(base), target)
    return target
