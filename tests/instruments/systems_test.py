"""Systems under one budget: widths, what counts as best, and the command."""

import json
import types

import pytest

from xlformer import compare
from xlformer import config as config_lib
from xlformer.errors import UserError
from xlformer.instruments import apart, systems, systems_tables, widths
from xlformer.instruments.instrument import Request
from xlformer.instruments.systems_tables import Found, Row
from xlformer.runs.locks import WorkdirLock


@pytest.mark.parametrize("budget", [1500, 22_000, 40_320, 500_000])
def test_the_width_is_the_nearest_of_all(monkeypatch, budget):
    def count(width):
        return 5 * width * width + 256 * width

    monkeypatch.setattr(widths, "parameters", lambda config, vocab: count(config))
    all_widths = range(8, 513, 8)
    nearest = min(all_widths, key=lambda width: abs(count(width) - budget))
    off = abs(count(nearest) - budget) / budget
    if off > 0.1:
        monkeypatch.setattr(widths, "Shape", _named)
        with pytest.raises(UserError, match=rf"1,500 .* {nearest} has .* tenth off"):
            widths.fitting(lambda width: width, 7, budget, widest=512)
    else:
        found = widths.fitting(lambda width: width, 7, budget, widest=512)
        assert (found.width, found.parameters) == (nearest, count(nearest))


def _named(config, width, parameters):
    model = types.SimpleNamespace(name="some")
    config = types.SimpleNamespace(model=model)
    return types.SimpleNamespace(config=config, width=width, parameters=parameters)


@pytest.mark.parametrize("system", systems.BASES)
def test_a_system_is_itself_at_any_width(system):
    """Its options stay; what the budget says is the same for all."""
    made = systems._config(system, systems.BYTES, 24)
    train = made.train
    assert (train.steps, train.batch_size, train.segment_length) == (600, 16, 64)
    dropped = [value for name, value in made.model.items() if "dropout" in name]
    assert set(dropped) == {0.0}
    assert (made.model.name, made.model.d_model) == (system, 24)
    config_lib.check(made)


def test_what_is_counted_is_what_is_trained():
    config = config_lib.load("quickstart")
    assert widths.parameters(config, 256) == 675_968


def test_words_are_those_that_are_prepared_or_named(monkeypatch, tmp_path):
    def corpora(**flags):
        args = types.SimpleNamespace(systems=None, steps=None, **flags)
        size, notes = systems._size(Request("small", tmp_path, args=args))
        return [budget.corpus for budget in size.budgets], notes

    both = ["stdlib", "penn"]
    for there in (True, False):
        monkeypatch.setattr(systems.preparing, "is_prepared", lambda data, x=there: x)
        assert corpora(manual_dir=str(tmp_path)) == (both, [])
        expected = (both, []) if there else (["stdlib"], [systems.NO_WORDS])
        assert corpora(manual_dir=None) == expected


def row(system, rate, validation, test, why=""):
    value = {
        "validation_nats": validation,
        "tokens_per_s": 7.0,
        "test": {"nats_per_token": test},
    }
    value = None if why else value
    return Row(f"{system}-{rate}", system, 8, 99, rate, value, why, 2_000_000, 3.0)


def test_the_rate_is_chosen_in_validation_and_the_order_is_that_of_test():
    rows = [
        row("a", 0.1, 2.0, 1.0),
        row("a", 0.2, 1.0, 3.0),  # The best in validation, though not on test.
        row("b", 0.1, float("nan"), 0.1),
        row("b", 0.2, 1.5, 2.0),
        row("d", 0.1, float("nan"), float("nan")),  # It diverged, and is the last.
        row("c", 0.1, 0.0, 0.0, why="out of memory"),
    ]
    found = Found(systems.TINY, "bytes", rows)
    assert [one.name for one in found.best()] == ["b-0.2", "a-0.2", "d-0.1", "c-0.1"]
    best, rates = systems_tables.of(found)
    *numbers, _, none = [line[5] for line in best.rows]
    assert numbers == pytest.approx([2.885, 4.328], 1e-3) and none is None
    assert [line[1:] for line in rates.rows][1:] == [
        (None, pytest.approx(2.164, 1e-3)),
        (None, None),
        (None, None),
    ]


