"""The whole path: runs that are trained, dependencies of known length, bad input."""

import argparse
import dataclasses
import json
import types

import numpy as np
import pytest
import training_runs
from instruments.contexts_test import copying, periodic
from ml_collections import ConfigDict

from xlformer import compare, recl, runs, storage
from xlformer.data.vocabulary import ByteVocabulary, WordVocabulary
from xlformer.instruments import gains as gains_lib
from xlformer.instruments import recl as recl_lib
from xlformer.instruments.instrument import Request
from xlformer.instruments.members import Member


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """What `recl:tiny` leaves."""
    out = tmp_path_factory.mktemp("recl")
    assert compare.main(["recl:tiny", f"--out={out}", "--r=0.1,1"]) == 0
    return out


def test_two_runs_are_trained_and_compared(tiny):
    found = json.loads((tiny / "recl.json").read_text())
    assert found["contexts"] == [4, 8, 12, 16] and found["targets"] == 64
    assert found["spacing"] == 4 and found["text"]["split"] == "validation"
    names = [member["name"] for member in found["members"]]
    assert names == ["Transformer-XL", "LSTM"]
    for member in found["members"]:
        assert [x["r"] for x in member["by_r"]] == [0.1, 1.0]
        assert len(member["nats"]) == 4 and member["step"] == 20
        assert all(len(x["relative_gain"]) == 3 for x in member["by_r"])
        assert all(x["recl"] in found["contexts"] for x in member["by_r"])
    first, second = found["tables"]
    assert first["columns"][3:6] == ["r=0.1", "r=1", "ECL"]
    assert [row[0] for row in second["rows"]] == ["4 to 8", "8 to 12", "12 to 16"]
    picture = (tiny / "recl.svg").read_text()
    assert "context (tokens)" in picture and "LSTM" in picture


def test_given_runs_are_measured_as_they_were_when_trained(tiny, tmp_path, capsys):
    workdirs = [
        f"--workdir={tiny / 'runs/tiny' / x}" for x in ("Transformer-XL", "LSTM")
    ]
    sizes = ["--step=4", "--max_context=16", "--targets=64", "--r=0.1,1"]
    assert recl.main([*workdirs, f"--out={tmp_path}", *sizes]) == 0
    own, again = (
        json.loads((folder / "recl.json").read_text())["members"]
        for folder in (tiny, tmp_path)
    )
    for one, other in zip(own, again, strict=True):
        assert one["by_r"] == other["by_r"] and one["nats"] == other["nats"]
    assert "r=0.1  r=1  ECL" in capsys.readouterr().out


BYTES = ByteVocabulary(list(range(256)), [0] * 256)


def run(tmp_path, distance, vocabulary=BYTES):
    """A member that knows what came at this distance."""
    model, params = copying(distance=distance, vocab_size=256)
    data = ConfigDict({"data": {"corpus": "none", "path": ""}, "name": "copying"})
    data.model, data.own_model = {"name": "copying"}, ""
    found = runs.Run(tmp_path, data, model, params, vocabulary, 0, False)
    return Member(f"copying {distance}", found)


def request(tmp_path, members, *flags):
    parser = argparse.ArgumentParser()
    recl_lib.add_flags(parser)
    return Request("small", tmp_path, members, args=parser.parse_args(flags))


def test_dependencies_of_known_length_are_found(tmp_path):
    # Each token comes again after 12, and after 24, and after 36.
    (tmp_path / "text").write_bytes(bytes(periodic(12, 900).astype(np.uint8)))
    members = [run(tmp_path, distance) for distance in (12, 24, 36)]
    flags = f"--text={tmp_path / 'text'}", "--step=6", "--max_context=48"
    found = [
        recl_lib.measure(request(tmp_path, [member], *flags)) for member in members
    ]
    by_r = [one.facts["members"][0]["by_r"] for one in found]
    # With less context nothing is gained, so that the first step is the last one ...
    assert [[x["recl"] for x in each] for each in by_r] == [[12] * 3, [6] * 3, [6] * 3]
    # ... but the gain lies where it must, and ECL is the length.
    gained = [np.flatnonzero(np.array(x[0]["relative_gain"]) > 0.9) for x in by_r]
    assert [list(x) for x in gained] == [[0], [2], [4]]
    assert [one.facts["members"][0]["ecl"] for one in found] == [12, 24, 36]
    # Beside who knows it already, nobody gains anything.
    together = recl_lib.measure(request(tmp_path, members, *flags)).facts["members"]
    gains = [np.array(one["by_r"][0]["relative_gain"]) for one in together]
    assert gains[0][0] > 0.9
    assert max(gains[0][1:].max(), gains[1].max(), gains[2].max()) < 1e-6


