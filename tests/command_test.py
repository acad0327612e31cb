"""What every command shares."""

import errno
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import jax
import pytest
import trained_run

import xlformer
from xlformer import __main__ as names
from xlformer import command, evaluate, generate, prepare, train
from xlformer.convert.__main__ import main as convert
from xlformer.errors import Argument, UserError, WorthAnotherTry, about, did_you_mean

ROOT = pathlib.Path(__file__).parent.parent


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


def test_a_typo_in_a_required_flag_is_named_as_one():
    expected = "unknown argument '--wrkdir=a', did you mean '--workdir'"
    with pytest.raises(UserError, match=expected):
        _parser().parse(["--wrkdir=a"])


def test_a_path_that_is_not_utf_8_is_refused():
    parser = command.Parser(prog="x")
    parser.add_argument("--workdir", type=command.place)
    with pytest.raises(UserError, match=r"the path is not UTF-8: b'a\\xff'"):
        parser.parse([f"--workdir={os.fsdecode(bytes([97, 255]))}"])


def test_an_override_may_have_a_space_as_any_flag_may():
    argv = ["--config.train.steps", "7", "--workdir", "a", "--config.b.c", "-1"]
    args, overrides = _parser().parse_with_overrides(argv)
    assert args.workdir == "a" and overrides == ["train.steps=7", "b.c=-1"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.train.steps"], "--config.train.steps needs a value: "),
        (["--config.train.steps", "--workdir=a"], "--config.train.steps=VALUE"),
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


@pytest.mark.parametrize("overrides", [False, True])
def test_an_argument_is_named_as_the_flag_that_a_command_has(overrides, capsys):
    workdir, seed = Argument("workdir", pathlib.Path("a b")), Argument("config.seed", 3)
    rows, mask = Argument("rows", -1), Argument("mask")
    error = UserError(rows, " with ", mask, ": see ", workdir, ", ", seed)
    assert str(error) == "rows=-1 with mask: see workdir='a b', config.seed=3"

    def main(argv):
        parser = _parser()
        (parser.parse_with_overrides if overrides else parser.parse)(argv)
        raise error

    assert command.run(main, ["--workdir=a b"]) == 2
    dashes = "--" * overrides
    line = f"error: --rows=-1 with mask: see --workdir=a b, {dashes}config.seed=3\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("what", [Argument("workdir", "a"), "a/config.json"], ids=str)
def test_what_an_error_is_about_stands_before_it(what):
    with pytest.raises(WorthAnotherTry) as raised, about(what):
        raise WorthAnotherTry(Argument("rows", 3), " is late")
    assert raised.value.line(["rows"]) == f"{what}: --rows=3 is late"


# Flags of other programs, and of convert where a run is read: whoever calls has none.
OF_OTHERS = {"pieces.py": "--eos_id=-1", "reading.py": "--vocab=FILE"}


def test_errors_of_the_library_name_no_flags():
    for path in (ROOT / "xlformer").rglob("*.py"):
        text = path.read_text()
        if "--" not in text or "command.Parser(" in text or path.name == "command.py":
            continue
        for part in text.split("UserError(")[1:]:
            line = part[: part.index("\n\n")] if "\n\n" in part else part
            line = re.split(r"^ *raise |^ *(?:def|return|if|for) ", line, flags=re.M)[0]
            allowed = OF_OTHERS.get(path.name, "no flag")
            flags = re.findall(r"--[a-z]\w*", line)
            assert not flags or allowed in line, f"{path.name}: {line}"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two\n  lines   of text"), 2, "error: two lines of text"),
        (UserError("a \x1b[2J\x07\x9bb"), 2, "error: a \ufffd[2J\ufffd\ufffdb"),
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


# Folders and files -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "path", "line"),
    [
        (["--workdir=/a/b"], "/a/b", "--workdir=/a/b: Permission denied"),
        (["--workdir", "/a/b"], "/a/b", "--workdir=/a/b: Permission denied"),
        (["--workdir=~/b"], "/h/b/c", "--workdir=~/b: Permission denied: /h/b/c"),
        # A folder on the way to it.
        (["--json=/a/b/c"], "/a", "--json=/a/b/c: Permission denied: /a"),
        (["--directory=/a", "--workdir=/a/b"], "/a/b/c", "--workdir=/a/b: "),
        (["--prompt=/"], "/data/x", "XLFORMER_DATA=/data: Permission denied: /data/x"),
        (["--config.data.directory=/d"], "/d", "--config.data.directory=/d: "),
        ([], "/elsewhere", "/elsewhere: Permission denied"),
    ],
)
def test_a_folder_is_named_with_its_flag(argv, path, line, capsys, monkeypatch):
    monkeypatch.setenv("XLFORMER_DATA", "/data")
    monkeypatch.setenv("HOME", "/h")

    def main(argv):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    assert command.run(main, argv) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert not before and last.startswith(f"error: {line}")


def test_the_default_cache_says_how_to_have_another(capsys, monkeypatch):
    monkeypatch.delenv("XLFORMER_DATA")
    monkeypatch.setenv("HOME", "/h")

    def main(argv):
        raise OSError(errno.EROFS, "Read-only file system", "/h/.cache/xlformer/x")

    assert command.run(main, []) == 2
    line = "error: XLFORMER_DATA=~/.cache/xlformer (the default): Read-only file system"
    assert capsys.readouterr().err.startswith(line)