def test_words_have_a_perplexity():
    found = Found(systems.TINY, "words", [row("a", 0.1, 2.0, 1.0)])
    assert systems_tables.of(found)[0].rows[0][5] == pytest.approx(2.718, 1e-3)
    assert found.score == "ppl"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The command's folder, and what it has written."""
    out = tmp_path_factory.mktemp("systems")
    assert compare.main(["systems:tiny", f"--out={out}"]) == 0
    return out, json.loads((out / "systems.json").read_text())


def test_two_systems_are_trained_and_scored(tiny):
    out, found = tiny
    rows = found["tables"][0]["rows"]
    assert {line[0] for line in rows} == {"transformer_xl", "lstm"}
    (corpus,) = found["corpora"]
    for one in corpus["runs"]:
        assert abs(one["parameters"] / systems.TINY.parameters - 1) <= 0.1
        assert one["value"]["step"] == systems.TINY.steps
        assert one["value"]["test"]["tokens_scored"] == systems.TINY.test - 1
        assert one["value"]["tokens_per_s"] > 0 and one["seconds"] > 0
        assert one["peak_bytes"] > 1e8  # Python and JAX themselves
    assert "<svg" in (out / "systems.svg").read_text()


def test_what_is_done_is_found_and_what_was_another_run_is_done_again(
    tiny, monkeypatch
):
    out, found = tiny
    asked = []

    def run(function, arguments, **limits):
        asked.append((function, arguments, limits))
        return apart.Outcome(None, apart.TIME, 5, 6.0)

    monkeypatch.setattr(apart, "run", run)
    assert compare.main(["systems:tiny", f"--out={out}"]) == 0
    again = json.loads((out / "systems.json").read_text())
    assert again["corpora"] == found["corpora"] and not asked
    # One record is gone, and one is of other options: neither counts.
    records = sorted((out / "runs/tiny").glob("*.json"))
    records[0].unlink()
    other = json.loads(records[1].read_text())
    other["config"]["seed"] += 1
    records[1].write_text(json.dumps(other))
    for _ in range(2):  # What ran out of time is not kept, and tried again.
        asked.clear()
        assert compare.main(["systems:tiny", f"--out={out}"]) == 0
        assert len(asked) == 2 and asked[0][0] is systems.run
    notes = json.loads((out / "systems.json").read_text())["notes"]
    assert [note.rpartition(": ")[2] for note in notes] == ["out of time"] * 2


def test_what_another_call_trains_now_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(apart, "run", None)
    shape = widths.Shape(systems._config("lstm", systems.TINY, 8), 8, 99)
    with (
        WorkdirLock(tmp_path / "text-lstm-0.002-2"),
        pytest.raises(UserError, match="is in use by"),
    ):
        systems._trial("lstm", shape, 0.002, systems.TINY, tmp_path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([":tiny", "--systems=lstm,lstn"], "no system 'lstn', did you mean 'lstm'?"),
        ([":tiny", "--systems=lstm,lstm"], "has lstm twice, which would be compared"),
        ([":tiny", "--steps=0"], "--steps=0 must be at least 1"),
        ([":tiny", "--manual_dir=/"], "--manual_dir=/: tiny reads no Penn Treebank"),
        (["", "--manual_dir=/no"], "--manual_dir=/no: there is no such folder"),
        (["", "--workdir=x"], "unknown argument --workdir: systems measures no runs"),
        ([":tiny", "--seeds=2"], "--seeds: systems has no spread"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, argv, message):
    size, *flags = argv
    out = tmp_path / "out"
    assert compare.main([f"systems{size}", *flags, f"--out={out}"]) == 2
    stdout, err = capsys.readouterr()
    assert stdout == "" and err.splitlines()[-1].startswith("error: ")
    assert message in err and not (out / "runs").exists()
