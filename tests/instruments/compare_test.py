"""The command: what it refuses, prints and writes, with an instrument of a test."""

import argparse
import io
import json
import sys
import types

import pytest

from xlformer import command, compare, instruments, recl, storage
from xlformer.errors import UserError
from xlformer.instruments.instrument import Request, Result, Table


@pytest.fixture
def counting(monkeypatch):
    """An instrument that counts, and what it was asked."""
    module = types.ModuleType("xlformer.instruments.counting", "Counts letters.")
    module.RUNS, module.SEEDS, module.asked = False, {"small": 3, "tiny": 2}, []

    def add_flags(parser):
        parser.add_argument("--letter", default="a")
        parser.add_argument("--many", type=float)

    module.add_flags = add_flags

    def measure(request):
        module.asked.append(request)
        rows = [("seeds", request.seeds), ("half", 0.5), ("none", None)]
        facts = {"curve": [1.0, float("nan")], "letter": request.args.letter}
        table = Table("letters", ("what", "many"), rows)
        return Result([table], facts, _draw, ["It is a test."])

    module.measure = measure
    monkeypatch.setitem(instruments.NAMES, "counting", "how many letters there are")
    monkeypatch.setitem(sys.modules, "xlformer.instruments.counting", module)
    return module


def _draw(figure):
    figure.subplots().plot([1, 2, 3])


def test_a_table_is_printed_and_written_with_a_picture(counting, tmp_path, capsys):
    argv = ["counting:tiny", f"--out={tmp_path / 'new'}", "--letter=b", "--seeds=5"]
    assert compare.main(argv) == 0
    out, (asked,) = capsys.readouterr().out, counting.asked
    assert (asked.size, asked.seeds, asked.members) == ("tiny", 5, [])
    assert "letters\nwhat   many\nseeds     5\nhalf    0.5\nnone      -\nIt is" in out
    found = json.loads((tmp_path / "new/counting.json").read_text())
    assert found["tables"][0]["rows"][1] == ["half", 0.5]
    assert found["curve"] == [1.0, None] and found["letter"] == "b"
    assert found["command"].endswith(" ".join(argv))
    assert {"device", "jax", "date", "seconds"} <= set(found)
    assert "<svg" in (tmp_path / "new/counting.svg").read_text()


def test_without_matplotlib_there_are_numbers(counting, tmp_path, capsys, monkeypatch):
    (tmp_path / "counting.svg").write_text("of another call")
    monkeypatch.setattr(compare.pictures, "can_be_made", lambda: False)
    assert compare.main(["counting", f"--out={tmp_path}"]) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "pip install 'xlformer[plot]'" in err
    assert out.endswith(f"{tmp_path / 'counting'}.json\n")
    assert [p.name for p in tmp_path.iterdir()] == ["counting.json"]


def test_a_tiny_run_is_no_beginning_of_another(tmp_path):
    small, tiny = (Request(size, tmp_path) for size in ("small", "tiny"))
    assert small.put("a.txt", "a") != tiny.put("a.txt", "b")
    assert (small.runs, tiny.runs) == (tmp_path / "runs", tmp_path / "runs/tiny")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("recl", {"step": 0}),
        ("cost", {"segment": 0}),
        ("ablation", {"lengths": [1 << 40]}),
        ("length", {"memory": 0}),
        ("features", {"width": 1}),
        ("transfer", {"steps": 0}),
        ("tasks", {"steps": 0}),
        ("systems", {"steps": 0}),
        ("samples", {"context": 0}),
    ],
)
def test_from_python_flags_need_not_be_given(tmp_path, name, wrong):
    (flag,) = wrong
    request = Request("tiny", tmp_path, args=argparse.Namespace(**wrong))
    with pytest.raises(UserError, match=f"{flag}="):
        instruments.find(name).measure(request)
    assert not any(tmp_path.iterdir())


