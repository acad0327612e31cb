"""The members of an instrument: that they are different runs, and their training."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
import trained_run
from training_runs import SYMBOLS, assert_same, bag, refusal, text_config, write_text

from xlformer import compare, recl, runs
from xlformer.data.vocabulary import ByteVocabulary
from xlformer.instruments import members
from xlformer.instruments.members import Member
from xlformer.runs.locks import WorkdirLock
from xlformer.training.loop import Loop


def test_one_run_is_not_compared_with_itself(base, tmp_path):
    workdir = trained_run.trained(base)
    link = tmp_path / "link"
    link.symlink_to(workdir)
    for same in (workdir, f"{workdir}/", workdir / ".." / workdir.name, link):
        line = refusal(members.load, [workdir, same])
        assert "are one run, which is compared with itself" in line
        assert str(workdir) in line
    # Whatever lies between them.
    copy = trained_run.copy(base, tmp_path / "copy")
    assert "are one run" in refusal(members.load, [workdir, copy, link])


def test_a_copy_is_the_same_run(base, tmp_path):
    workdir = trained_run.trained(base)
    copy = trained_run.copy(base, tmp_path / "copy")
    line = refusal(members.load, [workdir, copy])
    assert f"workdir='{copy}' is a copy of workdir='{workdir}'" in line


def test_another_step_is_another_member(base, tmp_path):
    """The copy has lost its last checkpoint: the two have other weights."""
    workdir = trained_run.trained(base)
    copy = trained_run.copy(base, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / str(trained_run.STEPS[-1]))
    found = members.load([workdir, copy], checkpoint="latest")
    assert [member.run.step for member in found] == [2, 1]
    assert [member.name for member in found] == ["run", "copy"]


def test_other_weights_of_one_model_are_no_copy(base):
    run = trained_run.loaded(base)
    moved = jax.tree.map(lambda leaf: leaf * (1 + 1e-6), run.params)
    assert members._is_copy(run, run)
    assert not members._is_copy(run, dataclasses.replace(run, params=moved))
    assert not members._is_copy(run, dataclasses.replace(run, step=run.step + 1))


@pytest.mark.parametrize(
    ("configs", "folders", "names"),
    [
        (["a", "b"], ["/x/1", "/x/2"], ["a", "b"]),
        (["a", "a"], ["/x/1", "/x/2"], ["1", "2"]),
        (["a", "b", "a"], ["/x/1", "/x/2", "/y/1"], ["/x/1", "/x/2", "/y/1"]),
        (["a"], ["/x/1"], ["a"]),
        ([""], ["/x/1"], ["1"]),  # of a config that no file has
        ([""], ["."], ["."]),
    ],
)
def test_a_name_is_as_short_as_it_can_be(configs, folders, names):
    places = [members.epath.Path(folder) for folder in folders]
    assert members._names(configs, places) == names


def test_names_of_strangers_are_plain(base):
    """Nothing steers a terminal or is a formula, and no name becomes another's."""
    run = trained_run.loaded(base)
    names = ["\x1b[31mred\x07", "$x^", "__a<b>", "n" * 1000, "über/1 (b)"]
    found = members.plain([Member(name, run) for name in names])
    assert [m.name for m in found[:3]] == ["31mred_", "x_", "a_b_"]
    assert found[3].name == "n" * members.LONGEST_NAME and found[4].name == names[4]
    found = members.plain([Member(name, run) for name in ("a$", "a^", "$")])
    assert [m.name for m in found] == ["1 a_", "2 a_", "3 "]


def test_a_name_is_no_path(tmp_path):
    assert members.file_name("lstm-2.0") == "lstm-2.0"
    names = ["/x/a", "../../x", "..", ".", "", "a/b", "a_b", "a\x00b", "ü" * 999]
    files = [members.file_name(name) for name in names]
    assert len(set(files)) == len(names)
    for file in files:
        (tmp_path / file).write_text("")
    assert len([*tmp_path.iterdir()]) == len(names)


def test_facts_say_which_run_it_was(base):
    (member,) = members.load([trained_run.trained(base)])
    facts = member.facts()
    assert (facts["name"], facts["run"], facts["model"]) == (
        "tiny",
        "tiny",
        "transformer_xl",
    )
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(member.run.params)]
    assert facts["parameters"] == member.parameters == sum(sizes) > 1000
    assert facts["step"] == member.run.step and facts["workdir"]


@pytest.fixture
def moved(base, tmp_path):
    """A run whose text and prepared tokens are gone, and where the text lies now."""
    workdir = trained_run.copy(base, tmp_path / "moved")
    config = json.loads((workdir / runs.CONFIG).read_text())
    gone = {"path": str(tmp_path / "gone.txt"), "directory": str(tmp_path / "none")}
    config["data"] |= gone
    (workdir / runs.CONFIG).write_text(json.dumps(config))
    return workdir, trained_run.trained(base).parent / "text.txt"