def test_an_error_of_the_network_or_of_ours_keeps_its_traceback():
    for error in (ConnectionResetError(errno.ECONNRESET, "reset"), OSError("a bug")):

        def main(argv, error=error):
            raise error

        with pytest.raises(OSError):
            command.run(main, [])


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(trained_run.TEXT * trained_run.LINES)
    return path


def last_line(capsys, code):
    *_, line = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith("error: "), line
    return line


@pytest.mark.parametrize("place", ["/dev/null/x", "{tmp}/file", "{tmp}/" + "n" * 300])
def test_a_cache_that_cannot_be_made(place, book, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("x")
    place = place.format(tmp=tmp_path)
    text = f"--config=text:path={book},debug"
    flag = [text, f"--directory={place}"]
    assert f"--directory={place}" in last_line(capsys, prepare.main(flag))
    monkeypatch.setenv("XLFORMER_DATA", place)
    argv = [text, f"--workdir={tmp_path / 'run'}"]
    for main, flags in ((prepare.main, argv[:1]), (train.main, argv)):
        assert f"XLFORMER_DATA={place}" in last_line(capsys, main(flags))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def open_directory():
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield name


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be someone else")
@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_a_folder_of_another_user(name, open_directory, capsys):
    # Not below pytest's own directory, which is nobody else's.
    base = pathlib.Path(open_directory)
    run = base / "run"
    shutil.copytree(ROOT / "tests" / "golden" / "run-0.1.0" / "run", run)
    text = f"--config=text:path={base / 'text.txt'},debug"
    (base / "text.txt").write_text(trained_run.TEXT * trained_run.LINES)
    closed = run / name
    os.chmod(closed, 0o700)
    calls = (
        (evaluate.main, [f"--workdir={run}"]),
        (generate.main, [f"--workdir={run}", "--prompt=the"]),
        (train.main, [text, f"--workdir={run}"]),
        (train.main, [text, f"--workdir={run / 'in' / 'it'}"]),
        (prepare.main, [text, f"--directory={run / 'in'}"]),
    )
    for main, argv in calls[: 2 if name else None]:
        os.seteuid(12345)
        try:
            code = main(argv)
        finally:
            os.seteuid(0)
        line = last_line(capsys, code)
        assert str(run) in line, line
        assert "ermission denied" in line or "cannot be written by" in line


def test_home_is_what_a_tilde_stands_for(book, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    argv = ["--config=text:path=~/book.txt,debug", "--directory=~/cache"]
    assert prepare.main(argv) == 0
    assert f"directory {tmp_path / 'cache'}" in capsys.readouterr().out
    for flags in (
        ["--workdir=~/none", "--prompt_file=~/book.txt"],
        ["--workdir", "~/none"],
    ):
        assert str(tmp_path / "none") in last_line(capsys, generate.main(flags))
    flags = ["--source=~/w.npz", "--format=original", "--workdir=~/w"]
    assert str(tmp_path / "w.npz") in last_line(capsys, convert(flags))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["book.txt", "cache"]


def test_a_user_without_a_home(monkeypatch, capsys):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for such a uid
    assert "set HOME" in last_line(capsys, generate.main(["--workdir=~/run"]))
    monkeypatch.delenv("XLFORMER_DATA")
    line = last_line(capsys, prepare.main([f"--config=text:path={__file__}"]))
    assert line.endswith("set HOME or XLFORMER_DATA")


# Devices -----------------------------------------------------------------------------


def test_a_platform_that_is_not_there():
    run = ROOT / "tests" / "golden" / "run-0.1.0" / "run"
    for wanted in ("cuda", "nonsense"):
        found = subprocess.run(
            [sys.executable, "-m", "xlformer.generate", f"--workdir={run}"],
            env=os.environ | {"JAX_PLATFORMS": wanted, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        line = f"error: JAX_PLATFORMS={wanted}: there is no such device"
        assert found.returncode == 2 and found.stderr.startswith(line), found.stderr
        assert found.stderr.count("\n") == 1 and " cpu" in found.stderr


def test_an_error_of_ours_is_not_a_missing_platform():
    def main(argv):
        raise AssertionError("a bug")

    with pytest.raises(AssertionError, match="a bug"):
        command.run(main, [])


# Names of commands -------------------------------------------------------------------


def test_the_commands_are_listed_and_started_by_name(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/lib/xlformer/__main__.py"])
    assert names.main([]) == 0
    listed = capsys.readouterr().out
    for name in names.COMMANDS:
        assert f"\n  {name} " in listed
        with pytest.raises(SystemExit) as end:
            names.main([name, "--help"])
        assert end.value.code == 0
        assert f"python -m xlformer {name} " in capsys.readouterr().out.split("\n")[0]
    assert names.main(["trian"]) == 2
    line = "error: unknown command 'trian', did you mean 'train'?\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("started", "usage"),
    [
        ("/usr/bin/xlformer", "usage: xlformer x "),
        ("/lib/xlformer/__main__.py", "usage: python -m xlformer x "),
        ("/lib/xlformer/x.py", "usage: python -m xlformer.x "),
    ],
)
def test_usage_says_how_it_was_started(started, usage, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started])
    parser = command.Parser(prog="python -m xlformer.x")
    assert parser.format_usage().startswith(usage)


def test_versions(capsys):
    expected = f"xlformer {xlformer.__version__}, jax {jax.__version__}, Python "
    for argv in (["--version"], ["train", "--version"]):
        try:
            assert names.main(argv) == 0
        except SystemExit as end:
            assert end.code == 0
        assert capsys.readouterr().out.startswith(expected)
