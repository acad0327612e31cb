"""What train prints when it is given something impossible: one line, exit code 2.

The commands that only read a run have theirs in bad_input_read_test.py.
"""

import os
import pathlib
import resource
import types
import zipfile

import pytest
import trained_run
from training_runs import refusal, write_text

from xlformer.runs import checkpoints, log, writing
from xlformer.runs.checkpoints import Checkpoints
from xlformer.train import main

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Texts, good and bad, and archives of another size and content."""
    folder = tmp_path_factory.mktemp("files")
    write_text(folder / "text.txt")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "short.txt").write_bytes(b"ab")
    (folder / "latin1.txt").write_bytes(b"caf\xe9 " * 99)
    (folder / "config.py").write_text("x = 1\n")
    with zipfile.ZipFile(folder / "enwik8.zip", "w") as archive:
        archive.writestr("enwik8", b"not those bytes " * 99)
    return folder


@pytest.fixture
def run(base, tmp_path, complaints_stay_here):
    """A finished run of two steps, with checkpoints 1 and 2, to be damaged."""
    return trained_run.copy(base, tmp_path / "run")


def call(argv, capsys) -> list[str]:
    """Calls the command; returns the lines on standard error."""
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def tree(folder):
    return {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}


TEXT = "--config=text:path={files}/text.txt,unit=chars,debug"
HERE = "--workdir={workdir}"
CASES = {
    # Flags.
    "no config": ([HERE], ["--config", "required"]),
    "no workdir": ([TEXT], ["--workdir", "required"]),
    "unknown flag": ([TEXT, "--workdr={workdir}", HERE], ["--workdr", "--workdir"]),
    "loose word": ([TEXT, HERE, "resume"], ["unknown argument 'resume'"]),
    # Configs.
    "unknown config": (["--config=enwik8_bas", HERE], ["mean 'enwik8_base'"]),
    "config file missing": (["--config=no.py", HERE], ["no.py", "no such file"]),
    "config file without a config": (
        ["--config={files}/config.py", HERE],
        ["config.py", "get_config"],
    ),
    "unknown argument": (["--config=text:pth=x", HERE], ["'pth'", "mean 'path'"]),
    "unknown field": ("train.step=3", ["config.train", "'step'", "mean 'steps'"]),
    "unknown section": ("trian.steps=3", ["'trian'", "mean 'train'"]),
    "section": ("train=3", ["config.train", "section"]),
    "no value": ("train.steps", ["config.train.steps", "value"]),
    "text for a number": ("train.steps=many", ["config.train.steps=many", "int"]),
    "fraction for an int": ("train.batch_size=1.5", ["batch_size=1.5", "int"]),
    "text for a bool": ("train.half_loss=maybe", ["half_loss=maybe", "bool"]),
    "number in the model": ("model.cutoffs=5", ["cutoffs=5", "tuple"]),
    # Combinations.
    "segment longer than a row": (
        "train.segment_length=9999",
        ["segment_length=9999", "batch_size=2", "rows of 38"],
    ),
    "batch not divisible": ("train.micro_batches=3", ["batch_size=2", "batches=3"]),
    "endless call": ("train.segments_per_call=0", ["segments_per_call=0"]),
    "nothing kept": ("train.keep=0", ["config.train.keep=0"]),
    "heads that do not fit": (
        ["model.d_head=0", "model.n_head=3"],
        ["d_model=16", "n_head=3"],
    ),
    "zero memory with documents": (
        ["model.attend_zero_memory=True", "data.documents=True"],
        ["resets_in_segment=False", "documents=True"],
    ),
    "no layers": ("model.n_layer=0", ["config.model.n_layer=0"]),
    "cutoffs not ascending": ("model.cutoffs=(7,3)", ["cutoffs", "(7, 3)"]),
    "cutoffs beyond": ("model.cutoffs=(3,400)", ["cutoffs", "400", "9"]),
    "another vocabulary": ("model.vocab_size=50", ["vocab_size=50", "9"]),
    "unknown model": ("model.name=transfomer_xl", ["mean 'transformer_xl'"]),
    "unknown optimizer": ("optimizer.name=adm", ["'adm'", "mean 'adam"]),
    "unknown schedule": ("optimizer.schedule=cosin", ["'cosin'", "mean 'cosine'"]),
    "option of another": ("optimizer.momentum=0.9", ["momentum=0.9", "adam", "sgd"]),
    "negative rate": ("optimizer.learning_rate=-1", ["learning_rate=-1"]),
    "unknown split": ("eval.split=valid", ["eval.split='valid'", "validation"]),
    "one token to score": ("eval.max_tokens=1", ["1 token"]),
    # Data.
    "unknown corpus": (
        ["data.corpus=enwik", "data.path="],
        ["corpus=enwik:", "'enwik8'"],
    ),
    "missing file": ("data.path=no.txt", ["config.data.path", "no.txt"]),
    "no path": ("data.path=", ["config.data.path"]),
    "directory": ("data.path={files}", ["is a directory"]),
    "empty text": ("data.path={files}/empty.txt", ["empty"]),
    "too short a text": ("data.path={files}/short.txt", ["config.data.path"]),
    "invalid UTF-8": ("data.path={files}/latin1.txt", ["latin1.txt", "UTF-8", "3"]),
    "unknown unit": ("data.unit=letters", ["data.unit='letters'", "chars"]),
    "missing tokenizer": ("data.tokenizer=no.model", ["no.model"]),
    "wrong checksum": (
        ["--config=enwik8_base:debug", "--manual_dir={files}", HERE],
        ["enwik8.zip", "sha256"],
    ),
    "archive missing": (
        ["--config=text8_base:debug", "data.manual_dir={files}", HERE],
        ["text8.zip"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_nothing_is_written(case, files, tmp_path, capsys):
    items, fragments = CASES[case]
    if isinstance(items, str) or not any(x.startswith("--") for x in items):
        items = [TEXT, HERE, *([items] if isinstance(items, str) else items)]
    argv = [x if x[:2] == "--" or x == "resume" else f"--config.{x}" for x in items]
    workdir = tmp_path / "new" / "run"
    argv = [x.format(files=files, workdir=workdir) for x in argv]
    *said, line = call(argv, capsys)
    assert not said, said
    assert line.startswith("error: ")
    assert all(fragment in line for fragment in fragments), line
    assert list(tmp_path.iterdir()) == []


# Work directories ---------------------------------------------------------------------


FOREIGN = {
    "photos": {"holiday.jpg": b"x"},
    "another model": {"config.json": b'{"model_type": "transfo-xl"}', "model.pt": b""},
    "not even JSON": {"config.json": b"\xff{"},
    "JSON without an end": {"config.json": b"[" * 100_000},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_directory_is_left_alone(case, files, tmp_path, capsys):
    for name, content in FOREIGN[case].items():
        (tmp_path / name).write_bytes(content)
    before = tree(tmp_path)
    argv = [TEXT.format(files=files), f"--workdir={tmp_path}"]
    *said, line = call(argv, capsys)
    assert not said, said
    assert line.startswith(f"error: --workdir={tmp_path} is no run and not empty")
    assert next(iter(FOREIGN[case])) in line
    assert tree(tmp_path) == before


def test_a_config_that_was_spoiled_is_no_foreign_directory(files, tmp_path, capsys):
    """And the card of an evaluation is a run's."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "evaluation-test.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model": 3,}')
    *_, line = call([TEXT.format(files=files), f"--workdir={tmp_path}"], capsys)
    assert "its config.json is not one of a run; without it the run goes on" in line
    (tmp_path / "config.json").unlink()
    writing.refuse_foreign(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["config.json", "data.json", "lock", "metrics.jsonl", "vocabulary.json"]
    + ["checkpoints/1/config/metadata", "tensorboard/x"],
)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(tmp_path / name)
    line = refusal(writing.refuse_foreign, tmp_path)
    assert line == (
        f"workdir={str(tmp_path)!r}: {name} is a pipe or a device, which may never end"
    )


