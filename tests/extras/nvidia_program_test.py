"""Checkpoints that NVIDIA's program makes here: read, and scored the same by both."""

import argparse
import importlib
import json

import numpy as np
import programs
import pytest
import torch
from golden import check

from xlformer import runs
from xlformer.convert import __main__ as command
from xlformer.convert import nvidia
from xlformer.errors import UserError

pytestmark = pytest.mark.filterwarnings("default")
V, LENGTHS, ROWS = 41, (7, 7, 3), 2
TIED = [False, True, True]
BASE = {"n_token": V, "n_layer": 2, "n_head": 2, "d_model": 16, "d_head": 6}
BASE |= {"d_inner": 23, "dropout": 0.0, "dropatt": 0.0, "dtype": None, "d_embed": 16}
BASE |= {"tgt_len": 7, "ext_len": 0, "mem_len": 5, "cutoffs": [], "tie_projs": [False]}
BINS = {"cutoffs": [11, 23], "tie_projs": TIED}
CASES = {
    "plain": {},
    "no_memory": {"mem_len": 0},
    "same_length_pre_norm": {"same_length": True, "pre_lnorm": True, "clamp_len": 4},
    "same_length_long": {"same_length": True, "mem_len": 12, **BINS},
    "narrow": {**BINS, "d_embed": 9, "mem_len": 7},
    "untied": {**BINS, "d_embed": 9, "tie_weight": False, "tie_projs": [False] * 3},
    "div": {**BINS, "div_val": 2},
    "div_untied": {**BINS, "div_val": 2, "tie_weight": False},
    "learned": {"attn_type": 1, "clamp_len": 6},
    "absolute": {"attn_type": 3, "mem_len": 0, "d_head": 8},
}


def of_nvidia():
    programs.package("utils", programs.NVIDIA / "utils")
    return programs.loaded(programs.NVIDIA, "mem_transformer")


def made(tmp_path, config):
    """A folder with its checkpoint and what its model says of a text, in float64."""
    with of_nvidia() as (module,), programs.precision(torch.float64):
        model = module.MemTransformerLM(**config)
        vocab = importlib.import_module("utils.vocabulary").Vocab(
            special=["<eos>"], lower_case=False
        )
        vocab.counter.update({f"w{k}": V - k for k in range(V - 1)})
        vocab.build_vocab()
        rng = np.random.default_rng(7)
        with torch.no_grad():
            for name, p in model.named_parameters():
                mean = 1.0 if "layer_norm.weight" in name else 0.0
                x = rng.normal(mean, 0.3, tuple(p.shape)).astype(np.float32)
                p.copy_(torch.from_numpy(x))
        state = {n: x.float() for n, x in model.state_dict().items()}
        # As its save_checkpoint: the optimizer's state and more beside the model's.
        checkpoint = {"args": argparse.Namespace(lr=0.01), "model_config": config}
        checkpoint |= {"model_state": state, "vocab": vocab, "amp_state": None}
        checkpoint |= {"optimizer_state": {"state": {0: {"step": 2}}}, "epoch": 1}
        torch.save(checkpoint, tmp_path / "checkpoint_last.pt")
        model.eval()
        model.crit.keep_order = True
        arrays, mems = {}, None
        segments = programs.text(V, LENGTHS, ROWS)
        for s, (inputs_BT, targets_BT) in enumerate(segments):
            pair = inputs_BT.T.astype(np.int32), targets_BT.T.astype(np.int32)
            given = [torch.from_numpy(np.ascontiguousarray(x)).long() for x in pair]
            with torch.no_grad():
                nll, mems = model(*given, mems)
            names = (f"seg{s}/inputs", f"seg{s}/targets")
            arrays |= dict(zip(names, pair, strict=True))
            arrays[f"seg{s}/nll"] = nll.numpy()
            if mems is not None:
                arrays[f"seg{s}/memory"] = mems.numpy()
    arrays["config"] = np.frombuffer(json.dumps(config).encode(), np.uint8)
    np.savez(tmp_path / check.EXPECTED, **arrays)
    return state


@pytest.mark.parametrize("name", CASES)
def test_scores_as_its_program(name, tmp_path):
    config = {**BASE, **CASES[name]}
    state = made(tmp_path, config)
    result = check.check(tmp_path)
    assert result.ok, result.problems
    # Each array of it is one of the params or the copy of one.
    found, _, _ = nvidia.load(tmp_path)
    assert found.keys() == state.keys()


def test_in_float32_too(tmp_path):
    made(tmp_path, {**BASE, **CASES["same_length_long"]})
    result = check.check(tmp_path, float32=True)
    assert result.ok, result.problems


def test_the_command_takes_a_checkpoint_and_its_vocabulary(tmp_path):
    made(tmp_path, BASE)
    flags = ["--format=nvidia", f"--source={tmp_path}", f"--workdir={tmp_path / 'run'}"]
    assert command.main(flags) == 0
    run = runs.load(tmp_path / "run")
    assert run.vocabulary.symbols[:3] == ("<eos>", "w0", "w1")
    assert run.config.eval.segment_length == 7


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"extra": pytest.importorskip}, "it names .*importorskip"),
        ({"model_state": None}, "holds no state dict"),
        ({"model_config": [1]}, "has no model_config and model_state"),
        ({"model_state": {"a": 3}}, "holds no state dict"),
        ({"model_config": {}}, "hparams lack n_token"),
    ],
    ids=lambda x: "",
)
def test_what_is_no_checkpoint_of_its_is_said(change, line, tmp_path):
    state = {"r_w_bias": torch.ones(2)}
    whole = {"model_config": {"n_token": 3}, "model_state": state, **change}
    torch.save(whole, tmp_path / "checkpoint_best.pt")
    with pytest.raises(UserError, match=line) as raised:
        nvidia.read(tmp_path)
    assert "\n" not in str(raised.value)
