"""Checkpoints as they come: each once, whatever becomes of the others meanwhile."""

import shutil

import pytest
import trained_run

from xlformer import config as config_lib
from xlformer import runs
from xlformer.errors import UserError
from xlformer.runs import following
from xlformer.runs.checkpoints import Checkpoints


@pytest.fixture
def workdir(tmp_path_factory, tmp_path):
    """A run of 9 steps that has come to its second."""
    target = trained_run.copy(tmp_path_factory.getbasetemp(), tmp_path / "run")
    extend(target, 9)
    return target


def extend(workdir, steps):
    config = runs.read_config(workdir)
    config.train.steps = steps
    (workdir / runs.CONFIG).write_text(config_lib.to_json(config))


def save(workdir, step):
    """As if training had come there."""
    run = runs.load(workdir, checkpoint="2")
    with Checkpoints(workdir / runs.CHECKPOINTS, keep=9) as checkpoints:
        config = config_lib.to_dict(run.config)
        checkpoints.save(step, {"ema": run.params}, config=config)


def follow(workdir, *events, **options):
    """Steps as they are yielded; at each look that finds nothing an event happens."""
    events = iter(events)
    sleeps = []

    def sleep(seconds):
        sleeps.append(seconds)
        next(events)()

    for run in following.follow(workdir, sleep=sleep, **options):
        yield run.step
    assert next(events, None) is None and set(sleeps) <= {following.POLL_S}


def test_each_checkpoint_once_until_the_last(workdir):
    def nothing():
        pass

    def three_and_five():
        save(workdir, 3)
        save(workdir, 5)

    events = (nothing, three_and_five, lambda: save(workdir, 9))
    assert list(follow(workdir, *events)) == [1, 2, 3, 5, 9]


def test_a_run_that_is_resumed_has_another_end(workdir):
    events = (lambda: save(workdir, 5), lambda: extend(workdir, 5))
    assert list(follow(workdir, *events)) == [1, 2, 5]


def test_what_is_deleted_before_it_is_read_is_passed_over(workdir, capsys, monkeypatch):
    extend(workdir, 2)
    real = following.reading.load

    def load(*args, checkpoint, **options):
        if checkpoint == "1":  # training keeps no more than so many
            shutil.rmtree(workdir / runs.CHECKPOINTS / "1", ignore_errors=True)
        return real(*args, checkpoint=checkpoint, **options)

    monkeypatch.setattr(following.reading, "load", load)
    assert list(follow(workdir)) == [2]
    line = "xlformer: the checkpoint of step 1 was deleted: it is not scored\n"
    assert capsys.readouterr().err == line


def test_one_on_its_way_out_is_looked_at_again(workdir, capsys):
    """Some of its files are gone already: the directory follows."""
    extend(workdir, 2)
    first = workdir / runs.CHECKPOINTS / "1"
    shutil.rmtree(first / "state")
    assert list(follow(workdir, lambda: shutil.rmtree(first))) == [2]
    assert capsys.readouterr().err == ""


def test_a_damaged_one_is_said_and_passed_over(workdir, capsys):
    extend(workdir, 2)
    shutil.rmtree(workdir / runs.CHECKPOINTS / "1" / "state")
    assert list(follow(workdir, lambda: None)) == [2]
    line = capsys.readouterr().err
    assert "no intact checkpoint" in line and line.endswith("step 1 is not scored\n")


def test_other_errors_end_it(workdir):
    with pytest.raises(UserError, match="params='both'"):
        next(follow(workdir, params="both"))
    with pytest.raises(UserError, match="holds no run"):
        next(follow(workdir.parent))
