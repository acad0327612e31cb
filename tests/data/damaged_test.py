"""Prepared folders and stored texts that are damaged: one line that says what to do."""

import json
import os
import shutil

import numpy as np
import pytest

from xlformer import config, prepare
from xlformer.errors import UserError


def data_config(**fields):
    data = config.default_config().data
    data.update(corpus="text", **fields)
    return data


def damage_truncate(folder):
    file = folder / "train.npy"
    file.write_bytes(file.read_bytes()[:-5])


def damage_ids(folder):
    ids = np.array(np.load(folder / "train.npy"))
    ids[7] = 250
    np.save(folder / "train.npy", ids)


def damage_negative(folder):
    fields = json.loads((folder / "card.json").read_text())
    fields["splits"]["test"]["tokens"] = -1
    (folder / "card.json").write_text(json.dumps(fields))


def damage_words(folder):
    fields = json.loads((folder / "card.json").read_text())
    del fields["splits"]["test"]["words"]
    (folder / "card.json").write_text(json.dumps(fields))


def damage_record(folder):
    fields = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(fields | {"record": "3"}))


def pipe(name):
    def damage(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def damage_pickle(folder):
    with open(folder / "test.npy", "wb") as file:
        np.save(file, np.array([{}], object), allow_pickle=True)


def damage_card(folder):
    (folder / "card.json").write_text('{"format": 1, "splits": []}')


def damage_vocabulary(folder):
    (folder / "vocabulary.json").write_text("{}")


def damage_symbols(folder):
    fields = json.loads((folder / "vocabulary.json").read_text())
    fields |= {"symbols": [*fields["symbols"], "a"], "counts": [*fields["counts"], 1]}
    (folder / "vocabulary.json").write_text(json.dumps(fields))


def damage_starts(folder):
    np.save(folder / "train-documents.npy", np.array([0, 311], np.int64))


def damage_first_start(folder):
    np.save(folder / "train-documents.npy", np.array([-1, 3], np.int64))


DAMAGE = {
    damage_truncate: "train.npy: .*prepare again",
    damage_ids: "train.npy: token id out of range: 250 in a vocabulary of 10",
    damage_negative: "card.json: .*no number of tokens for test; .*prepare again",
    damage_words: "card.json: .*KeyError: 'words'; .*prepare again",
    damage_record: "card.json: .*record='3' is no size; .*prepare again",
    damage_pickle: "test.npy: .*prepare again",
    damage_card: "card.json: not a prepared corpus: .*prepare again",
    damage_vocabulary: "vocabulary.json: not a stored vocabulary.*prepare again",
    damage_symbols: "vocabulary.json: 11 symbols, and its card says 10; .*again",
    damage_starts: "train-documents.npy: no documents of 279 tokens .*prepare again",
    damage_first_start: "train-documents.npy: no documents of 279 tokens",
    lambda folder: (folder / "validation.npy").unlink(): "validation.npy: ",
    lambda folder: (folder / "card.json").unlink(): "card.json: not a prepared",
    lambda folder: (folder / "vocabulary.json").unlink(): "cannot read the vocab",
    lambda folder: (folder / "test-documents.npy").unlink(): "test-documents.npy: ",
    pipe("card.json"): "card.json: .*a pipe or a device",
    pipe("index.json"): "index.json: .*a pipe or a device",
    pipe("vocabulary.json"): "vocabulary.json: .*a pipe or a device",
    pipe("train.npy"): "train.npy: .*a pipe or a device",
}


@pytest.mark.parametrize("spoil", DAMAGE, ids=lambda d: DAMAGE[d].split(":")[0])
def test_damaged_folders_are_noticed(spoil, tmp_path):
    (tmp_path / "digits").write_text("0123456789" * 31)
    options = data_config(path=f"{tmp_path}/digits", unit="chars", documents=True)
    folder = prepare.prepare(options, directory=tmp_path / "out").directory
    prepare.load(folder)
    spoil(folder)
    with pytest.raises(UserError, match=DAMAGE[spoil]):
        prepare.load(folder)


def cut_files(folder):
    for path in folder.rglob("*.array_record-*"):
        os.truncate(path, path.stat().st_size // 2)


def remove_files(folder):
    for path in folder.rglob("*.array_record-*"):
        path.unlink()


def spoil_info(folder):
    next(folder.rglob("dataset_info.json")).write_text("{")


def spoil_facts(folder):
    next(folder.rglob("metadata.json")).write_text("{}")


@pytest.mark.parametrize("spoil", [cut_files, remove_files, spoil_info, spoil_facts])
def test_a_stored_text_that_is_damaged_is_one_line(spoil, tmp_path):
    (tmp_path / "digits").write_text("0123456789" * 31)
    options = data_config(path=f"{tmp_path}/digits", unit="chars")
    found = prepare.prepare(options, directory=tmp_path / "out")
    spoil(tmp_path / "out" / "tfds")
    options.unit = "bytes"  # another unit of the same text
    line = "tfds/.*: the text that is stored .*; delete .* and prepare again"
    with pytest.raises(UserError, match=line) as error:
        prepare.prepare(options, directory=tmp_path / "out")
    shutil.rmtree(str(error.value).split("delete ")[1].split(" and ")[0])
    again = prepare.prepare(options, directory=tmp_path / "out")
    assert again.card["payload_sha256"] == found.card["payload_sha256"]
