"""Loading a run: what is read, which step, and files of strangers."""

import json
import os

import jax
import numpy as np
import pytest
import trained_run

from xlformer import config as config_lib
from xlformer import runs
from xlformer.errors import UserError
from xlformer.runs.checkpoints import Checkpoints


@pytest.fixture
def workdir(base, tmp_path):
    return trained_run.copy(base, tmp_path / "run")


def edit(workdir, *path, value):
    """Sets one field of config.json."""
    found = json.loads((workdir / runs.CONFIG).read_text())
    node = found
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (workdir / runs.CONFIG).write_text(json.dumps(found))


def refusal(workdir, **kwargs):
    with pytest.raises(UserError) as caught:
        runs.load(workdir, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000, text
    return text


def test_best_latest_and_steps(workdir):
    found = runs.load(workdir, checkpoint="2")
    with Checkpoints(workdir / runs.CHECKPOINTS, keep=5) as checkpoints:
        config = config_lib.to_dict(found.config)
        checkpoints.save(3, {"ema": found.params}, config=config, metric=99.0)
    assert runs.load(workdir).step in (1, 2)
    assert runs.load(workdir, checkpoint="best").step == checkpoints.best()
    assert runs.load(workdir, checkpoint="latest").step == 3
    assert runs.load(workdir, checkpoint=1).step == 1


def test_average_is_what_a_run_that_keeps_one_is_scored_with(base):
    workdir = trained_run.trained(base)
    found = {p: runs.load(workdir, params=p) for p in (None, "ema", "raw")}
    assert [found[p].averaged for p in found] == [True, True, False]
    ema, raw = (jax.tree.leaves(found[p].params) for p in ("ema", "raw"))
    assert any((a != b).any() for a, b in zip(ema, raw, strict=True))
    default = jax.tree.leaves(found[None].params)
    for a, b in zip(default, ema, strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_average_is_no_ema(workdir, tmp_path):
    found = runs.load(workdir, params="raw")
    config = config_lib.to_dict(found.config)
    config["train"]["ema_decay"] = 0.0
    with Checkpoints(workdir / runs.CHECKPOINTS) as checkpoints:
        checkpoints.save(3, {"params": found.params}, config=config)
    assert not runs.load(workdir, checkpoint="3").averaged
    message = refusal(workdir, checkpoint="3", params="ema")
    assert "config.train.ema_decay=0.0" in message


def test_reading_needs_nothing_but_three_files(workdir):
    for path in sorted(workdir.iterdir()):
        if path.name not in (runs.CONFIG, runs.VOCABULARY, runs.CHECKPOINTS):
            path.rename(workdir.parent / path.name)
    assert runs.load(workdir).step in trained_run.STEPS


def test_for_reading_changes_what_is_visible(base):
    model = trained_run.loaded(base).model
    changed = model.for_reading(memory_length=3, same_length=True)
    assert (changed.memory_length, changed.config.attention_window) == (3, 2)
    explicit = changed.for_reading(window=5, memory_length=11)
    assert explicit.config.attention_window == 5
    kept = {"memory_length": -1, "clamp_length": None, "same_length": None}
    assert model.for_reading(**kept) == model
    assert changed.for_reading(same_length=False).config.window is None
    with pytest.raises(UserError, match="wings=2: TransformerXL has no wings"):
        model.for_reading(wings=2)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("7", "there is no checkpoint of step 7; there are steps 1, 2"),
        ("-1", "checkpoint='-1' is neither best, latest, average:N nor a step"),
        ("newest", "checkpoint='newest' is neither"),
        ("²", "checkpoint='²' is neither"),
        ("9" * 5000, "is neither best, latest, average:N nor a step"),
        ("", "checkpoint='' is neither"),
    ],
)
def test_steps_that_are_none(base, which, message):
    with pytest.raises(UserError, match=message):
        runs.load(trained_run.trained(base), checkpoint=which)


