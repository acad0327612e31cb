"""Directories that the original programs load: their names, their settings.

    write_original("out", config, params, vocabulary)
    write_hf("out", config, params, vocabulary)

python -m xlformer.export calls these for a run. A model that the program would compute
otherwise, or not at all, is refused before anything is written; and what is written
appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import numpy as np

from xlformer import models, runs
from xlformer.convert import hparams as hparams_lib
from xlformer.convert import hugging_face, place, transformer_xl
from xlformer.convert.awd_lstm import RATES, to_awd_lstm
from xlformer.convert.files import widened, write_safetensors
from xlformer.convert.sha_rnn import FIELDS, to_sha_rnn
from xlformer.data.vocabulary import Vocabulary, WordVocabulary
from xlformer.errors import UserError
from xlformer.layers.attention import RELATIVE, SINUSOID
from xlformer.models import LSTMConfig, SHARNNConfig, TransformerXLConfig

HPARAMS, STATE = "hparams.json", "model.pt"


def write_original(
    out: str | os.PathLike,
    model_config,
    params,
    vocabulary: Vocabulary | None = None,
    *,
    segment_length: int = 64,
) -> None:
    """Writes what the original PyTorch program of a model loads strictly.

    model.pt is a state dict, as torch.save writes it; hparams.json has the program's
    arguments; vocabulary.json is ours, where one is given. `python -m xlformer.convert`
    reads them back bit by bit.

    Args:
      out: a new or an empty directory.
      model_config, params: of a Transformer-XL, an LSTM (AWD-LSTM) or a SHA-RNN.
      vocabulary: symbols in the order of the weights' ids.
      segment_length: tgt_len or bptt of the arguments.

    Raises:
      UserError: another model, one that the program lacks, no torch, or a directory
        that is not empty or cannot be written.
    """
    state, hparams = of_program(model_config, params, segment_length)
    files = {HPARAMS: _json(hparams), **_vocabulary(vocabulary, model_config)}
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{out}: pip install torch to write {STATE}") from error
    with place.whole(out, errors=Exception) as folder:
        torch.save(_tensors(state), folder / STATE)
        _write(folder, files)


def write_hf(
    out: str | os.PathLike,
    model_config,
    params,
    vocabulary: Vocabulary | None = None,
    *,
    segment_length: int = 64,
) -> None:
    """Writes what Hugging Face's TransfoXLLMHeadModel.from_pretrained reads.

    model.safetensors and config.json are as save_pretrained writes them, and
    vocabulary.json is ours. For TransfoXLTokenizer there are vocab.txt and
    tokenizer_config.json where the vocabulary is of words with an unknown one among
    them; vocab.pkl, which its save_pretrained writes, is a pickle and is not written,
    and neither is generation_config.json, which its model does without.

    Args and raises: as write_original; but needs safetensors, not torch, and takes a
    Transformer-XL alone. segment_length is nothing that its files say.
    """
    del segment_length
    if not isinstance(model_config, TransformerXLConfig):
        name = models.name_of(model_config)
        line = f"{hugging_face.PROGRAM} is a Transformer-XL"
        raise UserError(f"config.model.name={name!r}: {line}")
    eos = getattr(vocabulary, "eos_id", 0)
    settings, arrays = hugging_face.to_hf(model_config, params, eos_token_id=eos)
    files = {hugging_face.CONFIG: _json(settings)}
    files |= _vocabulary(vocabulary, model_config)
    if isinstance(vocabulary, WordVocabulary) and vocabulary.unk_id is not None:
        files["vocab.txt"] = "".join(f"{symbol}\n" for symbol in vocabulary.symbols)
        files["tokenizer_config.json"] = _json(_tokenizer(vocabulary))
    with place.whole(out, errors=Exception) as folder:
        path = folder / hugging_face.WEIGHTS
        write_safetensors(path, arrays, {"format": "pt"})
        _write(folder, files)


def _tokenizer(vocabulary: WordVocabulary) -> dict[str, Any]:
    return {
        "eos_token": vocabulary.eos,
        "lower_case": vocabulary.lower,
        "tokenizer_class": "TransfoXLTokenizer",
        "unk_token": vocabulary.unknown,
    }


def of_program(
    config, params, segment_length: int = 64
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The state dict and the arguments of a model's original PyTorch program.

    Raises UserError for a model that the program lacks.
    """
    if isinstance(config, TransformerXLConfig):
        hparams = hparams_lib.of_config(config, segment_length)
        state = transformer_xl.to_original(config, params)
        if config.attn_type in (RELATIVE, SINUSOID):
            dtype = np.result_type(*state.values())
            frequencies = transformer_xl.frequencies(config.d_model, dtype)
            state["pos_emb.inv_freq"] = frequencies
        return state, hparams
    if isinstance(config, LSTMConfig):
        return _awd_lstm(config, params, segment_length)
    if isinstance(config, SHARNNConfig):
        return _sha_rnn(config, params, segment_length)
    line = "there is no original of it; transformer_xl, lstm and sha_rnn have one"
    raise UserError(f"config.model.name={models.name_of(config)!r}: {line}")