def test_a_text_is_found_among_those_that_are_named(moved, tmp_path):
    workdir, text = moved
    other = write_text(tmp_path / "other.txt")
    (member,) = members.load([workdir], data_paths=[str(text)])
    tokens, _, _ = members.text(member, "validation")
    both = dataclasses.replace(member, data_paths=(str(other), str(text)))
    assert np.array_equal(both.text("validation")[0], tokens)
    wrong = dataclasses.replace(member, data_paths=(str(text), str(other)))
    assert np.array_equal(wrong.text("validation")[0], tokens)
    none = dataclasses.replace(member, data_paths=(str(other),))
    line = refusal(members.text, none, "validation")
    assert line.startswith(f"workdir='{workdir}': data_path='{other}' holds another")
    load = functools.partial(members.load, data_paths=[str(text), str(other)])
    line = refusal(load, [workdir])
    assert line == f"data_path='{other}' is one of 2 texts, of 1 runs"


def test_advice_names_flags_of_the_command(moved, tmp_path, capsys):
    workdir, text = moved
    flags = [f"--workdir={workdir}", f"--out={tmp_path / 'out'}"]
    assert compare.main(["ablation", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --workdir={workdir}: config.data.path: no such")
    assert err.endswith("--data_path=FILE says where that text lies now\n")
    assert recl.main(flags) == 2
    err = capsys.readouterr().err
    assert err.endswith("text lies now, --text=FILE scores another one\n")
    assert recl.main([flags[1], f"--data_path={text}"]) == 2
    assert f"--data_path={text} without --workdir" in capsys.readouterr().err


def with_vocabulary(run, vocabulary, name):
    found = dataclasses.replace(run, vocabulary=vocabulary)
    return Member(name, found)


def test_losses_of_other_vocabularies_do_not_compare(base):
    run = trained_run.loaded(base)
    letters = ByteVocabulary([97, 98, 99], [3, 2, 1], "keep")
    found = [
        with_vocabulary(run, letters, "a"),
        with_vocabulary(run, ByteVocabulary([97, 98, 99], [5, 5, 5], "keep"), "b"),
    ]
    # How often each was seen plays no part.
    members.check_vocabularies(found)
    others = [
        ByteVocabulary([97, 99, 98], [3, 2, 1], "keep"),  # as many, others
        ByteVocabulary([97, 98], [3, 2], "keep"),
        ByteVocabulary([97, 98, 99], [3, 2, 1], "drop"),
        run.vocabulary,
    ]
    for other in others:
        more = [*found, with_vocabulary(run, other, "c")]
        line = refusal(members.check_vocabularies, more)
        assert f"a vocabulary of 3 {letters.unit}" in line
        assert f"another one of {other.size} {other.unit}" in line


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("members") / "text.txt")


def make(text):
    config = text_config(text, steps=6, save_every=2, eval_every=0)
    config.mesh.data = 1
    return config


def test_a_killed_member_goes_on_and_a_complete_one_is_found(
    text, tmp_path, monkeypatch, capsys
):
    model = bag(vocab_size=SYMBOLS)
    whole = members.trained("whole", make(text), tmp_path, model)
    assert (whole.name, whole.run.step) == ("whole", 6)
    assert whole.run.workdir == tmp_path / "whole"
    advance = Loop._advance

    def killed(loop):
        if loop.step == 5:
            raise MemoryError
        advance(loop)

    monkeypatch.setattr(Loop, "_advance", killed)
    with pytest.raises(MemoryError):
        members.trained("cut", make(text), tmp_path, model)
    monkeypatch.setattr(Loop, "_advance", advance)
    capsys.readouterr()
    cut = members.trained("cut", make(text), tmp_path, model)
    assert "resuming from the checkpoint of step 4" in capsys.readouterr().err
    assert_same(cut.run.params, whole.run.params)
    monkeypatch.setattr(Loop, "_advance", None)  # Nothing is trained any more.
    assert_same(
        members.trained("cut", make(text), tmp_path, model).run.params,
        whole.run.params,
    )


def test_a_signal_ends_the_instrument_and_not_the_member_alone(
    text, tmp_path, monkeypatch
):
    result = {"step": 3, "interrupted": "SIGTERM"}
    monkeypatch.setattr(members, "train", lambda *arguments: result)
    with pytest.raises(KeyboardInterrupt):
        members.trained("some", make(text), tmp_path)


def test_another_config_in_the_same_folder_is_refused(text, tmp_path):
    model = bag(vocab_size=SYMBOLS)
    config = make(text)
    config.train.steps = 2
    one = members.trained("one", config, tmp_path, model)
    # Its config has the fields of another model.
    assert one.facts()["model"] == "Bag"
    config.train.steps = 4
    with WorkdirLock(tmp_path / "one"):
        line = refusal(members.trained, "one", config, tmp_path, model)
    assert "is in use by pid" in line and "earlier call" not in line
    config.train.segment_length += 1
    line = refusal(members.trained, "one", config, tmp_path, model)
    assert "segment_length" in line and "another --out begins anew" in line


def test_the_latest_checkpoint_counts(text, tmp_path):
    """A best one would be of a validation that the members do not share."""
    config = make(text)
    config.train.eval_every = 2
    config.optimizer.learning_rate = 30.0  # It becomes worse and worse.
    found = members.trained("one", config, tmp_path, bag(vocab_size=SYMBOLS))
    best = runs.load(found.run.workdir, model=bag(vocab_size=SYMBOLS))
    assert (found.run.step, best.step) == (6, 2)