@pytest.mark.parametrize("params", ["average", ""])
def test_params_that_are_none(base, params):
    message = refusal(trained_run.trained(base), params=params)
    assert f"params={params!r} is neither raw nor ema" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"3", b"[]", b"null", b'"x"', b"{}", b'{"model": 3}']
    + [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 9999, b'{"model": {"name": []}}']
    + [b'{"a":' * 900 + b"1" + b"}" * 900],
    ids=range(14),
)
def test_config_that_is_no_config(workdir, content):
    (workdir / runs.CONFIG).write_bytes(content)
    # Of several runs it says which.
    assert f"{workdir / runs.CONFIG} is not a resolved config" in refusal(workdir)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("train", "stepz"), 3, "config.train has no field 'stepz', did you mean"),
        (("wings",), {"a": 3}, "config has no field 'wings'"),
        (("train",), 3, "config.train=3 is not a section"),
        (("train",), None, "config.train=None is not a section"),
        (("train", "steps"), "many", "config.train.steps='many' is not of type int"),
        (("train", "steps"), {"a": 1}, "config.train.steps=a: 1 is not of type"),
        (("train", "ema_decay"), "x", "config.train.ema_decay='x'"),
        (("eval", "memory_length"), None, "config.eval.memory_length=None"),
        (("eval", "segment_length"), 5.0, "config.eval.segment_length=5.0"),
        (("data", "path"), 7, "config.data.path=7 is not of type str"),
        (("data", "documents"), "yes", "config.data.documents='yes'"),
        (("model", "memory_length"), -7, "config.model.memory_length=-7 must be at"),
        (("model", "name"), "wings", "config.model.name='wings'"),
        (("model", "name"), 7, "config"),
    ],
)
def test_config_edited(workdir, path, value, message):
    edit(workdir, *path, value=value)
    assert message in refusal(workdir)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "pre_norm"), True),
        (("model", "n_layer"), 5),
        (("model", "cutoffs"), [11]),
        (("seed",), 7),
    ],
)
def test_what_the_checkpoint_was_trained_with_goes_before_config_json(
    workdir, path, value, caplog
):
    before = runs.load(workdir)
    edit(workdir, *path, value=value)
    after = runs.load(workdir)
    assert (after.model, after.config) == (before.model, before.config)
    shown = tuple(value) if isinstance(value, list) else value
    assert f"config.{'.'.join(path)}={shown!r} (" in caplog.text
    assert "the checkpoint's own is used" in caplog.text


def test_where_things_lie_is_read_from_config_json(workdir, caplog):
    edit(workdir, "data", "path", value="elsewhere.txt")
    edit(workdir, "eval", "batch_size", value=17)  # no fact of this checkpoint
    found = runs.load(workdir).config
    assert found.data.path == "elsewhere.txt" and found.eval.batch_size == 3
    assert not caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"{}",
        b"[" * 100_000,
        b'{"format": "xlformer vocabulary 1", "kind": "os.system"}',
        b'{"format": "xlformer vocabulary 1", "kind": "chars", "symbols": ["a"], '
        b'"counts": [0], "__class__": "x"}',
    ],
    ids=range(6),
)
def test_vocabulary_of_a_stranger(workdir, content):
    (workdir / runs.VOCABULARY).write_bytes(content)
    message = refusal(workdir)
    assert "vocabulary.json" in message


@pytest.mark.parametrize("name", [runs.CONFIG, runs.VOCABULARY])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name, workdir):
    (workdir / name).unlink()
    os.mkfifo(workdir / name)
    message = refusal(workdir)
    assert str(workdir / name) in message and "a pipe or a device" in message


def test_vocabulary_of_another_size(workdir):
    stored = json.loads((workdir / runs.VOCABULARY).read_text())
    stored["symbols"], stored["counts"] = stored["symbols"][:-1], stored["counts"][:-1]
    (workdir / runs.VOCABULARY).write_text(json.dumps(stored))
    assert "the checkpoint has params/" in refusal(workdir, params="raw")
    (workdir / runs.VOCABULARY).unlink()
    assert "cannot read the vocabulary" in refusal(workdir)


def test_names_of_a_config_run_nothing(workdir, tmp_path):
    """Paths and names are looked up, never imported or evaluated."""
    mark = tmp_path / "ran"
    attack = f"__import__('pathlib').Path('{mark}').touch()"
    for path in (("model", "name"), ("model", "dtype"), ("name",), ("data", "corpus")):
        edit(workdir, *path, value=attack)
        try:
            runs.load(workdir)
        except UserError:
            pass
    assert not mark.exists()
