"""The TensorFlow original's checkpoints: read, refused, and made into a run.

That the numbers agree shows golden/check_test.py.
"""

import json
import shutil
import types

import damaged_weights
import jax
import numpy as np
import pytest
from training_runs import refusal

from xlformer import convert, runs
from xlformer.convert import (
    crc32c,
    leveldb,
    tensor_bundle,
    tensorflow,
    tensorflow_shapes,
)
from xlformer.convert.__main__ import main
from xlformer.errors import UserError

SHARDED = damaged_weights.SHARDED
SEEN = {"mem_len": 5, "same_length": True, "clamp_len": 4, "tgt_len": 6}
LAST = "model.ckpt-4000.data-00002-of-00003"


@pytest.fixture
def folder(tmp_path):
    """As the authors' script leaves it: model/ with the checkpoint, data/ beside it."""
    return shutil.copytree(SHARDED, tmp_path / "model")


def values():
    with np.load(SHARDED / "values.npz") as file:
        return {f"transformer/{name}": file[name] for name in file.files}


# What is read -------------------------------------------------------------------------


def test_shards_parts_and_halves_are_read_as_they_were_written():
    """Of three shards; variables in up to four parts; one half and one bfloat16."""
    config, params = convert.from_tf(SHARDED / "model.ckpt-4000", SEEN)
    found, expected = convert.to_tf(config, params), values()
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
        assert found[name].dtype == np.float32
    bundle = tensor_bundle.open_bundle(SHARDED / "model.ckpt-4000")
    parts = [len(v.parts) for v in bundle.variables.values() if v.parts]
    dtypes = {v.dtype for v in bundle.variables.values()}
    assert sorted(parts) == [2, 3, 4] and dtypes == {1, 9, 14, 19}


def test_shapes_tell_the_model_and_hparams_what_it_sees():
    config, _ = convert.from_tf(SHARDED, SEEN)
    told = (config.vocab_size, config.n_layer, config.d_model, config.n_head)
    assert told == (200, 1, 8, 2) and (config.d_head, config.d_inner) == (3, 10)
    assert config.attend_zero_memory and config.norm_epsilon == 1e-12
    # One key more than with our same_length.
    assert (config.memory_length, config.window, config.clamp_length) == (5, 5, 4)
    config, _ = convert.from_tf(SHARDED, {"mem_len": 7})
    assert (config.memory_length, config.window, config.clamp_length) == (7, None, 0)


def test_without_hparams_a_known_size_is_read_as_its_script_evaluates_it():
    fields = {"n_layer": 18, "d_model": 1024, "n_head": 16}
    found = tensorflow_shapes.seen(None, {}, fields)
    script = {"tgt_len": 128, "mem_len": 1600, "clamp_len": 1000, "same_length": True}
    assert found == script
    given = {"mem_len": 3}
    found = tensorflow_shapes.seen(None, given, fields)
    assert found == {"mem_len": 3, "clamp_len": -1, "same_length": False}


def test_the_command_makes_a_run_of_it(folder, tmp_path, capsys):
    words = [b"<eos>", *(b"w%d" % i for i in range(198)), b"<unk>"]
    fields = {b"idx2sym": words, b"counter": dict.fromkeys(words, 2)}
    (tmp_path / "data").mkdir()
    content = damaged_weights.python_2(fields, b"wt103")
    (tmp_path / "data" / "cache.pkl").write_bytes(content)
    (tmp_path / "hparams.json").write_text(json.dumps(SEEN))
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4\nw7 w5 other\n" * 5)
    flags = [f"--source={folder}", f"--workdir={tmp_path / 'run'}", "--format=tf"]
    flags += [f"--hparams={tmp_path / 'hparams.json'}", f"--probe={tmp_path}/text.txt"]
    assert main([*flags, "--config.model.scan_layers=true"]) == 0
    assert capsys.readouterr().out.startswith("probe: ")
    run = runs.load(tmp_path / "run")
    assert run.step == 4000 and run.config.eval.segment_length == 6
    assert run.vocabulary.symbols == tuple(word.decode() for word in words)
    _, params = convert.from_tf(folder, SEEN)
    jax.tree.map(np.testing.assert_array_equal, run.params, params)


