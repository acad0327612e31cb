"""Files of a stranger: they run no code, and nothing is written where they point to.

Each attack has a canary: a file that must not appear, or must stay as it is. See also
weights_test.py (other programs' weights) and runs_test.py (configs and vocabularies).
"""

import ast
import base64
import json
import os
import pathlib
import pickle
import shutil

import numpy as np
import pytest
import trained_run
import training_runs

import xlformer
from xlformer import config as config_lib
from xlformer import evaluate, models, prepare, runs, train
from xlformer.data import prepared, vocabularies, vocabulary
from xlformer.errors import UserError
from xlformer.runs import integrity
from xlformer.runs.checkpoints import Checkpoints

PACKAGE = pathlib.Path(xlformer.__file__).parent
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("complaints_stay_here"),
]


@pytest.fixture
def workdir(base, tmp_path):
    return trained_run.copy(base, tmp_path / "run")


@pytest.fixture
def canary(tmp_path):
    """A file that an attack would make; none may."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


class Touch:
    """Makes the canary when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def touches(canary):
    """Pickles of both kinds, and expressions for whoever evaluates one."""
    pickles = [pickle.dumps(Touch(canary), protocol) for protocol in (0, 4)]
    pickle.loads(pickles[1])  # They would work.
    canary.rmdir()
    return [*pickles, f"__import__('os').mkdir({str(canary)!r})".encode()]


# What the code cannot do --------------------------------------------------------------

FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN |= {"yaml", "subprocess", "runpy", "code", "commands", "pty"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
CALLS |= {"importlib.import_module", "spec.loader.exec_module", "torch.load"}
CALLS |= {"np.load", "numpy.load", "np.save", "numpy.save", "np.lib.npyio.NpzFile"}
# A call that is in order, and what makes it so.
ALLOWED = {
    ("config.py", "spec.loader.exec_module"): "",  # --config files are Python
    ("storage.py", "importlib.import_module"): "import_module(name)",  # of constants
    ("__main__.py", "importlib.import_module"): "f'xlformer.{module}'",  # of a table
    ("__init__.py", "importlib.import_module"): "f'xlformer.instruments.{name}'",
    ("files.py", "np.lib.npyio.NpzFile"): "allow_pickle=False",
    ("prepared.py", "np.load"): "allow_pickle=False",
    ("run_exported.py", "np.load"): "allow_pickle=False",
}


def risky(path):
    """(what, the source of it) for every import and call that could run a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in {name.split(".")[0] for name in names} & FORBIDDEN:
            yield name, ast.unparse(node)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or name.startswith(("os.exec", "os.spawn")):
                yield name, ast.unparse(node)


def test_no_module_runs_what_it_reads():
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for what, source in risky(path):
            found.add((path.name, what))
            reason = ALLOWED.get((path.name, what))
            assert reason is not None and reason in source, f"{path}: {source}"
    assert found == set(ALLOWED)


# Code in files ------------------------------------------------------------------------


def test_code_in_place_of_any_file_does_not_run(workdir, canary):
    files = [workdir / runs.CONFIG, workdir / runs.VOCABULARY]
    files += [p for p in (workdir / runs.CHECKPOINTS / "2").rglob("*") if p.is_file()]
    assert len(files) > 10
    attacks = touches(canary)
    for file in files:
        content = file.read_bytes()
        # What is in these is read as arrays alone, whose bytes are all the same to it.
        for attack in attacks[-2:-1] if file.parent.name == "d" else attacks:
            file.write_bytes(attack)
            try:
                runs.load(workdir, checkpoint="2")
            except UserError:
                pass
        file.write_bytes(content)
    assert runs.load(workdir, checkpoint="2").step == 2


def strings(node, hostile):
    """The JSON with every string of it, keys left out, made hostile."""
    if isinstance(node, dict):
        return {key: strings(x, hostile) for key, x in node.items()}
    if isinstance(node, list):
        return [strings(x, hostile) for x in node]
    return hostile if isinstance(node, str) else node


@pytest.mark.parametrize(
    "hostile",
    [
        "os.system",
        "../../../ran",
        "file://{canary}/",
        {"driver": "file", "path": "{canary}"},
        {"__class__": "os.mkdir", "py/reduce": ["os.mkdir", ["{canary}"]]},
        {"module_name": "posix", "class_name": "mkdir", "args": ["{canary}"]},
    ],
    ids=str,
)
def test_metadata_of_a_checkpoint_names_nothing_that_is_called(
    hostile, workdir, canary
):
    """Orbax stores names of handlers and types, tensorstore drivers and paths."""
    hostile = json.loads(json.dumps(hostile).replace("{canary}", str(canary)))
    step = workdir / runs.CHECKPOINTS / "2"
    metadata = [step / "_CHECKPOINT_METADATA", step / "state" / "_METADATA"]
    before = sorted(workdir.parent.rglob("*"))
    for path in metadata:
        content = path.read_text()
        path.write_text(json.dumps(strings(json.loads(content), hostile)))
        try:
            runs.load(workdir, checkpoint="2")
        except UserError:
            pass
        path.write_text(content)
    assert sorted(workdir.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "change",
    [{"leaves": None}, {"leaves": {}}, {"layouts": [1]}, {"config": "x"}, {"metric": 3}]
    + [{"metric": {"bpc": x}} for x in ("0", [0], True)],
    ids=str,
)
def test_a_digest_with_a_true_checksum_is_not_trusted_either(change, workdir):
    path = workdir / runs.CHECKPOINTS / "2" / "digest" / "metadata"
    sealed = json.loads(path.read_text()) | change
    sealed.pop("checksum")
    path.write_text(json.dumps(sealed | {"checksum": integrity._crc(sealed)}))
    assert Checkpoints(workdir / runs.CHECKPOINTS, read_only=True).best() in (1, 2)
    with pytest.raises(UserError, match="no intact checkpoint: step 2"):
        runs.load(workdir, checkpoint="2")


def test_a_tokenizer_is_stored_and_never_named(tmp_path):
    (tmp_path / "secret").write_text("secret")
    for model in (str(tmp_path / "secret"), "t5-base", "../secret"):
        for text in (model, base64.b64encode(model.encode()).decode()):
            fields = {"format": vocabulary.FORMAT, "kind": "pieces", "counts": [0]}
            stored = json.dumps(fields | {"symbols": ["a"], "model": text})
            with pytest.raises(UserError, match="not a stored vocabulary"):
                vocabularies.from_json(stored)


def test_objects_among_prepared_tokens_do_not_run(base, workdir, tmp_path, canary):
    made = prepare.prepare(runs.read_config(workdir).data).directory
    folder = shutil.copytree(made, tmp_path / made.name)
    objects = np.array([Touch(canary)], dtype=object)
    np.save(folder / "test.npy", objects, allow_pickle=True)
    with pytest.raises(UserError, match="Python objects"):
        prepared.load(folder)


# Writing elsewhere --------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path):
    """A directory of the user's own, which must stay as it is."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / ".bashrc").write_text("alias ls='ls -F'\n")
    yield folder
    assert [p.name for p in folder.iterdir()] == [".bashrc"]
    assert (folder / ".bashrc").read_text() == "alias ls='ls -F'\n"


def one_line(main, capsys, *argv):
    assert main(list(argv)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("target", [".bashrc", "new", "."])
@pytest.mark.parametrize(
    "name",
    ["evaluation-validation.txt", "evaluation-test.json", "evaluations"]
    + ["evaluations/index.json", "evaluations/x"],
)
def test_an_evaluation_follows_no_link(name, target, workdir, elsewhere, capsys):
    (workdir / name).parent.mkdir(exist_ok=True)
    (workdir / name).symlink_to(elsewhere / target)
    line = one_line(evaluate.main, capsys, f"--workdir={workdir}")
    assert f"{name} is a symbolic link to {elsewhere / target}" in line


def test_an_evaluation_prepares_nothing_where_a_config_says(workdir, elsewhere, capsys):
    stored = json.loads((workdir / runs.CONFIG).read_text())
    for folder in (elsewhere, elsewhere / "new"):
        stored["data"]["directory"] = str(folder)
        (workdir / runs.CONFIG).write_text(json.dumps(stored))
        assert evaluate.main([f"--workdir={workdir}", "--warmup=none"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("split", ["../../home/x", "/tmp/x", "validation/../../x"])
def test_a_split_is_a_name_and_no_path(split, workdir, elsewhere, capsys):
    line = one_line(evaluate.main, capsys, f"--workdir={workdir}", f"--split={split}")
    assert f"--split={split} is none of train, validation, test" in line


@pytest.fixture
def training(tmp_path, monkeypatch):
    """The command of a small run, and the directory it works in."""
    text = training_runs.write_text(tmp_path / "text.txt")
    made = training_runs.text_config(text, steps=2, eval_every=0)
    monkeypatch.setattr(config_lib, "load", lambda *_: made)
    monkeypatch.setattr(
        models, "build", lambda *_, **__: training_runs.bag(vocab_size=9)
    )
    workdir = tmp_path / "training"
    return lambda: train.main(["--config=made", f"--workdir={workdir}"]), workdir


@pytest.mark.parametrize("target", [".bashrc", "new", "."])
@pytest.mark.parametrize(
    "name",
    ["lock", "metrics.jsonl", "config.json", "config.json.tmp", "vocabulary.json.tmp"]
    + ["data.json", "nonce.tmp", "checkpoints", "tensorboard", "profile", "hosts"]
    + ["hosts/0.json.tmp", "compilation_cache/a/b", "checkpoints/1", "lock.tmp"],
)
def test_training_follows_no_link(name, target, training, elsewhere, capsys):
    call, workdir = training
    (workdir / name).parent.mkdir(parents=True)
    (workdir / name).symlink_to(elsewhere / target)
    before = sorted(workdir.rglob("*"))
    line = one_line(lambda _: call(), capsys)
    assert f"{name} is a symbolic link to {elsewhere / target}" in line
    assert sorted(workdir.rglob("*")) == before


def test_a_link_to_the_work_directory_itself_is_the_users(training, tmp_path):
    call, workdir = training
    (tmp_path / "disk").mkdir()
    workdir.symlink_to(tmp_path / "disk")
    assert call() == 0
    assert (tmp_path / "disk" / "checkpoints" / "2").is_dir()


# Secrets ------------------------------------------------------------------------------

SECRETS = ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS"]
SECRETS += ["WANDB_API_KEY", "GITHUB_TOKEN", "KAGGLE_KEY", "TFDS_HTTP_PASSWORD"]


def test_no_secret_of_the_environment_is_written(
    training, tmp_path, monkeypatch, capfd, caplog
):
    call, workdir = training
    secrets = {name: f"canary-of-{name}" for name in SECRETS}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    assert call() == 0
    run = workdir / "checkpoints"
    for path in (run / "2").rglob("metadata"):
        path.write_bytes(b"damaged")
    (run / "2").rename(run / "3")
    assert call() == 2  # And what is said about a damaged checkpoint.
    out, err = capfd.readouterr()
    assert "step" in err and "no intact checkpoint" in err
    texts = {"stdout": out, "stderr": err, "log": caplog.text}
    contents = {name: text.encode() for name, text in texts.items()}
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 20
    contents |= {path: path.read_bytes() for path in files}
    for where, content in contents.items():
        for secret in secrets.values():
            assert secret.encode() not in content, where
