"""Bad input of the commands that read: one line, exit code 2, nothing written."""

import json
import pathlib

import numpy as np
import pytest
import trained_run

from xlformer import command as command_lib
from xlformer import evaluate, generate, prepare, runs
from xlformer.convert.__main__ import main as convert
from xlformer.errors import UserError

COMMANDS = {"evaluate": evaluate.main, "generate": generate.main}
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
PROMPT = "--prompt=the"


@pytest.fixture
def workdir(base, tmp_path):
    return trained_run.copy(base, tmp_path / "run")


def snapshot(directory):
    return {p: p.stat().st_mtime_ns for p in sorted(directory.rglob("*"))}


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a command; returns the one line it says."""

    def run(main, *argv):
        capsys.readouterr()  # What fixtures said.
        before = snapshot(tmp_path)
        code = main([str(a) for a in argv])
        captured = capsys.readouterr()
        assert code == 2, captured
        assert captured.err.startswith("error: "), captured
        assert captured.err.count("\n") == 1 and len(captured.err) < 1200, captured
        assert captured.out == ""
        assert snapshot(tmp_path) == before
        return captured.err

    return run


def flags_of(command, workdir):
    needed = {"evaluate": (), "generate": (PROMPT,)}[command]
    return f"--workdir={workdir}", *needed


@pytest.mark.parametrize("command", COMMANDS)
def test_workdirs_that_hold_no_run(command, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("empty", "foreign", "missing", "file"):
        line = refused(COMMANDS[command], *flags_of(command, tmp_path / name))
        assert f"--workdir={tmp_path / name} holds no run" in line
    line = refused(COMMANDS[command], PROMPT if command == "generate" else "--split=x")
    assert "the following arguments are required: --workdir" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_checkpoints_that_are_not_there(command, refused, workdir):
    main, flags = COMMANDS[command], flags_of(command, workdir)
    assert "no checkpoint of step 7" in refused(main, *flags, "--checkpoint=7")
    assert "--checkpoint=last is" in refused(main, *flags, "--checkpoint=last")
    assert "--params=both is neither" in refused(main, *flags, "--params=both")
    (workdir / runs.CHECKPOINTS).rename(workdir / "elsewhere")
    assert "there is no checkpoint" in refused(main, *flags)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_checkpoint_damaged(command, damage, refused, workdir):
    for path in sorted((workdir / runs.CHECKPOINTS).rglob("*")):
        if not path.is_file():
            continue
        content = bytearray(path.read_bytes())
        if damage == "flip":
            content = bytes(b ^ 0xFF for b in content)
        elif damage == "truncate":
            content = content[: len(content) // 2]
        path.write_bytes(b"" if damage == "empty" else content)
        if damage == "delete":
            path.unlink()
    for which in ("best", "latest", "1", "2"):
        line = refused(
            COMMANDS[command], *flags_of(command, workdir), f"--checkpoint={which}"
        )
        assert "no intact checkpoint" in line or "there is no checkpoint" in line


def test_token_id_out_of_range(refused, workdir, tmp_path):
    """In the prepared data, copied so that only this run sees it."""
    config = json.loads((workdir / runs.CONFIG).read_text())
    data = prepare.prepare(runs.read_config(workdir).data).directory
    config["data"]["directory"] = str(tmp_path / "prepared")
    (workdir / runs.CONFIG).write_text(json.dumps(config))
    target = tmp_path / "prepared" / data.name
    target.mkdir(parents=True)
    for path in data.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tokens = np.load(target / "test.npy")
    tokens[3] = 29
    np.save(target / "test.npy", tokens)
    line = refused(evaluate.main, f"--workdir={workdir}")
    assert "test.npy: token id out of range: 29 in a vocabulary of 29" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt=Zoë",), "--prompt: not in the vocabulary of 29 chars: 'Z'"),
        (("--prompt=",), "--prompt is empty"),
        ((PROMPT, "--prompt="), "--prompt is empty"),
        (("--prompt_file=/nowhere/p.txt",), "--prompt_file=/nowhere/p.txt: "),
        (("--prompt_file=/",), "--prompt_file=/: "),
        (("--prompt_file=",), "argument --prompt_file: the path is empty"),
        ((PROMPT, "--num_tokens=0"), "--num_tokens=0 and --num_samples=1 must be at"),
        ((PROMPT, "--num_tokens=-7"), "--num_tokens=-7"),
        ((PROMPT, "--num_tokens=2.5"), "invalid int value: '2.5'"),
        ((PROMPT, "--num_samples=0"), "--num_samples=0"),
        ((PROMPT, "--temperature=-1"), "--temperature=-1.0 must be finite"),
        ((PROMPT, "--temperature=hot"), "invalid float value: 'hot'"),
        ((PROMPT, "--temperature=nan"), "--temperature=nan"),
        ((PROMPT, "--top_k=-3"), "--top_k=-3 must not be negative"),
        ((PROMPT, "--top_k=x"), "invalid int value: 'x'"),
        ((PROMPT, "--top_p=0"), "--top_p=0.0 must be in (0, 1]"),
        ((PROMPT, "--top_p=1.01"), "--top_p=1.01"),
        ((PROMPT, "--seed=-1"), "--seed=-1 must be from 0"),
        ((PROMPT, "--seed=99999999999999999999999"), "--seed=9999"),
        ((PROMPT, "--seed=x"), "invalid int value: 'x'"),
        ((PROMPT, "--memory_length=0"), "a memory of 0 carries nothing"),
        ((PROMPT, "--memory_length=-5"), "--memory_length=-5 must not be negative"),
        ((PROMPT, "--preset=papers"), "invalid choice: 'papers'"),
        ((PROMPT, "--num_token=3"), "did you mean '--num_tokens'?"),
        ((PROMPT, "--config.seed=3"), "takes no config overrides"),
        ((PROMPT, "the"), "unknown argument 'the'"),
    ],
)
def test_flags_of_generate(flags, message, refused, base):
    workdir = trained_run.trained(base)
    assert message in refused(generate.main, f"--workdir={workdir}", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--split=dev",), "--split=dev is none of train, validation, test"),
        (("--text=/nowhere/t.txt",), "/nowhere/t.txt: cannot read the text"),
        (("--text=/",), "/: cannot read the text"),
        (("--text=a", "--split=test"), "--text=a with --split=test: a file of"),
        (("--text=",), "argument --text: the path is empty"),
        (("--segment_length=0",), "--segment_length=0 must be at least 1"),
        (("--segment_length=-5",), "--segment_length=-5"),
        (("--segment_length=5.5",), "invalid int value: '5.5'"),
        (("--batch_size=0",), "--batch_size=0"),
        (("--batch_size=-1",), "--batch_size=-1"),
        (("--batch_size=x",), "invalid int value: 'x'"),
        (("--memory_length=-5",), "--memory_length=-5 must not be negative"),
        (("--memory_length=3,-5",), "--memory_length=-5 must not be negative"),
        (
            ("--checkpoint=",),
            "--checkpoint= is neither best, latest, average:N nor a step",
        ),
        (("--memory_length=3,",), "--memory_length=: expected int, as in 0"),
        (("--memory_length=",), "--memory_length=: expected int"),
        (("--memory_length=1e3",), "--memory_length=1e3: expected int"),
        (
            ("--memory_length=3,5", "--text=/dev/stdin"),
            "/dev/stdin can be read only once",
        ),
        (("--memory_length=0", "--same_length"), "a token must see itself"),
        (("--follow", "--checkpoint=1"), "--checkpoint=1 with --follow"),
        (("--follow", "--text=/dev/stdin"), "can be read only once, --follow"),
        (("--follow", "--params=both"), "--params=both is neither"),
        (("--process_id=0",), "--num_processes and --process_id go together"),
        (("--clamp_length=-2",), "--clamp_length=-2 must not be negative"),
        (("--clamp_length=x",), "invalid int value: 'x'"),
        (("--same_length=maybe",), "--same_length=maybe: expected bool, as in False"),
        (("--warmup=some",), "--warmup=some is none of auto, exact, fill, none"),
        (("--dynamic=adam",), "--dynamic=adam is none of sgd, rms"),
        (("--dynamic=sgd", "--stride=3"), "--dynamic=sgd with --stride=3: "),
        (("--dynamic=sgd", "--follow"), "--dynamic=sgd with --follow"),
        (("--dynamic=sgd", "--dynamic_rate=x"), "--dynamic_rate=x: expected float"),
        (("--dynamic=sgd", "--dynamic_rate=1,-1"), "--dynamic_rate=-1.0 must not be"),
        (("--dynamic=sgd", "--dynamic_rate=1e999"), "--dynamic_rate=inf is no finite"),
        (("--dynamic=sgd", "--dynamic_decay=nan"), "--dynamic_decay=nan is no finite"),
        (("--dynamic=sgd", "--dynamic_decay=2"), "--dynamic_decay=2.0 must be at most"),
        (("--dynamic=rms", "--dynamic_epsilon=0"), "--dynamic_epsilon=0.0 must be"),
        (("--dynamic=rms", "--dynamic_segments=0"), "--dynamic_segments=0 must be at"),
        (
            ("--dynamic=sgd", "--dynamic_epsilon=1"),
            "--dynamic_epsilon=1.0 is nothing without --dynamic=rms",
        ),
        (("--dynamic_rate=1",), "--dynamic_rate=1.0 is nothing without --dynamic=sgd"),
        (
            ("--dynamic=sgd", "--batch_size=2", "--warmup=fill"),
            "--warmup=fill with --dynamic=sgd and --batch_size=2: what a row replays",
        ),
        (
            ("--dynamic=sgd", "--dynamic_rate=1,2", "--text=/dev/stdin"),
            "can be read only once, --dynamic_rate names 2",
        ),
        (("--checkpont=best",), "did you mean '--checkpoint'?"),
        (("--config.eval.batch_size=3",), "takes no config overrides"),
    ],
)
def test_flags_of_evaluate(flags, message, refused, base):
    workdir = trained_run.trained(base)
    assert message in refused(evaluate.main, f"--workdir={workdir}", *flags)


def test_every_length_is_checked_before_the_first_is_scored(refused, base, monkeypatch):
    monkeypatch.setattr(evaluate.Scorer, "card", None)
    flags = (f"--workdir={trained_run.trained(base)}", "--memory_length=3,-5")
    assert "--memory_length=-5" in refused(evaluate.main, *flags)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 2, "error: out of memory: MemoryError\n"),
        (MemoryError("a\nb"), 2, "error: out of memory: a b\n"),
        (UserError("a\nb"), 2, "error: a b\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_ends_a_command(error, code, message, capsys):
    def main(argv):
        raise error

    assert command_lib.run(main) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the text is empty"),
        (b"the\xff", "byte 0xff at offset 3 is not valid UTF-8"),
        ("Zoë".encode(), "not in the vocabulary of 29 chars: 'Z', 'o', 'ë'"),
        (b"t", "the text has 1 tokens; at least 2"),
    ],
)
def test_texts_that_cannot_be_scored(content, message, refused, base, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    flags = (f"--workdir={trained_run.trained(base)}", f"--text={path}")
    assert message in refused(evaluate.main, *flags)


def test_memory_that_no_machine_has(refused, base):
    flags = (f"--workdir={trained_run.trained(base)}", f"--memory_length={10**13}")
    assert "memory_length=10000000000000 must be" in refused(evaluate.main, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config=tex",), "no such config, did you mean 'text'?"),
        (("--config=nowhere.py",), "no such file"),
        (("--config=text",), "config.data.corpus=text needs config.data.path"),
        (("--config=text:path=/nowhere/b",), "config.data.path: no such file"),
        (("--config=text:path=s3://a/b",), "only local directories and gs:// are"),
        (("--config=text:path=/proc/self/mem",), "cannot be read: "),
        (("--config=text:path=EMPTY",), "empty"),
        (("--config=text:path=LATIN,unit=chars",), "not valid UTF-8"),
        (("--config=text:path=LATIN,unit=letters",), "config.data.unit='letters'"),
        (("--config=text:pth=LATIN",), "did you mean 'path'?"),
        (("--config=text", "--config.data.pth=x"), "did you mean 'path'?"),
        (("--config=text", "--config.seed=x"), "--config.seed=x: expected int"),
        (("--config=text", "--directry=x"), "did you mean '--directory'?"),
        ((), "the following arguments are required: --config"),
    ],
)
def test_prepare(flags, message, refused, tmp_path):
    (tmp_path / "EMPTY").write_bytes(b"")
    (tmp_path / "LATIN").write_bytes("déjà vu".encode("latin-1") * 101)
    for name in ("EMPTY", "LATIN"):
        flags = [flag.replace(name, str(tmp_path / name)) for flag in flags]
    assert message in refused(prepare.main, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--source=/nowhere/w.npz",), "/nowhere/w.npz: no such file"),
        (("--source=/",), "/: no such file"),
        (("--source=",), "argument --source: the path is empty"),
        (("--source=GOLDEN", "--vocab=/nowhere"), "--vocab=/nowhere: cannot be read"),
        (("--source=GOLDEN", "--hparams=/nowhere"), "/nowhere: no such file"),
        (("--source=GOLDEN", "--format=hf"), "config.json"),
        (("--source=GOLDEN", "--fromat=hf"), "did you mean '--format'?"),
        ((), "the following arguments are required: --source"),
    ],
)
def test_convert(flags, message, refused, tmp_path):
    golden = str(GOLDEN / "attn0_post_ln.npz")
    flags = [flag.replace("GOLDEN", golden) for flag in flags]
    argv = ("--format=original", f"--workdir={tmp_path / 'run'}", *flags)
    assert message in refused(convert, *argv)
