"""Hugging Face's directories: there and back bit by bit, in every form they have."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from golden import check
from training_runs import assert_same

from xlformer import convert
from xlformer.convert import hugging_face
from xlformer.errors import UserError

GOLDEN = pathlib.Path(check.__file__).parent
DIV = GOLDEN / "hf_transfo_xl_div4"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARED = ("r_w_bias", "r_r_bias")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(DIV, tmp_path / "hf")


def weights(folder):
    return safetensors.numpy.load_file(folder / WEIGHTS)


def changed(folder, **changes):
    """Another config.json; None leaves a name out."""
    path = folder / CONFIG
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: x for k, x in found.items() if x is not None}))
    return folder


def shards(folder, **changes):
    """The weights in three files with an index, which may be changed."""
    arrays = weights(folder)
    (folder / WEIGHTS).unlink()
    where = {}
    for k in range(3):
        name = f"model-0000{k + 1}-of-00003.safetensors"
        part = dict(sorted(arrays.items())[k::3])
        safetensors.numpy.save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    where = {n: x for n, x in (where | changes).items() if x is not None}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ["hf_transfo_xl_div1", "hf_transfo_xl_div4"])
def test_what_it_saved_is_what_we_would_have_written(name):
    settings, arrays = convert.to_hf(*convert.from_hf(GOLDEN / name))
    expected = json.loads((GOLDEN / name / CONFIG).read_text())
    assert settings == {k: x for k, x in expected.items() if "version" not in k}
    stored = weights(GOLDEN / name)
    assert arrays.keys() == stored.keys()
    for key, x in stored.items():
        np.testing.assert_array_equal(arrays[key], x, err_msg=key)
        assert arrays[key].dtype == x.dtype


@pytest.mark.parametrize(
    "dtype",
    [np.float16, jnp.bfloat16, np.float64],
    ids=lambda x: np.dtype(x).name,
)
def test_every_dtype_is_read_as_what_it_holds(dtype, folder):
    half = {name: x.astype(dtype) for name, x in weights(folder).items()}
    safetensors.numpy.save_file(half, folder / WEIGHTS)
    config, params = convert.from_hf(folder)
    _, arrays = convert.to_hf(config, params)
    for name, x in half.items():
        if "inv_freq" not in name:
            expected = np.asarray(x, np.float64)
            np.testing.assert_array_equal(arrays[name].astype(np.float64), expected)
    kept = np.dtype(dtype).kind == "f"
    found = {x.dtype for x in jax.tree.leaves(params)}
    assert found == {np.dtype(dtype) if kept else np.dtype(np.float32)}


def test_several_files_are_one(folder):
    expected = convert.from_hf(folder)
    found = convert.from_hf(shards(folder))
    assert found[0] == expected[0]
    assert_same(found[1], expected[1])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"crit.cluster_bias": "../model.safetensors"}, "names '../model.safetensors'"),
        ({"crit.cluster_bias": "/etc/passwd"}, "names '/etc/passwd', which is no file"),
        ({"crit.cluster_bias": ".."}, "names '..', which is no file beside it"),
        ({"crit.cluster_bias": 3}, "3: no such file|the name must end in"),
        ({"crit.cluster_bias": None}, "the state dict lacks 'crit.cluster_bias'"),
        ({"more": "model-00001-of-00003.safetensors"}, "the files lack more"),
        ({"more": "model-00004-of-00003.safetensors"}, "00004-of.*: no such file"),
        ({"more": INDEX}, "the name must end in .npz"),
    ],
    ids=lambda x: "",
)
def test_an_index_names_files_beside_it(changes, line, folder):
    with pytest.raises(UserError, match=line):
        convert.from_hf(shards(folder, **changes))


@pytest.mark.parametrize("content", ['{"weight_map": []}', "{}", "[1]", "{"])
def test_an_index_that_is_none(content, folder):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(content)
    with pytest.raises(UserError, match=f"{INDEX}.* (no weight_map|JSON)"):
        convert.from_hf(folder)


def test_names_that_config_json_lacks_have_the_programs_values(folder):
    changed(folder, n_layer=None, num_hidden_layers=3, vocab_size=None, n_token=120)
    changed(folder, tie_projs=None, untie_r=None, clamp_len=None, same_length=None)
    changed(folder, dropatt=None, layer_norm_epsilon=None, pre_lnorm=None)
    config, params = convert.from_hf(folder)
    assert (config.clamp_length, config.same_length, config.untie_r) == (
        1000,
        True,
        True,
    )
    assert config.tie_projections == (False, True, True)
    assert_same(params, convert.from_hf(DIV)[1])
    changed(folder, proj_share_all_but_first=False)
    with pytest.raises(UserError, match="lacks 'crit.out_projs.1'"):
        convert.from_hf(folder)
    changed(folder, cutoffs=None)  # the 20000, 40000 and 200000 of wt103
    with pytest.raises(UserError, match="has shape .30, 32., the hparams say .120, 32"):
        convert.from_hf(folder)


def test_what_layers_share_may_be_there_for_each(folder):
    """Without untie_r; which of the names save_pretrained keeps depends on its age."""
    arrays = {n: x for n, x in weights(folder).items()}
    u, v = (arrays[f"transformer.layers.0.dec_attn.{n}"] for n in SHARED)
    for layer in range(3):
        arrays[f"transformer.layers.{layer}.dec_attn.r_w_bias"] = u
        arrays[f"transformer.layers.{layer}.dec_attn.r_r_bias"] = v
    safetensors.numpy.save_file(arrays, folder / WEIGHTS)
    changed(folder, untie_r=False)
    config, params = convert.from_hf(folder)
    _, written = convert.to_hf(config, params)
    np.testing.assert_array_equal(written["transformer.r_w_bias"], u)
    np.testing.assert_array_equal(written["transformer.r_r_bias"], v)
    # Its reader misses none of the layers' names.
    again = written["transformer.layers.2.dec_attn.r_r_bias"]
    np.testing.assert_array_equal(again, v)
    arrays["transformer.layers.2.dec_attn.r_w_bias"] = u + 1
    safetensors.numpy.save_file(arrays, folder / WEIGHTS)
    with pytest.raises(UserError, match="layers.2.dec_attn.r_w_bias differs between"):
        convert.from_hf(folder)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"layer_norm_epsilon": "x"}, "norm_epsilon='x'"),
        ({"init": 3}, "config.model.init=3"),
        ({"init_std": []}, "config.model.init_std"),
        ({"cutoffs": 3}, "cutoffs=3 is not a list"),
        ({"vocab_size": True}, "vocab_size is not a whole number"),
    ],
    ids=lambda x: "",
)
def test_a_config_that_does_not_fit(changes, line, folder):
    with pytest.raises(UserError, match=line):
        convert.from_hf(changed(folder, **changes))


def test_the_reader_looks_in_the_order_of_the_program():
    assert hugging_face.FILES == (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
