"""What the original programs and Hugging Face's are given: whole, or refused.

That they load it and score the same is in tests/extras, which has PyTorch.
"""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import trained_run
from training_runs import assert_same

from xlformer import convert, models, runs
from xlformer.convert import hugging_face, writing
from xlformer.convert.__main__ import main as command
from xlformer.data.vocabulary import CharVocabulary, WordVocabulary
from xlformer.errors import UserError

V = 19
SIZES = {"vocab_size": V, "n_layer": 1, "d_model": 8, "n_head": 2, "d_head": 3}
SIZES |= {"d_inner": 11, "memory_length": 5, "d_embed": 8}
XL = models.TransformerXLConfig(**SIZES)
DIV = models.TransformerXLConfig(
    **SIZES, cutoffs=(5, 11), div_val=2, tie_projections=(False, True, True)
)
ATTENDED = dataclasses.replace(XL, attend_zero_memory=True)
LSTM = models.LSTMConfig(V, 2, 8, 11)
SHA = models.SHARNNConfig(V, 2, 8, 16)
WORDS = WordVocabulary(
    ["<eos>", "<unk>", *(f"w{k}" for k in range(V - 2))], [0] * V, lower=True
)


def params_of(config):
    return trained_run.random_params(models.build(config))


@pytest.mark.parametrize(
    ("config", "back"),
    [
        (XL, convert.from_original),
        (
            dataclasses.replace(DIV, same_length=True, clamp_length=3, pre_norm=True),
            convert.from_original,
        ),
        (
            dataclasses.replace(XL, attn_type=1, table_length=12, untie_r=True),
            convert.from_original,
        ),
        (LSTM, convert.from_awd_lstm),
        (
            dataclasses.replace(LSTM, weight_dropout=0.5, cutoffs=(5, 11)),
            convert.from_awd_lstm,
        ),
        (SHA, convert.from_sha_rnn),
    ],
    ids=lambda x: "",
)
def test_of_program_is_the_inverse_of_its_reader(config, back):
    params = params_of(config)
    state, hparams = writing.of_program(config, params, 7)
    assert 7 in (hparams.get("tgt_len"), hparams.get("bptt"))
    hparams = json.loads(json.dumps(hparams))  # All of it is plain.
    found, again = back(state, hparams)
    assert found == config
    assert_same(again, params)


def test_layers_that_drop_weights_have_their_wrappers_names():
    dropped = dataclasses.replace(LSTM, weight_dropout=0.5)
    state, hparams = writing.of_program(dropped, params_of(LSTM))
    assert "rnns.1.module.weight_hh_l0_raw" in state and hparams["wdrop"] == 0.5
    assert not any(name.endswith("weight_hh_l0") for name in state)


def test_positions_have_the_frequencies_of_the_programs():
    state, _ = writing.of_program(XL, params_of(XL))
    found = state["pos_emb.inv_freq"]
    np.testing.assert_allclose(found, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    assert found.dtype == np.float32


NONE_SUCH = [
    (
        XL,
        {"positions": "rotary", "d_head": 4},
        "positions='rotary': the original has none such",
    ),
    (XL, {"final_norm": True}, "final_norm=True: the original has none such"),
    (XL, {"gate": "gru"}, "gate='gru'"),
    (XL, {"untie_r": True}, "untie_r=True: the original has none such"),
    (XL, {"norm_epsilon": 1e-12}, "norm_epsilon=1e-12: .*, it has 1e-05"),
    (XL, {"attend_zero_memory": True}, "attend_zero_memory=True: the original"),
    (XL, {"window": 5}, "window=5 with memory_length=5: the original shows"),
    (XL, {"extended_length": 3}, "extended_length=3 with memory_length=5"),
    (DIV, {"proj_same_dim": False}, "proj_same_dim=False: the original"),
    (
        XL,
        {"attn_type": 2, "allow_incoherent_positions": True},
        "memory_length=5 with attn_type=2",
    ),
    (
        XL,
        {"attn_type": 1, "table_length": 5, "untie_r": True},
        "table_length=5 leaves no segment",
    ),
    (LSTM, {"tie_weights": False, "cutoffs": (5,)}, "d_model=8: AWD-LSTM has tails"),
    (SHA, {"attention": "all"}, "attention='all': SHA-RNN has none such"),
    (SHA, {"window": 3}, "window=3: SHA-RNN has none such, it has None"),
]


@pytest.mark.parametrize(("config", "changes", "line"), NONE_SUCH, ids=lambda x: "")
def test_what_the_original_lacks_is_refused_and_nothing_written(
    config, changes, line, tmp_path
):
    config = dataclasses.replace(config, **changes)
    with pytest.raises(UserError, match=line) as raised:
        writing.write_original(tmp_path / "out", config, {})
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_model_without_an_original_is_refused(tmp_path):
    config = models.UniversalConfig(vocab_size=V)
    with pytest.raises(UserError, match="'universal'.*there is no original of it"):
        writing.write_original(tmp_path / "out", config, {})
    with pytest.raises(UserError, match="Hugging Face's TransfoXL is a Transformer-XL"):
        writing.write_hf(tmp_path / "out", config, {})
    assert not list(tmp_path.iterdir())


def test_the_original_needs_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="out: pip install torch to write model.pt"):
        writing.write_original(tmp_path / "out", XL, params_of(XL), WORDS)
    assert not list(tmp_path.iterdir())


