"""Weight files of strangers: read when plain, refused in one line otherwise."""

import io
import json
import pathlib
import pickle
import zipfile

import golden_weights
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from xlformer import convert
from xlformer.convert.files import read_json, read_state
from xlformer.errors import UserError

GOLDEN = "attn0_adaptive_div4.npz"
ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.float64([7.5]),
}


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.mark),)


def refusal(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600, text
    return text


def npz(path, *, config=None, **arrays):
    if config is not None:
        content = config if isinstance(config, bytes) else json.dumps(config).encode()
        arrays["config"] = np.frombuffer(content, np.uint8)
    np.savez(path, **arrays)
    return path


def assert_same(found):
    assert set(found) == set(ARRAYS)
    for name, expected in ARRAYS.items():
        np.testing.assert_array_equal(found[name], expected)
        assert found[name].dtype == expected.dtype


def test_reads_npz_and_safetensors(tmp_path):
    state, hparams = read_state(npz(tmp_path / "w.npz", **ARRAYS))
    assert_same(state)
    assert hparams is None
    safetensors.numpy.save_file(ARRAYS, tmp_path / "w.safetensors")
    state, hparams = read_state(tmp_path / "w.safetensors")
    assert_same(state)
    assert hparams is None
    half = {"h": np.ones(3, jnp.bfloat16)}
    safetensors.numpy.save_file(half, tmp_path / "w.safetensors")
    assert read_state(tmp_path / "w.safetensors")[0]["h"].dtype == np.float32


def test_npz_may_carry_its_hparams(tmp_path):
    inside = {f"params/{name}": x for name, x in ARRAYS.items()}
    path = npz(tmp_path / "w.npz", config={"n_layer": 3}, other=np.ones(1), **inside)
    state, hparams = read_state(path)
    assert_same(state)
    assert hparams == {"n_layer": 3}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".bin"])
def test_pickles_do_not_run(tmp_path, suffix):
    mark = tmp_path / "ran"
    path = tmp_path / f"w{suffix}"
    path.write_bytes(pickle.dumps({"a": Bomb(mark)}))
    assert str(path) in refusal(read_state, path)
    assert not mark.exists()


def test_object_arrays_do_not_run(tmp_path):
    mark = tmp_path / "ran"
    content = io.BytesIO()
    np.save(content, np.array([Bomb(mark)], object), allow_pickle=True)
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", content.getvalue())
    assert "not a readable npz of plain arrays" in refusal(read_state, path)
    assert not mark.exists()


def test_every_truncation_is_refused(tmp_path):
    whole = npz(tmp_path / "whole.npz", **ARRAYS).read_bytes()
    safetensors.numpy.save_file(ARRAYS, tmp_path / "whole.safetensors")
    others = (tmp_path / "whole.safetensors").read_bytes()
    for suffix, content in ((".npz", whole), (".safetensors", others)):
        path = tmp_path / f"cut{suffix}"
        for length in (*range(0, len(content), 23), len(content) - 1):
            path.write_bytes(content[:length])
            assert "not a readable" in refusal(read_state, path)


def test_flipped_bytes_are_refused_or_harmless(tmp_path):
    """Never another exception; compressed entries raise errors of their own."""
    np.savez_compressed(tmp_path / "whole.npz", **ARRAYS)
    content = (tmp_path / "whole.npz").read_bytes()
    path, refused = tmp_path / "w.npz", 0
    for position in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[position] ^= 0xFF
        path.write_bytes(flipped)
        try:
            read_state(path)
        except UserError:
            refused += 1
    assert refused > len(content) // 6


def test_an_array_that_says_to_be_shorter_is_refused(tmp_path):
    """Fewer bytes would be read than have a checksum, which nobody would compare."""
    content = npz(tmp_path / "w.npz", **ARRAYS).read_bytes()
    assert content.count(b"(2, 3)") == 1
    (tmp_path / "w.npz").write_bytes(content.replace(b"(2, 3)", b"(1, 3)"))
    assert "a.weight.npy" in refusal(read_state, tmp_path / "w.npz")


def test_headers_that_claim_huge_sizes(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    for claimed in (len(json.dumps(header)), 1 << 62):
        path = tmp_path / "w.safetensors"
        text = json.dumps(header).encode()
        path.write_bytes(claimed.to_bytes(8, "little") + text)
        assert "not a readable safetensors file" in refusal(read_state, path)
    entry = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        entry, {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)}
    )
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", entry.getvalue() + b"12345678")
    assert "not a readable npz" in refusal(read_state, path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"{", "entry 'config' is not JSON"),
        (b"\xff\xfe", "entry 'config' is not JSON"),
        (b"[" * 100_000, "entry 'config' is not JSON"),
        (b"[1, 2]", "entry 'config' holds a JSON list, expected an object"),
    ],
)
def test_hostile_hparams_in_an_npz(tmp_path, config, message):
    path = npz(tmp_path / "w.npz", config=config, **ARRAYS)
    assert message in refusal(read_state, path)