@pytest.mark.parametrize("name", ["", "/model.ckpt-4000", "/model.ckpt-4000.index"])
def test_a_directory_a_prefix_and_a_file_name_a_checkpoint(name, folder):
    (folder / "model.ckpt-1.index").write_bytes(b"")  # An older one.
    # Written on the authors' machine, where it lay elsewhere.
    path = "/usr0/home/a/EXP/model.ckpt-4000"
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{path}"\n')
    prefix = tensorflow.prefix_of(f"{folder}{name}")
    assert prefix == folder / "model.ckpt-4000"


# What is refused ----------------------------------------------------------------------


def refused(folder, hparams=SEEN):
    return refusal(convert.from_tf, folder, hparams)


def change(name, edit):
    """Edits a file of a checkpoint; of an index so that its checksums are true."""

    def apply(folder):
        path = folder / name
        path.write_bytes(edit(path.read_bytes()))

    return apply


def index(old, new):
    def edit(data):
        assert old in data and len(old) == len(new)
        return damaged_weights.resealed(data.replace(old, new))

    return change("model.ckpt-4000.index", edit)


def compressed(data):
    """The type byte of the first block, behind which all others lie."""
    _, _, at = leveldb.handle(data, len(data) - 48, len(data))
    start, size, _ = leveldb.handle(data, at, len(data))
    (_, handle), *_ = leveldb.entries(data[start : start + size], 1 << 20)
    _, size, _ = leveldb.handle(handle, 0, len(handle))
    return damaged_weights.resealed(data[:size] + b"\1" + data[size + 1 :])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / LAST).unlink(), f"{LAST}: no such file"),
        (change(LAST, lambda x: x[:-1]), "it is cut short or of another checkpoint"),
        (change(LAST, lambda x: x[:99] + b"?" + x[100:]), "its checksum differs"),
        (change("model.ckpt-4000.index", lambda x: x[:-1]), "may be cut short"),
        (change("model.ckpt-4000.index", lambda x: b"PK" * 99), "may be cut short"),
        (change("model.ckpt-4000.index", compressed), "compressed (snappy)"),
        (index(b"transformer", b"transformed"), "no variable transformer/r_w_bias"),
        (index(b"r_r_bias", b"r_q_bias"), "no variable transformer/r_r_bias"),
        (change("checkpoint", lambda x: x.replace(b"-4000", b"-4001")), "there is no"),
        (change("checkpoint", lambda x: b"\xff"), "cannot be read"),
        (change("checkpoint", lambda x: b"{}"), "no model_checkpoint_path"),
    ],
    ids=[
        *("missing shard", "cut shard", "changed shard", "cut index", "other file"),
        *("snappy", "other program", "other name", "no latest", "bytes", "json"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_one_line(folder, damage, said):
    damage(folder)
    line = refused(folder)
    assert said in line and str(folder) in line and "\n" not in line


def test_a_directory_without_a_checkpoint_or_with_two(folder, tmp_path):
    assert "no file .index" in refused(tmp_path)
    assert "gone.index: no such file" in refused(folder / "gone")
    (folder / "checkpoint").unlink()
    assert tensorflow.prefix_of(folder) == folder / "model.ckpt-4000"
    (folder / "model.ckpt-1.index").write_bytes(b"")
    assert "which: model.ckpt-1, model.ckpt-4000" in refused(folder)


@pytest.mark.parametrize(
    ("hparams", "said"),
    [
        ({}, "its shapes do not tell what a token sees: pass hparams with mem_len"),
        ({"mem_len": "5"}, "mem_len='5' is not a whole number"),
        ({"mem_len": -5}, "memory_length=-5"),
        ({"mem_len": 10**9}, "mem_len=1000000000 is more than the 262144"),
        ({"mem_len": 10**400}, f"mem_len=1{'0' * 49} is more than the 262144"),
        ({"same_length": 1}, "same_length=1 is not true or false"),
        ({"n_layer": 12}, "n_layer=12, and "),
        ({"n_head": 3}, "has 2: transformer/r_w_bias (2, 3)"),
        ({"d_model": 9}, "transformer/layer_0/rel_attn/qkv/kernel (8, 18)"),
        ({"d_inner": 1}, "transformer/layer_0/ff/layer_1/kernel (8, 10)"),
        ({"d_embed": 4}, "has 8: transformer/adaptive_embed/lookup_table (200, 8)"),
        ({"n_token": 7}, "has 200: transformer/adaptive_embed/lookup_table (200, 8)"),
        ({"untie_r": True}, "untie_r=True"),
        ({"cutoffs": [0, 20, 200]}, "cutoffs=[0, 20, 200]"),
    ],
    ids=str,
)
def test_wrong_hparams_are_named_with_the_shapes_that_contradict(hparams, said):
    line = refused(SHARDED, hparams and SEEN | hparams)
    assert said in line and ("hparams: " in line or not hparams or "-5" in said)


def test_every_div_val_that_gives_these_widths_is_the_right_one():
    """Tables of 6 and 1 numbers are those of 4, 5 and 6."""
    sizes = {"vocab_size": 9, "n_layer": 1, "d_model": 6, "n_head": 1, "d_inner": 2}
    fields = {"d_embed": 6, "cutoffs": (5,), "div_val": 4, "tie_projections": ()}
    fields |= {"d_head": 6, "untie_r": False, "proj_same_dim": True}
    bundle = types.SimpleNamespace(prefix="model.ckpt", variables={})
    for value in (4, 5, 6):
        tensorflow_shapes.check_flags(bundle, {"div_val": value}, sizes | fields)
    for value in (1, 3, 7):
        with pytest.raises(UserError, match=f"div_val={value}, and model.ckpt has 4"):
            tensorflow_shapes.check_flags(bundle, {"div_val": value}, sizes | fields)


def test_nothing_is_written_where_the_command_refuses(folder, tmp_path, capsys):
    cache = damaged_weights.CACHES / "wt103" / "cache.pkl"
    shutil.copy(cache, folder)
    (tmp_path / "hparams.json").write_text(json.dumps(SEEN))
    flags = [f"--source={folder}", f"--workdir={tmp_path / 'run'}", "--format=tf"]
    for more, said in (
        ([f"--hparams={tmp_path / 'hparams.json'}"], "cache.pkl has 13 symbols, the"),
        ([], "what a token sees: pass --hparams with mem_len"),
    ):
        assert main([*flags, *more]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and said in err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name",
    ["index", "resealed index", "data", "pickle of words", "pickle of bytes"],
)
def test_whatever_is_damaged_is_refused_or_changes_nothing(name, tmp_path):
    """But for what carries no checksum; tests/soak/weights.py goes on for longer."""
    folder = damaged_weights.copy(name, tmp_path / "copy")
    draw = np.random.default_rng(5)
    outcomes = [damaged_weights.outcome(name, folder, draw) for _ in range(500)]
    assert outcomes.count("refused") > 400
    assert name not in damaged_weights.KEPT or "changed" not in outcomes


# The checksum -------------------------------------------------------------------------


def by_bits(data):
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ crc32c.POLYNOMIAL * (register & 1)
    return register ^ 0xFFFFFFFF


def test_crc32c_is_that_of_the_standard(monkeypatch):
    known = {b"": 0, b"123456789": 0xE3069283, bytes(32): 0x8A9136AA}
    known[b"\xff" * 32] = 0x62A8AB43  # RFC 3720, B.4.
    for data, crc in known.items():
        assert crc32c.crc32c(data) == crc
    monkeypatch.setattr(crc32c, "LEVELS", 2)  # Blocks of 16 bytes.
    data = np.random.default_rng(1).integers(0, 256, 70, dtype=np.uint8)
    for size in range(71):
        assert crc32c.crc32c(data[:size]) == by_bits(data[:size].tolist()), size
    whole = data[:68].view("<f4")
    assert crc32c.crc32c(whole) == by_bits(data[:68].tolist())
