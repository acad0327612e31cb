"""python -m xlformer.harness where the program behind it is not installed."""

import sys

import harness_runs
import pytest
import trained_run
from harness_runs import requests

from xlformer import __main__ as names
from xlformer import config as config_lib
from xlformer import sharding
from xlformer.errors import UserError
from xlformer.harness import Answerer, __main__
from xlformer.scoring import EvalSettings

ONE = sharding.make_mesh({"data": 1})


def test_without_the_program_one_line_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for main in (__main__.main, lambda argv: names.main(["harness", *argv])):
        assert main(["--tasks=mine", "--model_args", "workdir=x"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert err.startswith("error: lm-evaluation-harness is not installed")
        assert err.endswith("pip install 'xlformer[harness]'\n")


def test_help_needs_no_program(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for argv in ([], ["--help"], ["-h"]):
        with pytest.raises(SystemExit) as end:
            __main__.main(argv)
        assert end.value.code == 0
        out = capsys.readouterr().out
        assert "--model_args workdir=DIR" in out and "prefix=false" in out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--tasks=a", "run --batch_size=auto --model=xlformer --tasks=a"),
        ("run --tasks a -b 4", "run --model=xlformer --tasks a -b 4"),
        ("--model hf --batch_size=2", "run --model hf --batch_size=2"),
        ("--config file.yaml", "run --config file.yaml"),
        ("run --help", "run --help"),
        ("ls tasks", "ls tasks"),
    ],
)
def test_what_the_program_is_given(argv, expected):
    assert __main__._completed(argv.split()) == expected.split()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"workdirs": "x"}, "no argument workdirs=x, did you mean 'workdir'?"),
        ({"workdir": "x", "task": 3}, "no argument task=3"),
        ({}, "model_args has no workdir"),
        ({"workdir": "{empty}"}, "holds no run: there is no config.json in it"),
        ({"workdir": "{config}"}, "checkpoint"),
        ({"workdir": "x", "batch_size": "two"}, "batch_size='two' is neither a number"),
        ({"workdir": "x", "batch_size": 0}, "batch_size=0 is neither a number"),
        ({"workdir": "x", "stride": "a"}, "stride='a' is not a whole number"),
    ],
)
def test_arguments_that_cannot_be(arguments, line, base, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "config").mkdir()
    config = trained_run.make_config(tmp_path, tmp_path / "text.txt")
    (tmp_path / "config" / "config.json").write_text(config_lib.to_json(config))
    places = {name: tmp_path / name for name in ("empty", "config")}
    given = {
        name: x.format(**places) if isinstance(x, str) else x
        for name, x in arguments.items()
    }
    with pytest.raises(UserError) as error:
        Answerer.open(**given)
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"prefix": "no"}, "prefix='no' is neither true nor false"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0 to 4294967295"),
        ({"max_gen_toks": 0.5}, "max_gen_toks=0.5 must be a whole number from 1 on"),
    ],
)
def test_options_that_cannot_be(options, line):
    with pytest.raises(UserError, match=line):
        Answerer(harness_runs.run(), mesh=ONE, **options)


BOTH_WAYS = dict(causal=False, n_layer=1, d_model=8, n_head=2, d_inner=8, dropout=0.0)


def test_a_model_that_looks_ahead_has_no_likelihood():
    run = harness_runs.run(name="performer", **BOTH_WAYS)
    with pytest.raises(UserError, match=r"\(causal=False\): it has no likelihood"):
        Answerer(run, mesh=ONE)


def test_a_run_is_opened_as_the_arguments_say(base):
    workdir = str(trained_run.trained(base))
    one = Answerer.open(workdir=workdir, checkpoint=1, batch_size="4", prefix=False)
    info = one.info()
    assert (info["step"], info["params"], info["batch_rows"]) == (1, "ema", 4)
    assert (info["segment_length"], info["memory_length"], info["stride"]) == (5, 7, 0)
    assert info["run"] == "tiny" and info["prefix_token_ids"] == []
    one = Answerer.open(workdir=workdir, batch_size="auto:4", memory_length=3)
    assert (one.info()["batch_rows"], one.info()["memory_length"]) == (3, 3)
    assert one.tok_encode("the") == one._run.vocabulary.encode("the").tolist()
    assert one.loglikelihood(requests(("the", ""))) == [(0.0, True)]


def test_settings_are_those_of_evaluate():
    run = harness_runs.run()
    with pytest.raises(UserError, match="has a state, which carries what a window"):
        Answerer(run, EvalSettings(stride=2), mesh=ONE)