@pytest.mark.parametrize(
    ("longest", "gained", "expected"),
    [
        (128, [1, 0, 0], (128, False, 128)),  # in the first step, from 100 to 128
        (None, [1, 0, 0], (200, False, 200)),
        (128, [0, 0, 0], (100, False, 100)),
        (70, [0, 0, 0], (70, False, 70)),
        (390, [1, 1, 1], (390, False, 390)),
        (None, [1, 1, 1], (400, True, 400)),
        (500, [1, 1, 1], (400, True, 400)),
    ],
)
def test_no_length_is_above_what_a_model_can_be_fed(
    tmp_path, longest, gained, expected
):
    losses_C1N = 9.0 - np.cumsum([0, *gained])[:, None, None] * np.ones((1, 1, 5))
    plan = recl_lib.Plan(range(100, 401, 100), [1.0], 0.01, 5, "validation", None)
    gains = gains_lib.curves(losses_C1N, plan.shares)
    nats = losses_C1N.mean((1, 2)).tolist()
    found = recl_lib._found(0, run(tmp_path, 12), plan, longest, nats, gains)
    (one,) = found["by_r"]
    assert (one["recl"], one["recl_or_more"], found["ecl"]) == expected


def test_runs_of_another_text_are_named(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(97)))
    members = [run(tmp_path, 5), run(tmp_path, 7)]
    members[1].run.config.data.path = "another"
    flags = "--step=5", "--max_context=10"
    found = recl_lib.measure(
        request(tmp_path, members, f"--text={tmp_path / 'text'}", *flags)
    )
    assert "copying 7" not in " ".join(found.notes)
    assert [one["longest_context"] for one in found.facts["members"]] == [None, None]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--step=0"], "--step=0 must be at least 1"),
        (["--targets=-1"], "--targets=-1 must be at least 1"),
        (["--step=8", "--max_context=20"], "--max_context=20 with --step=8: must be a"),
        (["--max_context=4"], "--max_context=4 with --step=4: must be a multiple"),
        (["--threshold=0"], "--threshold=0.0 must be above 0"),
        (["--threshold=1"], "--threshold=1.0 must be above 0 and below 1"),
        (["--text="], "argument --text: the path is empty"),
        (["--r=0.1,2"], "--r=0.1,2: shares above 0 and at most 1, such as 0.1"),
        (["--r=all"], "--r=all: shares above 0"),
        (["--split=valid"], "--split=valid is none of train, validation, test"),
        (["--split=test", "--text=x"], "--text=x with --split=test: a file of"),
        (
            ["--max_context=4000000000"],
            "--max_context=4000000000 is longer than the text",
        ),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(
    tmp_path, capsys, flags, message
):
    assert compare.main(["recl:tiny", f"--out={tmp_path}", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert not [*tmp_path.rglob("checkpoints")]


def test_losses_need_room_on_the_disk(tmp_path, monkeypatch):
    usage = types.SimpleNamespace(free=1)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda place: usage)
    (tmp_path / "text").write_bytes(bytes(99))
    flags = f"--text={tmp_path / 'text'}", "--step=6", "--max_context=48"
    asked = request(tmp_path, [run(tmp_path, 5)], *flags)
    line = training_runs.refusal(recl_lib.measure, asked)
    assert "no room for losses" in line and "TMPDIR names another place" in line


def test_runs_that_do_not_compare_are_refused(tiny, tmp_path, capsys):
    own = tiny / "runs/tiny/LSTM"
    for workdirs, message in (
        ((own, own), "are one run, which is compared with itself"),
        ((own, tmp_path), "holds no run"),
        # The paper's contexts are the default where runs are given.
        ((own,), "--max_context=1000 is longer than the text, which has"),
    ):
        argv = [f"--workdir={x}" for x in workdirs]
        assert recl.main([*argv, f"--out={tmp_path / 'out'}"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        assert message in err
    words = WordVocabulary(["a", "b", "<eos>"], [0] * 3)
    members = [run(tmp_path, 5), run(tmp_path, 7, vocabulary=words)]
    line = training_runs.refusal(recl_lib.measure, request(tmp_path, members))
    assert "has a vocabulary of 256 bytes, workdir=" in line
    member = run(tmp_path, 5)
    model = training_runs.blanks(256)
    ahead = Member("ahead", dataclasses.replace(member.run, model=model))
    line = training_runs.refusal(recl_lib.measure, request(tmp_path, [member, ahead]))
    assert "Blanks sees what comes after a token (causal=False)" in line
