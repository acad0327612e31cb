"""What every command shares."""

import pytest

from xlformer import command
from xlformer.errors import UserError, did_you_mean


def _parser():
    parser = command.Parser(prog="x")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--rows", type=int, default=3)
    return parser


def test_flags_and_overrides_are_told_apart():
    argv = ["--workdir=a", "--config.train.steps=7", "--rows=5", "--config.seed=2"]
    args, overrides = _parser().parse_with_overrides(argv)
    assert (args.workdir, args.rows) == ("a", 5)
    assert overrides == ["train.steps=7", "seed=2"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--workdir=a", "--row=5"],
            "unknown argument '--row=5', did you mean '--rows'",
        ),
        (["--workdir=a", "--rows=many"], "--rows: invalid int value: 'many'"),
        (["--rows=5"], "required: --workdir"),
        (["--workdir=a", "--config.seed=2"], "takes no config overrides"),
    ],
)
def test_complaints_are_user_errors(argv, message):
    with pytest.raises(UserError) as error:
        _parser().parse(argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two\n  lines   of text"), 2, "error: two lines of text"),
        (MemoryError("17 TiB"), 2, "error: out of memory: 17 TiB"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_an_exit_code(error, code, line, capsys):
    def main(argv):
        assert argv == ["a"]
        raise error

    assert command.run(main, ["a"]) == code
    assert capsys.readouterr().err == line + "\n"


def test_an_error_of_ours_keeps_its_traceback():
    def main(argv):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        command.run(main, [])


def test_the_nearest_name_is_suggested_or_all_are_listed():
    assert did_you_mean("adm", ["adam", "sgd"]) == ", did you mean 'adam'?"
    assert did_you_mean("wings", ["sgd", "adam"]) == "; known: adam, sgd"