def test_hugging_faces_form_needs_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(UserError, match=r"^pip install .xlformer\[export\]. to write"):
        writing.write_hf(tmp_path / "out", ATTENDED, params_of(ATTENDED))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "changes", "line"),
    [
        (XL, {}, "attend_zero_memory=False: .* format xlformer"),
        (ATTENDED, {"attn_type": 1, "table_length": 9}, "attn_type=1: Hugging Face's"),
        (ATTENDED, {"extended_length": 3}, "extended_length=3: Hugging Face's"),
        (ATTENDED, {"window": 5}, "window=5 .*: Hugging Face's TransfoXL shows"),
        (ATTENDED, {"final_norm": True}, "final_norm=True"),
        (ATTENDED, {"vocab_size": 20}, "has 19 symbols, the weights have 20"),
    ],
    ids=lambda x: "",
)
def test_what_hugging_face_lacks_is_refused_and_nothing_written(
    config, changes, line, tmp_path
):
    config = dataclasses.replace(config, **changes)
    with pytest.raises(UserError, match=line):
        writing.write_hf(tmp_path / "out", config, params_of(config), WORDS)
    assert not list(tmp_path.iterdir())


def test_a_directory_of_hugging_faces_comes_back_bit_by_bit(tmp_path, capsys):
    """Through the command, with its vocabulary; an empty directory may be there."""
    config = dataclasses.replace(
        ATTENDED, cutoffs=(5, 11), untie_r=True, tie_weights=False, same_length=True
    )
    params, out = params_of(config), tmp_path / "out"
    out.mkdir()
    writing.write_hf(out, config, params, WORDS)
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
    names = {"config.json", "model.safetensors", "vocab.txt", "vocabulary.json"}
    assert {x.name for x in out.iterdir()} == names | {"tokenizer_config.json"}
    assert len({x.stat().st_mode for x in out.iterdir()}) == 1
    assert (out / "vocab.txt").read_text().split() == list(WORDS.symbols)
    found, again = convert.from_hf(out)
    assert found == config
    assert_same(again, params)
    flags = ["--format=hf", f"--source={out}", f"--workdir={tmp_path / 'run'}"]
    assert command(flags) == 0
    run = runs.load(tmp_path / "run")
    assert run.vocabulary.lower and run.vocabulary.symbols == WORDS.symbols
    assert_same(run.params, params)
    capsys.readouterr()
    with pytest.raises(UserError, match="is not empty; name a new directory"):
        writing.write_hf(out, config, params)


def test_what_hugging_faces_tokenizer_cannot_read_is_not_written(tmp_path):
    letters = CharVocabulary("abcdefghijklmnopqrs", [0] * V)
    config = dataclasses.replace(ATTENDED, memory_length=0)
    writing.write_hf(tmp_path / "out", config, params_of(config), letters)
    found = {x.name for x in (tmp_path / "out").iterdir()}
    assert found == {"config.json", "model.safetensors", "vocabulary.json"}


def test_after_an_error_nothing_is_left(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("no space left")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(UserError, match="out': cannot be written: no space left"):
        writing.write_hf(tmp_path / "out", ATTENDED, params_of(ATTENDED))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", "gs://bucket/out"):
        with pytest.raises(UserError, match="is not a directory|a local directory"):
            writing.write_hf(place, ATTENDED, params_of(ATTENDED))


def test_half_precision_is_written_as_it_is(tmp_path):
    params = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), params_of(ATTENDED))
    writing.write_hf(tmp_path / "out", ATTENDED, params)
    settings = json.loads((tmp_path / "out" / hugging_face.CONFIG).read_text())
    assert settings["torch_dtype"] == "bfloat16"
    _, found = convert.from_hf(tmp_path / "out")
    assert_same(found, jax.tree.map(lambda x: np.asarray(x, np.float32), params))
