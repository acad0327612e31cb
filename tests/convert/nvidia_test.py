"""NVIDIA's checkpoints: its own numbers, the vocabulary, and what is refused.

That its program scores the same is in tests/extras, which has PyTorch.
"""

import pathlib

import golden_weights
import jax
import numpy as np
import pytest
from golden import check

from xlformer import convert, runs
from xlformer.convert import hparams as hparams_lib
from xlformer.convert import nvidia, transformer_xl, vocab
from xlformer.convert.__main__ import main as command
from xlformer.errors import UserError

GOLDEN = pathlib.Path(check.__file__).parent
BASE, DIV = "nvidia_wt103_base", "nvidia_div2_pre_norm.npz"
MODULE = pathlib.Path(__file__).parent / "torch_files" / "module.pt"
SHARED = "crit.shared_out_projs.1"


# Of the other sizes tests/extras has more.
@pytest.mark.parametrize(
    ("name", "float32", "arrays", "error"),
    [(DIV, False, 6, 1e-14), (BASE, True, 8, 1e-5)],
)
def test_the_programs_own_numbers(name, float32, arrays, error):
    result = check.check(GOLDEN / name, float32=float32)
    assert result.ok, result.problems
    assert result.compared == result.total == arrays
    assert result.values < error


def test_same_length_shows_one_key_more_than_the_memory():
    state, hparams = golden_weights.read(DIV)
    config, _ = convert.from_nvidia(state, hparams)
    assert config.attention_window == config.memory_length == hparams["mem_len"]
    config, _ = convert.from_nvidia(state, hparams | {"mem_len": 0})
    assert config.attention_window == 0  # The token itself.
    config, _ = convert.from_nvidia(state, hparams | {"same_length": False})
    assert config.attention_window is None
    original, _ = convert.from_original(*as_original())
    assert original.attention_window == config.memory_length - 1


def as_original():
    """The same weights under the original's names."""
    state, hparams = golden_weights.read(DIV)
    return convert.to_original(*convert.from_nvidia(state, hparams)), hparams