def test_seeds_are_those_of_the_size(counting, tmp_path):
    for size, seeds in (("", 3), (":small", 3), (":tiny", 2)):
        assert compare.main([f"counting{size}", f"--out={tmp_path}"]) == 0
        assert counting.asked[-1].seeds == seeds


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["count"], "no instrument 'count', did you mean 'counting'?"),
        (["counting:huge"], "counting:huge: no size 'huge'; known: small, tiny"),
        (["counting:"], "no size ''"),
        (["--out=x", "counting"], "--out=x stands where an instrument must"),
        (["counting"], "required: --out"),
        (["counting", "--seeds=1"], "--seeds=1 shows no spread: at least 2"),
        (["counting", "--workdir=x"], "argument --workdir: counting measures no runs"),
        (["counting", "--out=/proc/x"], "--out=/proc/x: "),
        (["counting", "--letter="], "--letter= is empty"),
        (["counting", "--many=nan"], "--many=nan must be a number up to 4,294,967,295"),
        (["counting", "--many=-inf"], "--many=-inf must be a number"),
        (["counting", f"--seeds={10**30}"], f"--seeds={10**30} must be a number"),
    ],
)
def test_bad_input_is_one_line(counting, tmp_path, capsys, argv, message):
    if "required" not in message and not any("--out" in item for item in argv):
        argv = [*argv, f"--out={tmp_path}"]
    assert compare.main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and message in err
    assert not counting.asked and not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt()])
def test_a_refusal_leaves_no_folder(counting, monkeypatch, tmp_path, capsys, error):
    def measure(request):
        assert request.out.is_dir()
        raise error

    monkeypatch.setattr(counting, "measure", measure)
    (tmp_path / "there").mkdir()
    for place in ("new", "new/er", "there", "there/new"):
        assert compare.main(["counting", f"--out={tmp_path / place}"]) in (2, 130)
        assert [p.name for p in tmp_path.iterdir()] == ["there"]
    assert not any((tmp_path / "there").iterdir())


def test_what_lies_in_the_folder_stays(counting, monkeypatch, tmp_path, capsys):
    def measure(request):
        (request.out / "text.txt").write_text("a")
        raise UserError("no")

    monkeypatch.setattr(counting, "measure", measure)
    assert compare.main(["counting", f"--out={tmp_path / 'new'}"]) == 2
    assert (tmp_path / "new/text.txt").exists()


def test_a_closed_output_loses_no_files(counting, monkeypatch, tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(command.streams, "drop_stdout", lambda: True)
    assert compare.main(["counting", f"--out={tmp_path}"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"counting.json", "counting.svg"}


def test_a_full_disk_leaves_what_was_there(counting, monkeypatch, tmp_path, capsys):
    (tmp_path / "counting.json").write_text("of yesterday")

    def replace(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "replace", replace)
    assert compare.main(["counting", f"--out={tmp_path}"]) == 2
    line = f"error: {tmp_path / 'counting.json'}: cannot be written: No space left"
    out, err = capsys.readouterr()
    # What was measured is shown all the same.
    assert err.startswith(line) and out.startswith("letters\n")
    assert [p.name for p in tmp_path.iterdir()] == ["counting.json"]
    assert (tmp_path / "counting.json").read_text() == "of yesterday"


def test_a_store_that_does_not_answer_is_one_line(counting, monkeypatch, capsys):
    class Far:
        def __fspath__(self):
            return "gs://a/b"

        __str__ = __fspath__

        def mkdir(self, **options):
            raise ValueError("no network")

    monkeypatch.setattr(storage, "path", lambda place: Far())
    assert compare.main(["counting", "--out=gs://a/b"]) == 1
    line = "error: out=gs://a/b: cannot be made: no network\n"
    assert capsys.readouterr().err == line


def test_help_lists_the_instruments(capsys):
    with pytest.raises(SystemExit, match="0"):
        compare.main(["--help"])
    assert all(f"\n  {name}" in capsys.readouterr().out for name in ["recl"])


def test_recl_is_a_command_of_its_own(tmp_path, capsys):
    assert recl.main([f"--out={tmp_path}", "--wrkdir=x"]) == 2
    assert "did you mean '--workdir'" in capsys.readouterr().err