def test_names_what_is_no_file_of_weights(tmp_path):
    assert "no such file" in refusal(read_state, tmp_path / "w.npz")
    assert "no such file" in refusal(read_state, tmp_path)
    path = tmp_path / "w.h5"
    path.write_bytes(b"x")
    assert "must end in .npz, .safetensors, .pt, .bin" in refusal(read_state, path)
    np.save(tmp_path / "w.npy", np.ones(3))
    (tmp_path / "w.npy").rename(tmp_path / "w.npz")  # an array is no archive
    assert "not a readable npz" in refusal(read_state, tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"1" * 9999, "is not JSON"),
        (b"3", "holds a JSON int, expected an object"),
        (b"null", "holds a JSON NoneType"),
    ],
)
def test_hostile_json(tmp_path, content, message):
    path = tmp_path / "hparams.json"
    path.write_bytes(content)
    assert message in refusal(read_json, path)
    assert "no such file" in refusal(read_json, tmp_path / "other.json")
    assert "is not JSON" in refusal(read_json, tmp_path)  # a directory


# What does not fit the hparams -------------------------------------------------------


BIAS, NAME = "layers.1.pos_ff.CoreNet.0.bias", "layers.2.dec_attn.o_net.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({BIAS: None}, f"lacks '{BIAS}'"),
        ({"x.y": np.ones(1, np.float32)}, "unexpected names: x.y"),
        ({BIAS: np.ones(47, np.float32)}, f"{BIAS} has shape (47,), the hparams say"),
        ({BIAS: np.ones(48, np.int64)}, f"{BIAS} holds int64, expected floats"),
        ({NAME: np.full((32, 32), "a")}, f"{NAME} holds <U1, expected floats"),
        ({NAME: np.ones((32, 32), complex)}, f"{NAME} holds complex128"),
    ],
)
def test_state_that_does_not_fit(changes, message):
    state, hparams = golden_weights.read(GOLDEN)
    state = {k: x for k, x in (state | changes).items() if x is not None}
    assert message in refusal(convert.from_original, state, hparams)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": None}, "hparams lack n_layer"),
        ({"n_layer": "3"}, "hparams: n_layer='3' is no whole number"),
        ({"mem_len": 10**9}, "hparams: mem_len=1000000000 is more than the 262144"),
        ({"mem_len": 10**400}, f"hparams: mem_len=1{'0' * 49} is more than the 262144"),
        ({"n_token": 60.0}, "n_token=60.0 is no whole number"),
        ({"d_embed": []}, "d_embed=[] is no whole number"),
        ({"mem_len": {}}, "mem_len={} is no whole number"),
        ({"cutoffs": 20}, "cutoffs=20 is not a list"),
        ({"cutoffs": ["a"]}, "cutoffs=['a'] is not a list"),
        ({"tie_projs": "abc"}, "tie_projs='abc' is not a list"),
        ({"dropout": "x"}, "config.model.dropout='x'"),
        ({"attn_type": 7}, "config.model.attn_type=7"),
        ({"n_layer": 10**9}, "lacks 'layers.3."),  # before any memory is asked for
        ({"n_token": 2**31 - 1}, "the hparams say"),
        ({"d_inner": 10**15}, "config.model.d_inner=1000000000000000"),
        ({"n_head": 0}, "n_head=0 must be at least 1"),
    ],
)
def test_hparams_that_do_not_fit(changes, message):
    state, hparams = golden_weights.read(GOLDEN)
    assert message in refusal(convert.from_original, state, hparams | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "gpt2", "vocab_size": 3}', "model_type is not 'transfo-xl'"),
        ('{"model_type": "transfo-xl"}', "model_type is not 'transfo-xl'"),
        (
            '{"model_type": "transfo-xl", "vocab_size": "3"}',
            "vocab_size is not a whole",
        ),
        ('{"model_type": "transfo-xl", "vocab_size": 3}', "has no model.safetensors"),
        ("[]", "expected an object"),
        ("{", "is not JSON"),
    ],
)
def test_hugging_face_directories_that_are_none(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    assert message in refusal(convert.from_hf, tmp_path)
