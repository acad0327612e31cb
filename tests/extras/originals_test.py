"""The original programs load what writing.py writes, strictly, and score the same."""

import json

import numpy as np
import programs
import pytest
import torch
from training_runs import assert_same

from xlformer import convert, models
from xlformer.convert import writing
from xlformer.convert.files import read_state

pytestmark = pytest.mark.filterwarnings("default")
DTYPES = [np.float64, np.float32]
V, LENGTHS = 41, (7, 7, 3)
SIZES = {"vocab_size": V, "n_layer": 2, "d_model": 16, "n_head": 2, "d_head": 6}
SIZES |= {"d_inner": 23, "dropout": 0.1, "attention_dropout": 0.1}
BINS, TIED = {"cutoffs": (11, 23)}, (False, True, True)
TRANSFORMERS = {
    "plain": {"memory_length": 5},
    "same_length": {"memory_length": 11, "same_length": True, "clamp_length": 4},
    "no_memory": {"memory_length": 0},
    "pre_norm": {"memory_length": 6, "pre_norm": True},
    "adaptive": {"memory_length": 5, **BINS},
    "narrow": {"memory_length": 5, "d_embed": 9, **BINS, "tie_projections": TIED},
    "untied": {"memory_length": 5, "d_embed": 9, **BINS, "tie_weights": False},
    "div": {"memory_length": 5, "div_val": 2, **BINS, "tie_projections": TIED},
    "div_untied": {"memory_length": 5, "div_val": 2, **BINS, "tie_weights": False},
    "learned": {"memory_length": 5, "attn_type": 1, "table_length": 12},
    "sinusoid": {"memory_length": 0, "attn_type": 2},
    "sinusoid_pre": {"memory_length": 0, "attn_type": 2, "pre_norm": True}
    | {"norm_queries": False},
    "absolute": {"memory_length": 0, "attn_type": 3, "table_length": 7, "d_head": 8},
}


def written(tmp_path, config, dtype, convert_back):
    """The folder, what lies in it, and our parameters; they come back bit by bit."""
    params = programs.drawn(models.build(config), dtype)
    writing.write_original(tmp_path / "out", config, params, segment_length=7)
    hparams = json.loads((tmp_path / "out" / writing.HPARAMS).read_text())
    path = tmp_path / "out" / writing.STATE
    again, found = convert_back(read_state(path)[0], hparams)
    assert models.build(again).config == again
    assert_same(found, params)
    return torch.load(path, weights_only=True), hparams, params


def columns(x):
    return torch.from_numpy(np.ascontiguousarray(x.T)).long()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_xl(name, dtype, tmp_path):
    config = models.TransformerXLConfig(**SIZES | TRANSFORMERS[name])
    back = convert.from_original
    state, hparams, params = written(tmp_path, config, dtype, back)
    names = ("utils.proj_adaptive_softmax", "mem_transformer")
    with programs.loaded(programs.XL, *names, sub="utils") as (_, module):
        with programs.precision(getattr(torch, np.dtype(dtype).name)):
            program = module.MemTransformerLM(**hparams)
    program.load_state_dict(state, strict=True)
    program.crit.keep_order = True
    program.eval()
    segments = programs.text(V, LENGTHS, 3)
    found, mems = [], ()
    with torch.no_grad():
        for inputs_BT, targets_BT in segments:
            nll, *mems = program(columns(inputs_BT), columns(targets_BT), *mems)
            found.append(nll.numpy().T)
    programs.close(programs.ours(config, params, segments), found, dtype)


LSTMS = {
    "tied": {"d_model": 10, "d_hidden": 14},
    "dropped": {"d_model": 10, "d_hidden": 14, "weight_dropout": 0.5},
    "untied": {"d_model": 10, "d_hidden": 14, "tie_weights": False},
    "split": {"d_model": 10, "d_hidden": 14, **BINS},
    "one": {"d_model": 10, "d_hidden": 14, "n_layer": 1, "weight_dropout": 0.2},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LSTMS)
def test_awd_lstm(name, dtype, tmp_path):
    rates = {"hidden_dropout": 0.2, "input_dropout": 0.3, "word_dropout": 0.1}
    config = models.LSTMConfig(**{"vocab_size": V, **rates} | LSTMS[name])
    back = convert.from_awd_lstm
    state, hparams, params = written(tmp_path, config, dtype, back)
    sizes = [hparams[n] for n in ("n_token", "ninp", "nhid", "n_layer")]
    rates = [hparams[n] for n in ("dropout", "dropouth", "dropouti", "dropoute")]
    names = ("embed_regularize", "model", "splitcross")
    with programs.loaded(programs.AWD_LSTM, *names) as (_, module, losses):
        with programs.precision(getattr(torch, np.dtype(dtype).name)):
            program = module.RNNModel(
                "LSTM", *sizes, *rates, hparams["wdrop"], hparams["tied"]
            )
            criterion = losses.SplitCrossEntropyLoss(
                config.widths[-1], splits=hparams["splits"]
            )
    prefix = "criterion."
    tails = {n.removeprefix(prefix): x for n, x in state.items() if prefix in n}
    criterion.load_state_dict(tails, strict=True)
    state = {n: x for n, x in state.items() if prefix not in n}
    program.load_state_dict(state, strict=True)
    program.eval()
    segments = programs.text(V, LENGTHS, 3)
    found, hidden = [], program.init_hidden(3)
    with torch.no_grad():
        for inputs_BT, targets_BT in segments:
            output, hidden = program(columns(inputs_BT), hidden)
            given = program.decoder.weight, program.decoder.bias, output
            found.append(criterion(*given, columns(targets_BT).reshape(-1)).numpy())
    expected = [x.mean() for x in programs.ours(config, params, segments)]
    programs.close(expected, [float(x) for x in found], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["second_last", "collapsed", "one block"])
def test_sha_rnn(form, dtype, tmp_path):
    sizes = {"n_layer": 3, "d_model": 12, "d_inner": 36, "memory_length": 17}
    if form == "one block":
        sizes |= {"n_layer": 1, "attention": "none", "memory_length": 0}
    collapsed = form == "collapsed"
    config = models.SHARNNConfig(vocab_size=V, collapsed=collapsed, **sizes)
    back = convert.from_sha_rnn
    state, hparams, params = written(tmp_path, config, dtype, back)
    sizes = [hparams[name] for name in ("n_token", "emsize", "nhid", "nlayers")]
    with programs.loaded(programs.SHA_RNN, "model") as (module,):
        with programs.precision(getattr(torch, np.dtype(dtype).name)):
            rates = [hparams[name] for name in ("dropout", "dropouth", "dropouti")]
            program = module.SHARNN("LSTM", *sizes, *rates, tie_weights=True)
    if "max_positions" in hparams:
        program.num_max_positions = hparams["max_positions"]
        program.pos_emb = [0] * hparams["max_positions"]
    if hparams.get("collapsed"):
        for block in program.blocks:
            if block.attn is not None:
                block.attn.vq_collapse()
    program.load_state_dict(state, strict=True)
    program.eval()
    segments = programs.text(V, LENGTHS, 3)
    found, hidden, mems = [], None, None
    with torch.no_grad():
        for inputs_BT, targets_BT in segments:
            given = columns(inputs_BT), hidden
            output, hidden, mems, *_ = program(*given, mems=mems)
            logits, targets = program.decoder(output), columns(targets_BT)
            nll = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="none"
            )
            found.append(nll.reshape(targets.shape).numpy().T)
    programs.close(programs.ours(config, params, segments), found, dtype)
