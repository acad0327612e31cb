"""The text of a run is found by its checksum, wherever it lies; another never is."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import training_runs

from xlformer import config as config_lib
from xlformer import prepare, runs
from xlformer.data import preparing, recipes, vocabularies
from xlformer.data.vocabulary import CharVocabulary
from xlformer.runs import writing
from xlformer.scoring import texts

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "run-0.1.0"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A text, named as it lies, where training starts; an empty cache."""
    monkeypatch.setenv("XLFORMER_DATA", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    training_runs.write_text(pathlib.Path("text.txt"))
    return tmp_path


def make_run(workdir, **fields):
    """As training leaves it, without a model: nothing here looks at one."""
    data = config_lib.default_config().data
    data.update({"corpus": "text", "path": "text.txt", "unit": "chars"} | fields)
    config = config_lib.default_config()
    config.data = data
    workdir.mkdir()
    prepared = prepare.prepare(data)
    writing.describe(workdir, config, prepared)
    vocabulary = vocabularies.load(workdir / runs.VOCABULARY)
    run = runs.Run(workdir, config, None, None, vocabulary, 0, False)
    return run, {name: np.array(x) for name, x in prepared.tokens.items()}


def same(run, expected, **options):
    for split, tokens in expected.items():
        found, _, facts = texts.read(run, split, None, **options)
        np.testing.assert_array_equal(found, tokens)
        card = json.loads((run.workdir / "data.json").read_text())
        assert facts["payload_sha256"] == card["payload_sha256"]
        assert facts["bytes"] == card["splits"][split]["bytes"]


def refused(run, **options):
    return training_runs.refusal(texts.read, run, "test", None, **options)


def test_from_another_directory_and_without_the_text(places, monkeypatch, capsys):
    run, expected = make_run(places / "run")
    same(run, expected)
    monkeypatch.chdir(places / "there")  # there is no text.txt
    same(run, expected)
    (places / "here" / "text.txt").unlink()
    same(run, expected)
    monkeypatch.setattr(preparing, "prepare", None)  # nothing is made
    same(run, expected)
    assert capsys.readouterr().err == ""


def test_a_text_that_has_changed_is_said_and_not_scored(places, capsys):
    run, expected = make_run(places / "run")
    text = places / "here" / "text.txt"
    old = text.read_text()
    text.write_text(old + "the cat sat on")
    same(run, {"test": expected["test"]})
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.data.path=text.txt holds another text than the run was" in line
    assert f"scoring the prepared text of the run, in {places / 'cache'}" in line
    # Where the other text has been prepared too.
    prepare.prepare(run.config.data)
    same(run, {"test": expected["test"]})
    shutil.rmtree(places / "cache")
    line = refused(run)
    assert "config.data.path=text.txt holds another text" in line
    assert f"is in {places / 'cache'}: data_path='FILE' says where" in line
    text.unlink()
    assert "config.data.path: no such file: text.txt; no prepared" in refused(run)
    text.write_text(old)
    same(run, expected)
    assert not (places / "cache").exists()  # reading makes nothing


def test_a_text_that_has_moved_is_named(places):
    run, expected = make_run(places / "run")
    moved = (places / "here" / "text.txt").rename(places / "there" / "moved.txt")
    for _ in range(2):  # with what was prepared, and without
        same(run, expected, data_path=str(moved))
        line = refused(run, data_path=str(places / "nowhere"))
        assert line.startswith(f"data_path: no such file: {places / 'nowhere'}")
        (places / "other").write_text(moved.read_text()[1:])
        line = refused(run, data_path=str(places / "other"))
        assert f"data_path='{places / 'other'}' holds another text than" in line
        shutil.rmtree(places / "cache", ignore_errors=True)
    line = training_runs.refusal(
        texts.read, run, "test", str(moved), data_path=str(moved)
    )
    assert f"text='{moved}' is another text than the run's" in line


@pytest.mark.parametrize("unit", ["bytes", "words"])
def test_documents_and_units_are_the_runs(unit, places):
    for i in range(3):
        text = f"file {i} " + "x y " * (11 + i)
        (places / "here" / f"{i}.part").write_text(text)
    run, expected = make_run(places / "run", path="*.part", unit=unit, documents=True)
    plain, _ = make_run(places / "plain", path="*.part", unit=unit)
    starts = texts.read(run, "train", None)[1]
    assert len(starts) == 3
    assert texts.read(plain, "train", None)[1] is None
    for folder in (places / "cache").glob("text-*"):
        shutil.rmtree(folder)
    same(run, expected)
    np.testing.assert_array_equal(texts.read(run, "train", None)[1], starts)
    assert texts.read(plain, "train", None)[1] is None


def test_damage_is_one_line(places):
    run, _ = make_run(places / "run")
    path = run.workdir / writing.DATA
    card = json.loads(path.read_text())
    broken = ["", "[]", "{}", "[" * 100_000]
    broken += [json.dumps(card | {"splits": {"test": {}}})]
    for name in ("corpus", "documents", "words_are"):
        broken.append(json.dumps({k: v for k, v in card.items() if k != name}))
    for content in broken:
        path.write_text(content)
        assert f"{path} is unreadable" in refused(run)
    card["splits"]["test"]["tokens"] += 1
    for split in card["splits"].values():
        split["sha256"] = ""
    path.write_text(json.dumps(card))
    assert "tokens by vocabulary.json, the run had" in refused(run)
    line = training_runs.refusal(texts.read, run, "dev", None)
    assert line == "split='dev' is none of train, validation, test"


def test_a_pipe_is_not_read_again(places, monkeypatch):
    run, expected = make_run(places / "run")
    run.config.data.path = "/dev/stdin"
    monkeypatch.setattr(recipes, "raw_text", None)  # would wait for a terminal
    same(run, expected)
    shutil.rmtree(places / "cache")
    assert "/dev/stdin: a pipe can be read only once" in refused(run)


def test_a_public_corpus_has_no_path(places):
    run, _ = make_run(places / "run")
    run.config.data.update(corpus="enwik8", path="", unit="bytes")
    line = refused(run, data_path="text.txt")
    assert line.startswith(
        "data_path='text.txt': the run's text is config.data.corpus="
    )


def test_a_run_of_the_first_release_on_a_fresh_machine(places):
    config = runs.read_config(GOLDEN / "run")
    vocabulary = vocabularies.load(GOLDEN / "run" / runs.VOCABULARY)
    run = runs.Run(GOLDEN / "run", config, None, None, vocabulary, 12, True)
    text = (GOLDEN / "text.txt").read_text()
    found = texts.read(run, "test", None, str(GOLDEN / "text.txt"))[0]
    assert vocabulary.decode(found) == text[len(text) * 95 // 100 :]
    assert "holds another text" in refused(run)
    assert not (places / "cache").exists()


def test_a_run_that_started_from_others_weights_keeps_their_ids(places):
    """Its vocabulary.json is not the one that was made of its own text."""
    run, expected = make_run(places / "run")
    own = run.vocabulary
    other = CharVocabulary("z\n" + "".join(own.symbols[::-1]), [0] * 11)
    run = dataclasses.replace(run, vocabulary=other)
    for _ in range(2):  # as prepared, and from the text itself
        tokens = texts.read(run, "test", None)[0]
        assert other.decode(tokens) == own.decode(expected["test"])
        shutil.rmtree(places / "cache", ignore_errors=True)
    lacking = CharVocabulary("the cas", [0] * 7)
    run = dataclasses.replace(run, vocabulary=lacking)
    line = refused(run)
    assert "vocabulary.json has a vocabulary of 7 chars without 2 of those" in line
