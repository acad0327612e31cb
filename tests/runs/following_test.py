"""Checkpoints as they come: each once, whatever becomes of the others meanwhile."""

import shutil
import types

import pytest
import trained_run

from xlformer import config as config_lib
from xlformer import runs
from xlformer.errors import UserError
from xlformer.runs import following
from xlformer.runs.integrity import Corrupt


def extend(workdir, steps):
    config = config_lib.default_config()
    config.train.steps = steps
    (workdir / runs.CONFIG).write_text(config_lib.to_json(config))


def save(workdir, *steps):
    """As if training had come there; a checkpoint is whole if it has a state."""
    for step in steps:
        (workdir / runs.CHECKPOINTS / str(step) / "state").mkdir(parents=True)


def remove(workdir, step, *inside):
    shutil.rmtree((workdir / runs.CHECKPOINTS / str(step)).joinpath(*inside))


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A run of 9 steps that has come to its second."""
    extend(tmp_path, 9)
    save(tmp_path, 1, 2)

    def load(workdir, *, checkpoint, params, **options):
        path = workdir / runs.CHECKPOINTS / checkpoint
        if params == "both":
            raise UserError("params='both' is neither")
        if not path.exists():
            raise UserError(f"there is no checkpoint of step {checkpoint}")
        if not (path / "state").exists():
            raise UserError("no intact checkpoint") from Corrupt("state is gone")
        return types.SimpleNamespace(step=int(checkpoint))

    monkeypatch.setattr(following.reading, "load", load)
    return tmp_path


def follow(workdir, *events, **options):
    """Steps as they are yielded; at each look that finds nothing an event happens."""
    events = iter(events)

    def sleep(seconds):
        assert seconds == following.POLL_S
        next(events)()

    for run in following.follow(workdir, sleep=sleep, **options):
        yield run.step
    assert next(events, None) is None


def test_each_checkpoint_once_until_the_last(workdir):
    events = (lambda: None, lambda: save(workdir, 3, 5), lambda: save(workdir, 9))
    assert list(follow(workdir, *events)) == [1, 2, 3, 5, 9]


def test_a_run_that_is_resumed_has_another_end(workdir):
    events = (lambda: save(workdir, 5), lambda: extend(workdir, 5))
    assert list(follow(workdir, *events)) == [1, 2, 5]


def test_a_run_that_is_set_back_comes_to_a_step_again(workdir):
    events = (
        lambda: remove(workdir, 2),
        lambda: save(workdir, 2),
        lambda: save(workdir, 9),
    )
    assert list(follow(workdir, *events)) == [1, 2, 2, 9]


def test_what_is_deleted_before_it_is_read_is_passed_over(workdir, capsys, monkeypatch):
    extend(workdir, 2)
    real = following.reading.load

    def load(*args, checkpoint, **options):
        if checkpoint == "1":  # training keeps no more than so many
            remove(workdir, 1)
        return real(*args, checkpoint=checkpoint, **options)

    monkeypatch.setattr(following.reading, "load", load)
    assert list(follow(workdir)) == [2]
    line = "xlformer: the checkpoint of step 1 was deleted: it is not scored\n"
    assert capsys.readouterr().err == line


def test_one_on_its_way_out_is_looked_at_again(workdir, capsys):
    """Some of its files are gone already: the directory follows."""
    extend(workdir, 2)
    remove(workdir, 1, "state")
    assert list(follow(workdir, lambda: remove(workdir, 1))) == [2]
    assert capsys.readouterr().err == ""


def test_a_damaged_one_is_said_and_passed_over(base, tmp_path, capsys):
    """A real one."""
    workdir = trained_run.copy(base, tmp_path / "run")
    remove(workdir, 1, "state")
    assert list(follow(workdir, lambda: None)) == [2]
    line = capsys.readouterr().err
    assert "no intact checkpoint" in line and line.endswith("step 1 is not scored\n")


def test_other_errors_end_it(workdir):
    with pytest.raises(UserError, match="params='both'"):
        next(follow(workdir, params="both"))
    with pytest.raises(UserError, match="holds no run"):
        next(follow(workdir / "elsewhere"))