def test_a_file_in_place_of_the_checkpoints_is_said_before_any_training(tmp_path):
    (tmp_path / "checkpoints").write_text("moved to another disk")
    line = refusal(writing.refuse_foreign, tmp_path)
    assert line == f"workdir={str(tmp_path)!r}: checkpoints is not a directory"


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[" * 100_000, b"[]", b"{}", b'{"payload_sha256": 7}']
    + [b'{"payload_sha256": {"a": 1}}'],
    ids=range(7),
)
def test_its_own_card_damaged(content, tmp_path):
    (tmp_path / "data.json").write_bytes(content)
    text = types.SimpleNamespace(card={"payload_sha256": "a" * 64})
    line = refusal(writing.check_same_data, tmp_path, text)
    assert line.startswith(f"{tmp_path}/data.json is unreadable: ")


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_directory_that_cannot_be_made(name, files, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    argv = [TEXT.format(files=files), f"--workdir={tmp_path / name}"]
    *said, line = call(argv, capsys)
    assert not said, said
    assert line.startswith("error: ") and str(tmp_path / name) in line
    assert tree(tmp_path) == {tmp_path / "file": b"x"}


# Checkpoints --------------------------------------------------------------------------


def again(run, *overrides):
    """The command that goes on with trained_run's run, as a config file says it."""
    path = run.parent / "tiny.py"
    text = run.parent / "text.txt"
    text.write_text(trained_run.TEXT * trained_run.LINES, encoding="utf-8")
    path.write_text(
        "import pathlib, trained_run\n"
        "def get_config():\n"
        f"    here = pathlib.Path({str(run.parent)!r})\n"
        "    config = trained_run.make_config(here, here / 'text.txt')\n"
        "    return config.copy_and_resolve_references()\n"
    )
    overrides = [f"--config.{x}" for x in overrides]
    return [f"--config={path}", f"--workdir={run}", *overrides]


def test_every_checkpoint_corrupted(run, capsys):
    for path in (run / "checkpoints").rglob("d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
    before = tree(run / "checkpoints")
    line = call(again(run, "train.steps=4"), capsys)[-1]
    assert line.startswith(f"error: {run}/checkpoints: no intact checkpoint")
    assert "step 1: state" in line and "step 2: state" in line
    assert tree(run / "checkpoints") == before


def test_a_disk_that_is_full_while_saving_costs_no_checkpoint(run, capsys, monkeypatch):
    seal, limits = checkpoints.seal, resource.getrlimit(resource.RLIMIT_FSIZE)

    def seal_and_fill_the_disk(*args, **kwargs):
        sealed = seal(*args, **kwargs)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        return sealed

    monkeypatch.setattr(checkpoints, "seal", seal_and_fill_the_disk)
    try:  # Python ignores the signal: writing fails.
        *_, line = call(again(run, "train.steps=4"), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line.startswith(f"error: {run}")
    assert "the latest checkpoint is step 2" in line
    monkeypatch.undo()
    assert main(again(run, "train.steps=4")) == 0
    assert "resuming from the checkpoint of step 2" in capsys.readouterr().err
    assert Checkpoints(run / "checkpoints", read_only=True).latest() == 4


def test_a_disk_that_is_full_while_logging(run, capsys, monkeypatch):
    monkeypatch.setattr(log, "_open_for_append", lambda _: open("/dev/full", "w"))
    *_, line = call(again(run, "train.steps=4"), capsys)
    assert line.startswith(f"error: {run}") and "No space left" in line
    assert line.endswith("the latest checkpoint is step 2")
    assert Checkpoints(run / "checkpoints", read_only=True).latest() == 2


def test_its_own_vocabulary_damaged(run, capsys):
    path = pathlib.Path(run / "vocabulary.json")
    path.write_text(path.read_text()[:-9])
    *_, line = call(again(run, "train.steps=4"), capsys)
    assert line.startswith("error: ") and "vocabulary.json" in line