def test_every_array_is_read():
    state, hparams = golden_weights.read(DIV)
    found = convert.to_original(*convert.from_nvidia(state, hparams))
    for name, x in state.items():
        if "shared" not in name:
            name = name.replace("layers_biases.0", "layers.0.bias")
            name = name.replace("layers_biases.1", "layers.1.bias")
            name = name.replace("layers_biases.2", "layers.2.bias")
            np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_a_table_of_positions_has_its_heads_in_one_axis():
    sizes = {"n_token": 7, "n_layer": 1, "n_head": 2, "d_model": 4, "d_head": 2}
    sizes |= {"d_inner": 3, "attn_type": 3, "tgt_len": 5}
    shapes = hparams_lib.to_config(sizes)
    rng = np.random.default_rng(0)
    state = {
        entry.name: rng.normal(size=entry.shape)
        for entry in transformer_xl.entries(shapes, reverse_clusters=True)
        if not entry.tied
    }
    table = state["r_emb"]
    assert table.shape == (1, 5, 2, 2)
    state["r_emb"] = table.reshape(1, 5, 4)
    state["crit.out_layers_biases.0"] = state.pop("crit.out_layers.0.bias")
    config, params = convert.from_nvidia(state, sizes)
    np.testing.assert_array_equal(convert.to_original(config, params)["r_emb"], table)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({SHARED: np.ones((16, 8))}, f"{SHARED} differs from word_emb.emb_projs.1"),
        ({"crit.shared_out_projs.9": np.ones(2)}, "differs from word_emb.emb_projs.9"),
        ({"crit.out_layers_biases.1": None}, "lacks 'crit.out_layers.1.bias'"),
        ({"crit.out_layers_biases.7": np.ones(2)}, "unexpected names: crit.out_layer"),
        ({"r_w_bias": np.ones(2)}, "r_w_bias has shape .2,., the hparams say .2, 6."),
        ({"out_layer.weight": np.ones((2, 2))}, "unexpected names: out_layer.weight"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(changes, line):
    state, hparams = golden_weights.read(DIV)
    state = {n: x for n, x in (state | changes).items() if x is not None}
    with pytest.raises(UserError, match=line) as raised:
        convert.from_nvidia(state, hparams)
    assert "\n" not in str(raised.value)


def test_the_command_says_what_it_lacks(tmp_path, capsys):
    flags = ["--format=nvidia", f"--workdir={tmp_path / 'run'}"]
    (tmp_path / "module.pt").write_bytes(MODULE.read_bytes())
    for source, line in (
        (tmp_path, "has no checkpoint_best.pt and no checkpoint_last.pt"),
        (tmp_path / "x.pt", "no such file"),
        (tmp_path / "module.pt", "could run any code"),
        (MODULE.with_name("state.pt"), "has no model_config and model_state"),
    ):
        assert command([*flags, f"--source={source}"]) == 2
        assert line in capsys.readouterr().err
    assert command([*flags, f"--source={tmp_path}", "--hparams=x.json"]) == 2
    assert "whose checkpoints have them" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_its_training(tmp_path):
    """With arguments, optimizer and random states, which are passed over."""
    config, params, hparams, found = nvidia.read(GOLDEN / BASE)
    assert (config.n_layer, config.vocab_size, hparams["cutoffs"]) == (2, 61, [20, 40])
    assert hparams["tie_projs"] == [False, True, True] and hparams["dtype"] is None
    assert found.symbols[0] == "<eos>" and len(found.symbols) == 61
    assert found.counts_V.sum() > 61
    flags = ["--format=nvidia", f"--source={GOLDEN / BASE}"]
    assert command([*flags, f"--workdir={tmp_path / 'run'}"]) == 0
    run = runs.load(tmp_path / "run")
    assert run.vocabulary.symbols == found.symbols
    for ours, theirs in zip(*map(jax.tree.leaves, (run.params, params)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# Its vocabulary -----------------------------------------------------------------------


def of(symbols, **fields):
    return vocab.of_vocab({"idx2sym": symbols, **fields})


def test_ids_of_a_vocabulary_are_kept():
    found = of(["<eos>", "b", "<unk>", "a"], counter={"a": 3, "b": 5}, lower_case=True)
    assert found.encode("A x\n").tolist() == [3, 2, 0]
    assert found.counts_V.tolist() == [0, 5, 0, 3]
    found = of(["<S>", "the", "<UNK>"])  # lm1b
    assert (found.eos, found.begins, found.unk_id) == ("<S>", True, 2)
    assert not found.lower
    found = of(["32", "101", "9"], counter={"32": 7})  # enwik8
    assert found.encode("e \t").tolist() == [1, 0, 2] and found.newline == "drop"
    found = of(["_", "e", "t"])  # text8: the space of its text
    assert found.encode("t e").tolist() == [2, 0, 1] and found.unit == "chars"


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "has no list of symbols"),
        ({"idx2sym": "abc"}, "has no list of symbols"),
        ({"idx2sym": ["a", 3]}, "has no list of symbols"),
        ({"idx2sym": []}, "symbols are missing or repeated"),
        ({"idx2sym": ["a", "a"]}, "symbols are missing or repeated"),
        ({"idx2sym": ["the", "of"]}, "a symbol is not one character"),
        ({"idx2sym": ["<eos>", "a b"]}, "a symbol is not one word"),
        ({"idx2sym": ["a"], "counter": {"a": -1}}, "a bad count"),
        ({"idx2sym": ["a"], "counter": [1]}, "counter is a list"),
    ],
)
def test_what_is_no_vocabulary(fields, line):
    with pytest.raises(UserError, match=f"^x.pt.*{line}"):
        vocab.of_vocab(fields, "x.pt")
