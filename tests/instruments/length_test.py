"""Time and memory against the length: slopes, limits, and what a row says."""

import argparse
import json
import types

import numpy as np
import pytest

from xlformer import compare, models
from xlformer.errors import UserError
from xlformer.instruments import apart, length, mechanisms, passes
from xlformer.instruments.instrument import Request
from xlformer.instruments.members import Member
from xlformer.instruments.passes import FORWARD, GRADIENT, Row

LENGTHS = [1024, 2048, 4096, 8192]
SIZES = mechanisms.SIZES["tiny"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """What the smallest form wrote."""
    out = tmp_path_factory.mktemp("length")
    assert compare.main(["length:tiny", f"--out={out}"]) == 0
    return json.loads((out / "length.json").read_text())


@pytest.fixture
def counted(monkeypatch):
    """Passes that take seconds by a formula, and which processes there would be."""
    processes = []

    def apart_rows(model, lengths, ways, **limits):
        processes.append((lengths, ways, limits))
        rows = []
        for n in lengths:
            for way in ways:
                fits = model.config.mechanism == "favor" or n < 8192
                if not fits and way == GRADIENT:
                    rows.append(Row(n, way, why=apart.MEMORY))
                    continue
                power = 1 if model.config.mechanism == "favor" else 2
                time = 1e-6 * n**power * (3 if way == GRADIENT else 1)
                rows.append(Row(n, way, time, 3, 7 * n, 5 * n))
        return rows

    monkeypatch.setattr(passes, "apart_rows", apart_rows)
    return processes


def test_a_slope_is_the_power_of_a_law():
    lengths = np.array([1000, 1700, 5000])
    assert length.slope(lengths, 3e-9 * lengths**1.7) == pytest.approx(1.7)
    # Least squares, of values beside the law: (-1, 0, 1) . (0, 1, 1) / 2.
    assert length.slope(np.exp([1, 2, 3]), np.exp([0, 1, 1])) == pytest.approx(0.5)
    assert length.slope([5], [1.0]) is None


def test_backward_is_a_gradient_without_its_forward_pass():
    rows = [
        Row(64, FORWARD, 0.5, 3, 100),
        Row(64, GRADIENT, 1.75, 3, 400),
        Row(128, FORWARD, 1.0, 3, 200),
        Row(128, GRADIENT, why=apart.MEMORY),
        Row(32, FORWARD, 0.2, 3, None),
        Row(32, GRADIENT, 0.1, 3, None),  # Disturbed: it is no time.
    ]
    found = length.curves(rows)
    assert found["forward_s"] == {64: 0.5, 128: 1.0, 32: 0.2}
    assert found["backward_s"] == {64: 1.25}
    assert found["forward_bytes"] == {64: 100, 128: 200}
    assert found["gradient_bytes"] == {64: 400}


@pytest.mark.parametrize("kind", mechanisms.KINDS)
def test_models_differ_in_their_attention_alone(kind):
    of_length = mechanisms.kind_models(kind, mechanisms.SIZES["small"], LENGTHS)
    assert list(of_length) == LENGTHS
    about = length._about(of_length)
    assert about["causal"] == (kind != "linformer")
    # Linformer's E and F: 256 rows a position in each of two layers.
    beside = 2 * 2 * LENGTHS[0] * 256 if kind == "linformer" else 0
    assert abs(about["parameters"] - beside - 116_000) < 6000
    assert len(set(of_length.values())) == (len(LENGTHS) if beside else 1)


def test_every_row_has_a_process_and_what_does_not_fit_is_a_row(
    counted, tmp_path, capsys
):
    argv = ["length", "--kinds=softmax,favor", f"--out={tmp_path}", "--memory=0.5"]
    argv.append("--lengths=2048,1024,8192,4096")
    assert compare.main(argv) == 0
    limits = {"memory": 1 << 29, "seconds": 120.0, "least_seconds": 1.0}
    work = [([n], [way], limits) for n in LENGTHS for way in passes.WAYS]
    assert counted == 2 * work
    found = json.loads((tmp_path / "length.json").read_text())
    slopes = found["slopes"]
    assert slopes["softmax"]["forward_s"]["lengths"] == [2048, 4096, 8192]
    assert slopes["softmax"]["backward_s"]["lengths"] == [1024, 2048, 4096]
    assert slopes["softmax"]["backward_s"]["slope"] == pytest.approx(2)
    assert slopes["favor"]["gradient_bytes"]["slope"] == pytest.approx(1)
    rows = {tuple(row[:2]): row[2:] for row in found["tables"][0]["rows"]}
    full = "out of memory at 0.5 GiB"
    assert rows["softmax", 8192][1::2] == [full, full]
    assert rows["favor", 1024] == pytest.approx([1.024, 2.048, 7 / 1024, 7 / 1024])
    assert "softmax, 8192 tokens, gradient: out of memory" in capsys.readouterr().err
    # Another call finds them, unless it asks for something else.
    assert compare.main(argv) == 0 and len(counted) == len(2 * work)
    assert compare.main([*argv, "--seconds=9"]) == 0
    assert len(counted) == len(4 * work)


def test_a_limit_of_memory_holds_what_jax_takes():
    (model,) = set(mechanisms.kind_models("identity", SIZES, [1]).values())
    # A vector of 16 numbers a token takes 256 MiB, and there are several.
    (row,) = passes.apart_rows(
        model, [1 << 22], [FORWARD], memory=1 << 29, seconds=120, least_seconds=0
    )
    assert row == Row(1 << 22, FORWARD, why=apart.MEMORY)


def test_where_linux_keeps_the_old_peak_there_is_none(monkeypatch):
    """It would be that of compiling."""
    (model,) = set(mechanisms.kind_models("identity", SIZES, [1]).values())
    monkeypatch.setattr(apart, "forget_peak", lambda: False)
    (row,) = passes.measured(model, [3], [FORWARD], 0)
    assert row["peak_bytes"] is None and row["seconds"] > 0


def test_the_smallest_form(tiny):
    assert list(tiny["rows"]) == list(SIZES.kinds)
    for rows in tiny["rows"].values():
        asked = [(n, way) for n in SIZES.lengths for way in passes.WAYS]
        assert [(row["length"], row["way"]) for row in rows] == asked
        for row in rows:
            assert not row["why"] and row["seconds"] > 0
            assert row["passes"] == passes.LEAST and row["planned_bytes"] > 0
    assert tiny["models"]["favor"]["mechanism"] == "favor"


def request(members=(), **flags):
    flags = {"kinds": None, "lengths": None, "memory": 4.0, "seconds": 9.0, **flags}
    return Request("tiny", None, members, args=argparse.Namespace(**flags))


def member(**fields):
    config = models.PerformerConfig(vocab_size=7, n_layer=1, d_model=8, n_head=1)
    config = {**vars(config), "d_inner": 8, "name": "performer", **fields}
    run = types.SimpleNamespace(model=models.build(config), workdir="runs/own")
    return Member("own", run)


def test_where_nothing_fits_there_is_still_a_picture(monkeypatch, tmp_path, capsys):
    """And what failed by no limit is not kept: another call tries again."""
    why = ["failed: a very long reason that nobody wants to read in a table"]

    def apart_rows(model, lengths, ways, **limits):
        return [Row(n, way, why=why[0]) for n in lengths for way in ways]

    monkeypatch.setattr(passes, "apart_rows", apart_rows)
    argv = ["length:tiny", f"--out={tmp_path}", "--kinds=favor"]
    assert compare.main(argv) == 0
    table = capsys.readouterr().out
    assert why[0][:40] in table and why[0] not in table
    assert why[0] in (tmp_path / "length.json").read_text()
    assert (tmp_path / "length.svg").exists()
    why[0] = apart.MEMORY
    for _ in range(2):
        assert compare.main(argv) == 0
        assert "out of memory at 4 GiB" in capsys.readouterr().out
        why[0] = "failed: it is not asked again"


def test_runs_are_measured_in_place_of_kinds(counted, tmp_path):
    asked = request([member()])
    asked = Request("tiny", tmp_path, asked.members, args=asked.args)
    # `tmp_path` is a folder of the test alone, as --out would be.
    assert list(length.measure(asked).facts["rows"]) == ["own"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"kinds": "sofmax"}, "kinds='sofmax', did you mean 'softmax'?"),
        ({"kinds": "lstm,lstm"}, "lstm stands there twice"),
        ({"lengths": "64"}, "lengths='64': a slope needs two lengths"),
        ({"lengths": "64,64"}, "a slope needs two lengths"),
        ({"lengths": "64,0"}, "numbers of tokens"),
        ({"lengths": "64,1e3"}, "numbers of tokens"),
        ({"lengths": f"64,{1 << 25}"}, "up to 16,777,216"),
        ({"lengths": f"64,{'9' * 5000}"}, "up to 16,777,216"),
        ({"memory": 0.0}, "memory=0.0 must be above 0"),
        ({"seconds": float("nan")}, "seconds=nan must be above 0"),
        ({"members": [member()], "kinds": "lstm"}, "kinds='lstm' with workdir: one of"),
        (
            {"members": [member(positions="learned", context_length=100)]},
            "the model's longest segment is 100 tokens, lengths has 128",
        ),
    ],
)
def test_bad_input_is_one_line(flags, message):
    with pytest.raises(UserError) as error:
        length.measure(request(**flags))
    assert message in error.value.line() and "\n" not in error.value.line()
