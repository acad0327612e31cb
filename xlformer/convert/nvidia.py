"""Checkpoints of NVIDIA's Transformer-XL (DeepLearningExamples, PyTorch).

    config, params, hparams, vocabulary = read("checkpoint_best.pt")
    config, params = from_nvidia(state, hparams)

Its names are those of the PyTorch original, but for the softmax:

    crit.out_layers_biases.B       crit.out_layers.B.bias there
    crit.out_layers_weights.B      crit.out_layers.B.weight; untied models alone
    crit.shared_out_projs.B        word_emb.emb_projs.B once more
    crit.out_projs.B               of the bins whose projection is not tied

It computes as the original does, with two differences. With same_length a token sees
mem_len + 1 keys, itself among them, not mem_len: config.window is mem_len then, and
stays where evaluation asks for another memory. And r_emb of attn_type 3 has one axis
for heads and their width.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from xlformer.convert import hparams as hparams_lib
from xlformer.convert import transformer_xl
from xlformer.convert.plain_values import Instance, Pairs
from xlformer.convert.torch_file import TorchFile
from xlformer.convert.vocab import of_vocab
from xlformer.data.vocabulary import Vocabulary
from xlformer.errors import Argument, UserError, about
from xlformer.layers.attention import LEARNED_ABSOLUTE
from xlformer.models import TransformerXLConfig

# The last is what a run goes on from, the best what is scored.
NAMES = ("checkpoint_best.pt", "checkpoint_last.pt")
SETTINGS = (bool, int, float, str, type(None))  # what is none is no setting of ours
RENAMED = (
    (re.compile(r"crit\.out_layers_biases\.(\d{1,9})"), r"crit.out_layers.\1.bias"),
    (re.compile(r"crit\.out_layers_weights\.(\d{1,9})"), r"crit.out_layers.\1.weight"),
)
SHARED = re.compile(r"crit\.shared_out_projs\.(\d{1,9})")
# The objects that its checkpoints hold beside tensors.
ARGUMENTS, VOCAB = "argparse.Namespace", "utils.vocabulary.Vocab"


def read(
    source: str | pathlib.Path,
) -> tuple[TransformerXLConfig, dict, dict, Vocabulary | None]:
    """Reads a checkpoint as its training wrote it, optimizer and all.

    Args:
      source: the file, or the directory with checkpoint_best.pt or, where that is not
        there, checkpoint_last.pt.

    Returns:
      The configuration and the parameters, for models.build(config); the settings that
      the program kept of its model; and the vocabulary, None where it has none of
      symbols (that of GPT-2's pieces is a package of its own).

    Raises:
      UserError: the file is missing, truncated, hostile or another program's.
    """
    state, hparams, vocabulary = load(source)
    with about(Argument("source", source)):
        return *from_nvidia(state, hparams), hparams, vocabulary


def load(
    source: str | pathlib.Path,
) -> tuple[dict[str, np.ndarray], dict, Vocabulary | None]:
    """The model's state dict, its settings and the vocabulary, as `read` finds them."""
    path = pathlib.Path(source)
    if path.is_dir():
        found = [path / name for name in NAMES if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} has no {NAMES[0]} and no {NAMES[1]}")
        path = found[0]
    file = TorchFile(path, (ARGUMENTS, VOCAB))
    try:
        checkpoint = _fields(file.found)
        hparams = {
            name: found
            for name, x in _fields(checkpoint.get("model_config")).items()
            if isinstance(found := list(x) if type(x) is tuple else x, SETTINGS)
            or (
                isinstance(found, list)
                and all(isinstance(y, int | float) for y in found)
            )
        }
        state = checkpoint["model_state"]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path} has no model_config and model_state: not a checkpoint of NVIDIA's "
            "program"
        ) from error
    return file.arrays(state), hparams, _vocabulary(checkpoint.get("vocab"), path)


def _fields(found) -> dict[str, Any]:
    if not isinstance(found, Pairs):
        raise ValueError("no dict")
    return found.fields()


def _vocabulary(found, path) -> Vocabulary | None:
    if not isinstance(found, Instance) or found.name != VOCAB:
        return None
    try:
        fields = found.attributes()
        if "idx2sym" not in fields:
            return None
        if isinstance(counter := fields.get("counter"), Pairs):
            fields["counter"] = counter.fields()
    except ValueError as error:
        raise UserError(f"{path}: vocab: {error}") from error
    return of_vocab(fields, f"{path}: vocab")


def from_nvidia(
    state: Mapping[str, np.ndarray], hparams: Mapping[str, Any]
) -> tuple[TransformerXLConfig, dict]:
    """Reads a state dict of its model.

    Args:
      state: its names to numpy arrays; their dtype is kept.
      hparams: the arguments of its model, which its checkpoints have as model_config.

    Returns:
      The configuration and the parameters, for models.build(config).

    Raises:
      UserError: a name is missing or too many, or a shape does not fit.
    """
    # Told before, not replaced after: without memory our same_length shows nothing.
    window = (hparams.get("mem_len") or 0) if hparams.get("same_length") else None
    config = hparams_lib.to_config(hparams, window=window)
    return config, transformer_xl.read(
        config, _original_names(config, state), reverse_clusters=True
    )


def _original_names(config: TransformerXLConfig, state) -> dict[str, np.ndarray]:
    found = {}
    for name, x in state.items():
        x = np.asarray(x)
        if shared := SHARED.fullmatch(name):
            table = state.get(f"word_emb.emb_projs.{shared[1]}")
            if table is None or not np.array_equal(table, x):
                raise UserError(f"{name} differs from word_emb.emb_projs.{shared[1]}")
            continue
        for pattern, original in RENAMED:
            name = pattern.sub(original, name)
        found[name] = x
    if config.attn_type == LEARNED_ABSOLUTE and np.ndim(found.get("r_emb")) == 3:
        table = found["r_emb"]
        heads = config.n_head, config.head_width
        if table.shape[2] == heads[0] * heads[1]:
            found["r_emb"] = table.reshape(*table.shape[:2], *heads)
    return found
