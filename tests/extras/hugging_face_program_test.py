"""Hugging Face's TransfoXL loads what we write, and we what it writes in any form."""

import dataclasses
import json

import numpy as np
import programs
import pytest
import safetensors.numpy
import torch

from xlformer import convert, models
from xlformer.convert import writing
from xlformer.data.vocabulary import WordVocabulary

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")
V, LENGTHS = 41, (7, 7, 3)
SIZES = {"vocab_size": V, "n_layer": 2, "d_model": 16, "n_head": 2, "d_head": 6}
SIZES |= {"d_inner": 23, "attend_zero_memory": True, "memory_length": 5}
BINS, TIED = {"cutoffs": (11, 23)}, (False, True, True)
CASES = {
    "plain": {},
    "same_length": {"memory_length": 9, "same_length": True, "clamp_length": 4},
    "no_memory": {"memory_length": 0, "pre_norm": True},
    "untied_r": {"untie_r": True, **BINS, "div_val": 2, "tie_projections": TIED},
    "narrow": {"d_embed": 9, **BINS, "tie_projections": TIED},
    "untied": {"d_embed": 9, **BINS, "tie_weights": False, "untie_r": True},
}


@pytest.fixture(autouse=True)
def mended(monkeypatch):
    """Its releases since 4.36 call type_as with a dtype, which torch never took."""
    type_as = torch.Tensor.type_as

    def either(self, other=None, *, dtype=None):
        return self.to(dtype) if other is None else type_as(self, other)

    monkeypatch.setattr(torch.Tensor, "type_as", either)


def written(folder, name, **fields):
    config = models.TransformerXLConfig(**SIZES | CASES[name] | fields)
    params = programs.drawn(models.build(config), np.float32)
    writing.write_hf(folder, config, params)
    return config, params


def load(folder, **options):
    """Its model, strictly: nothing is missing but what it ties, nothing too many."""
    model, found = transformers.TransfoXLLMHeadModel.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(found.values()), found
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_it_scores_the_same(name, tmp_path):
    config, params = written(tmp_path / "out", name)
    program = load(tmp_path / "out")
    segments = programs.text(V, LENGTHS, 3)
    found, mems = [], None
    with torch.no_grad():
        for inputs_BT, targets_BT in segments:
            output = program(torch.from_numpy(inputs_BT), mems=mems)
            mems = output.mems
            targets = torch.from_numpy(targets_BT)[..., None]
            scores = output.prediction_scores
            found.append(-scores.gather(-1, targets)[..., 0].numpy())
    programs.close(programs.ours(config, params, segments), found, np.float32)


@pytest.mark.parametrize("name", ["plain", "untied_r", "untied"])
def test_what_it_saves_again_is_what_was_written(name, tmp_path):
    written(tmp_path / "out", name)
    load(tmp_path / "out").save_pretrained(tmp_path / "again")
    a, b = (
        safetensors.numpy.load_file(tmp_path / x / "model.safetensors")
        for x in ("out", "again")
    )
    # Of what layers share it keeps one name, of which there are several.
    shared = {n for n in a if n.endswith(("r_w_bias", "r_r_bias"))}
    assert a.keys() - shared == b.keys() - shared
    for key in a.keys() & b.keys():
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    ours, its = (
        json.loads((tmp_path / x / "config.json").read_text()) for x in ("out", "again")
    )
    versions = ("transformers_version", "torch_dtype", "dtype")
    for each in (ours, its):
        for key in versions:
            each.pop(key, None)
    assert ours == its
    assert (
        convert.from_hf(tmp_path / "again")[0] == convert.from_hf(tmp_path / "out")[0]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded", "sharded bin"])
def test_all_that_it_writes_is_read(form, dtype, tmp_path):
    config, _ = written(tmp_path / "out", "untied_r")
    program = load(tmp_path / "out").to(dtype)
    options = {"safe_serialization": "bin" not in form}
    options |= {"max_shard_size": "9KB"} if "sharded" in form else {}
    program.save_pretrained(tmp_path / "again", **options)
    files = [x.name for x in (tmp_path / "again").iterdir()]
    assert ("sharded" in form) == any(x.endswith(".index.json") for x in files)
    again, params = convert.from_hf(tmp_path / "again")
    assert dataclasses.replace(again, d_embed=0) == config
    state = program.state_dict()
    _, arrays = convert.to_hf(again, params)
    for name, x in arrays.items():
        if "inv_freq" not in name:  # constants, of which ours are not rounded
            expected = state[name].to(torch.float64).numpy()
            np.testing.assert_array_equal(x.astype(np.float64), expected, err_msg=name)


def test_its_tokenizer_has_the_same_ids(tmp_path):
    pytest.importorskip("sacremoses")
    symbols = ["<eos>", "<unk>", *(f"w{k}" for k in range(V - 2))]
    vocabulary = WordVocabulary(symbols, [0] * V)
    config = models.TransformerXLConfig(**SIZES)
    params = programs.drawn(models.build(config), np.float32)
    writing.write_hf(tmp_path / "out", config, params, vocabulary)
    tokenizer = transformers.TransfoXLTokenizer.from_pretrained(tmp_path / "out")
    text = "w3 w7 what w11"
    assert (
        tokenizer(text)["input_ids"]
        == vocabulary.encode(text, close_line=False).tolist()
    )
    assert tokenizer.eos_token == "<eos>" and tokenizer.unk_token == "<unk>"
