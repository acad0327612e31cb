"""Three ways of reading: what they compute, what they took, bad input."""

import json

import numpy as np
import pytest
import trained_run

from xlformer import compare, config, models
from xlformer.errors import UserError
from xlformer.instruments import contexts, cost, cost_tables

LENGTH, COUNT = 5, 9
IDS = np.random.default_rng(2).integers(0, 13, 2 * LENGTH + COUNT).astype(np.int32)


def read(model, params, way, *, length=LENGTH, segment=1, first=0):
    """Nats of COUNT targets, read from the beginning."""
    model = cost.reader(model, way, length)
    assert model.memory_length == (0 if way == "recomputed" else length)
    segments = COUNT // segment
    call = cost.program(model, params, segment=segment, segments=segments)
    count = COUNT + model.extended_length + 1
    return np.asarray(call(IDS[first : first + count]))


def build(**fields):
    found = config.load("quickstart:debug").model
    found.update(scan_layers=True, **fields)
    model = models.build(found, 13)
    return model, trained_run.random_params(model)


def test_a_window_sees_further_than_what_is_recomputed_in_a_deep_stack_only():
    for layers in (1, 2):
        model, params = build(n_layer=layers)
        # Of a memory of L tokens one layer sees these and the token itself.
        window_N = read(model, params, "window", first=LENGTH)
        recomputed_N = read(model, params, "recomputed", length=LENGTH + 1)
        far = np.abs(window_N - recomputed_N)[LENGTH:]
        assert far.max() < 1e-4 if layers == 1 else far.max() > 1e-2


def test_recomputing_is_the_exact_context_and_a_segment_is_its_tokens():
    model, params = build()
    places_N = LENGTH + np.arange(COUNT)
    found_CN = np.zeros((1, COUNT), np.float32)
    contexts.score(model, params, IDS, places_N, [LENGTH], found_CN)
    recomputed_N = read(model, params, "recomputed")
    np.testing.assert_allclose(recomputed_N, found_CN[0], rtol=1e-5, atol=1e-5)
    # As long as nothing has left the memory, the other two are the same.
    window_N = read(model, params, "window", length=COUNT)
    recurrent_N = read(model, params, "recurrent", length=COUNT, segment=3)
    np.testing.assert_allclose(window_N, recurrent_N, rtol=1e-5, atol=1e-5)


def test_a_line_and_how_well_it_fits():
    assert cost_tables.line([1, 2, 3], [5, 7, 9]) == pytest.approx((2, 3, 1))
    slope, intercept, r2 = cost_tables.line([0, 1, 2], [0, 1, 0])
    assert (slope, intercept, r2) == pytest.approx((0, 1 / 3, 0))


def test_times_are_measured_beside_each_other(tmp_path, capsys):
    assert compare.main(["cost:tiny", f"--out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "cost.json").read_text())
    assert [row["length"] for row in found["measured"]] == [8, 16, 24]
    for row in found["measured"]:
        assert all(row[way] > 0 for way in cost.WAYS)
        assert [len(row[f"{way}_seconds"]) for way in cost.WAYS] == [2] * 3
    pairs = [(fit["above"], fit["below"]) for fit in found["lines"]]
    assert pairs == list(cost_tables.PAIRS)
    (table,) = found["tables"]
    # What is honest comes first.
    assert table["columns"][1] == "window/recurrent"
    first = found["measured"][0]
    assert table["rows"][0][1] == first["window"] / first["recurrent"]
    assert "R2" in capsys.readouterr().out
    assert "attention length (tokens)" in (tmp_path / "cost.svg").read_text()


def test_a_way_without_room_is_a_gap():
    row = {"window": 2.0, "recurrent": 1.0, "recomputed": None}
    assert cost_tables.ratio(row, "window", "recurrent") == 2
    assert cost_tables.ratio(row, "recomputed", "recurrent") is None


@pytest.mark.parametrize("name", ["quickstart", "universal_small"])
def test_a_window_shorter_than_the_attention_is_refused(name):
    fields = {"memory_length": LENGTH, "window": LENGTH - 1}
    found = config.load(f"{name}:debug").model
    found.update(fields)
    model = models.build(found, 13)
    for way in cost.WAYS:
        assert cost.reader(model, way, LENGTH).card()["window"] == LENGTH - 1
        with pytest.raises(UserError, match="distances up to 4, which is less than"):
            cost.reader(model, way, LENGTH + 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--lengths=8,16"],
            "--lengths=8,16: at least three lengths of 1 to 1048576",
        ),
        (["--lengths=8,16,x"], "--lengths=8,16,x: at least three lengths"),
        (["--lengths=8,16,1048577"], "--lengths=8,16,1048577: at least three lengths"),
        (["--segment=0"], "--segment=0 must be at least 1 and at most 1048576"),
        (["--segment=1048577"], "--segment=1048577 must be at least 1"),
        (
            ["--config=lstm_small:debug"],
            "--config=lstm_small:debug: LSTM cannot be read",
        ),
        (["--config=vanilla_small:debug"], "VanillaTransformer cannot be read in the"),
        (["--config=quickstrat"], "did you mean 'quickstart'?"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, flags, message):
    assert compare.main(["cost:tiny", f"--out={tmp_path}", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
