"""Arrays and settings of strangers, damaged at random: read, or refused in a line."""

import os
import zipfile

import damaged_weights
import numpy as np
import pytest

from xlformer.convert import adopt, files, leveldb, tensor_bundle
from xlformer.errors import UserError

CLASSES = ["npz", "npz compressed", "safetensors", "index of shards", "config.json"]


@pytest.mark.parametrize("name", CLASSES)
def test_damage_is_refused_in_a_line_or_changes_nothing(name, tmp_path):
    folder = damaged_weights.copy(name, tmp_path / "copy")
    draw = np.random.default_rng(CLASSES.index(name))
    outcomes = [damaged_weights.outcome(name, folder, draw) for _ in range(500)]
    assert outcomes.count("refused") > 200
    # What has checksums keeps its values; other formats may say something else.
    assert name not in damaged_weights.KEPT or "changed" not in outcomes


def test_a_small_npz_does_not_become_large_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST", 1 << 12)
    path = tmp_path / "w.npz"
    np.savez_compressed(path, w=np.arange(1 << 12, dtype=np.float32))
    assert files.read_state(path)[0]["w"][-1] == 4095
    np.savez_compressed(path, w=np.zeros(1 << 20, np.float32))
    with pytest.raises(UserError, match="4194432 of arrays in them"):
        files.read_state(path)
    # Two entries with the bytes of one.
    np.savez(path, w=np.ones(1 << 10, np.float32))
    with zipfile.ZipFile(path, "a") as archive:
        archive.filelist += archive.filelist * 31
        archive._didModify = True
    with pytest.raises(UserError, match="of arrays in them"):
        files.read_state(path)


def test_what_has_no_end_and_no_beginning_is_a_line(tmp_path):
    pipe = str(tmp_path / "pipe.json")
    os.mkfifo(pipe)
    for name in ("config.pkl", "x.index", "vocab.txt"):
        os.link(pipe, tmp_path / name)
    for read, name, said in (
        (files.read_json, pipe, "it is a pipe"),
        (files.read_json, "/dev/zero", "or a device"),
        (adopt.read_vocabulary, "/dev/zero", "or a device"),
        (adopt.read_vocabulary, f"{tmp_path}/vocab.txt", "it is a pipe"),
        (adopt.read_vocabulary, f"{tmp_path}/config.pkl", "not a file"),
        (tensor_bundle.open_bundle, f"{tmp_path}/x", "no such file"),
    ):
        with pytest.raises(UserError, match=said):
            read(files.pathlib.Path(name) if read is files.read_json else name)


def test_an_index_has_no_millions_of_entries():
    one = b"\0\1\0"
    keys = b"".join(one + bytes([k]) for k in range(100)) + bytes(4)
    assert len(list(leveldb.entries(keys, 100 * (1 + leveldb.ENTRY)))) == 100
    with pytest.raises(ValueError, match="of keys and entries"):
        list(leveldb.entries(keys, 100 * leveldb.ENTRY))