def _awd_lstm(config: LSTMConfig, params, segment_length: int):
    untied = not config.tie_weights and config.d_model != config.d_hidden
    if config.cutoffs and untied:
        raise UserError(
            f"config.model.cutoffs={config.cutoffs} with tie_weights=False and d_model="
            f"{config.d_model}: AWD-LSTM has tails then only where d_hidden="
            f"{config.d_hidden} is the same"
        )
    state = to_awd_lstm(config, params)
    if config.weight_dropout:
        # Its WeightDrop wraps a layer, and keeps what it drops from under another name.
        state = {_dropped(name): x for name, x in state.items()}
    return state, {
        "n_token": config.vocab_size,
        "ninp": config.d_model,
        "nhid": config.d_hidden if config.n_layer > 1 else config.widths[-1],
        "n_layer": config.n_layer,
        "tied": config.tie_weights,
        "splits": list(config.cutoffs),
        "bptt": segment_length,
        **{theirs: getattr(config, ours) for theirs, ours in RATES.items()},
    }


def _dropped(name: str) -> str:
    if not name.startswith("rnns."):
        return name
    rnns, layer, part = name.split(".")
    raw = "_raw" if part == "weight_hh_l0" else ""
    return f"{rnns}.{layer}.module.{part}{raw}"


def _sha_rnn(config: SHARNNConfig, params, segment_length: int):
    # It has attention in the block before the last, where there is one.
    only = "second_last" if config.n_layer > 1 else "none"
    hparams_lib.require(config, "SHA-RNN", attention=only, window=None)
    hparams = {
        "n_token": config.vocab_size,
        "emsize": config.d_model,
        "nhid": config.d_inner,
        "nlayers": config.n_layer,
        "bptt": segment_length,
        **{theirs: getattr(config, ours) for theirs, ours in FIELDS.items()},
    }
    if config.attending:
        # A constant of its text; and what vq_collapse() makes of its model.
        hparams |= {"max_positions": config.memory_length}
        hparams |= {"collapsed": True} if config.collapsed else {}
    return to_sha_rnn(config, params), hparams


def _tensors(state: dict[str, np.ndarray]) -> dict:
    """Tensors of their own; tied arrays become one, which torch.save writes once."""
    import torch

    made: dict[tuple, Any] = {}
    found = {}
    for name, x in state.items():
        where = x.__array_interface__["data"][0], x.shape, x.strides
        if where not in made:
            made[where] = torch.from_numpy(np.array(widened(x), order="C"))
        found[name] = made[where]
    return found


def _vocabulary(vocabulary: Vocabulary | None, config) -> dict[str, str]:
    if vocabulary is None:
        return {}
    if vocabulary.size != config.vocab_size:
        raise UserError(
            f"the vocabulary has {vocabulary.size} symbols, the weights have "
            f"{config.vocab_size}"
        )
    return {runs.VOCABULARY: vocabulary.to_json()}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _write(folder: pathlib.Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
