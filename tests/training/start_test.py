"""Training that starts from the weights of another run, or of converted ones."""

import pathlib
import shutil

import counted
import numpy as np
import pytest
from training_runs import assert_same, final_state

from xlformer import config as config_lib
from xlformer import models, runs
from xlformer.data.prepared import Prepared
from xlformer.data.translation import translated
from xlformer.data.vocabulary import Vocabulary
from xlformer.errors import UserError, WorthAnotherTry
from xlformer.runs.checkpoints import Checkpoints
from xlformer.train import main
from xlformer.training import spikes, start

SOURCE = pathlib.Path(__file__).parents[1] / "golden" / "run-0.1.0" / "run"
LINE = "a cat sat on the mat as rain fell\n"  # symbols of SOURCE, in another order


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(LINE * 40)
    return path


def flags(text, workdir, *more):
    data = f"--config=text:path={text},unit=chars,debug"
    still = "--config.optimizer.learning_rate=0"  # the weights stay what they were
    return [data, f"--workdir={workdir}", still, *more]


def error(capsys, *args):
    assert main(flags(*args)) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def spike(monkeypatch):
    """The first loss is one, before there is a checkpoint to go back to."""
    seen = iter([spikes.Spike(1, 9.0)])

    def check(*args):
        for found in seen:
            raise found

    monkeypatch.setattr(spikes, "check", check)


def test_weights_model_and_vocabulary_come_and_all_else_is_new(
    text, tmp_path, capsys, spike
):
    workdir = tmp_path / "tuned"
    more = f"--init_from={SOURCE}:latest", "--config.model.dropout=0"
    assert main(flags(text, workdir, *more, "--config.train.spike_factor=2")) == 0
    said = capsys.readouterr().err
    assert "back to step 0, leaving out segment 0" in said
    assert said.count("starting from the parameters") == 2
    assert f"the parameters of step 12 of {SOURCE}:latest (their average)" in said
    source, tuned = runs.load(SOURCE), runs.load(workdir)
    assert_same(tuned.params, source.params)
    assert tuned.vocabulary.symbols == source.vocabulary.symbols
    assert tuned.config.model.d_inner == source.config.model.d_inner == 16
    assert (source.config.model.dropout, tuned.config.model.dropout) == (0.1, 0.0)
    model = models.build(tuned.config.model, vocab_size=tuned.vocabulary.size)
    step, state, _ = final_state(workdir, tuned.config, model)
    assert step == int(state.step) == 2
    # It goes on by the same command, from its own weights and with its own model.
    elsewhere = "--init_from=elsewhere", *more[1:]
    assert main(flags(text, workdir, *elsewhere, "--config.train.steps=3")) == 0
    said = capsys.readouterr().err
    assert "resuming from the checkpoint of step 2" in said
    assert "the run has begun: --init_from=elsewhere is not read" in said
    assert runs.read_sealed(workdir, "latest").init_from == f"{SOURCE}:latest"
    # And says what is missing where the flag is.
    line = error(capsys, text, workdir, "--config.train.steps=4")
    assert f"--init_from={SOURCE}:latest: pass it again" in line


def test_what_is_no_start(text, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "tuned"
    line = error(capsys, text, workdir, f"--init_from={SOURCE}",
                 "--config.model.d_inner=17")  # fmt: skip
    assert "other shapes than config.model.d_inner=17 (16 there) would give" in line
    line = error(capsys, text, workdir, f"--init_from={SOURCE}",
                 "--config.model.gate=gru")  # fmt: skip
    assert "other shapes than config.model.gate='gru' ('none' there) would" in line
    line = error(capsys, text, workdir, f"--init_from={SOURCE}:3")
    assert "there is no checkpoint of step 3; there are steps 12" in line
    line = error(capsys, text, workdir, f"--init_from={tmp_path}")
    assert f"error: --init_from={tmp_path} holds no run" in line
    line = error(capsys, text, workdir, "--init_from=")
    assert "--init_from= names no directory" in line
    line = error(capsys, text, workdir, f"--init_from={SOURCE}:beste")
    assert (
        f"after {SOURCE}: stands best, latest, average:N or a step, not 'beste'" in line
    )
    (tmp_path / runs.CONFIG).write_text("{")  # The other spelling of the flag.
    line = error(capsys, text, workdir, f"--config.init_from={tmp_path}")
    assert f"error: --init_from={tmp_path}: {tmp_path / runs.CONFIG} is not a" in line
    line = error(capsys, text, workdir, f"--init_from={SOURCE}",
                 "--config.data.unit=words", "--config.data.max_vocab=9")  # fmt: skip
    assert f"config.data.max_vocab=9 with --init_from={SOURCE}: the voc" in line
    text.write_text(LINE * 40 + "ÿ" * 40)
    line = error(capsys, text, workdir, f"--init_from={SOURCE}")
    assert "20 chars without 1 of those in the text of config.data: 'ÿ'" in line
    monkeypatch.setitem(models.MODELS, "wings", models.MODELS["transformer_xl"])
    config = config_lib.load("quickstart:debug")
    config.model.name = "wings"
    with pytest.raises(UserError, match="holds a transformer_xl, config asks for a"):
        start.with_model(config, str(SOURCE), workdir)


def test_weights_alone_are_no_run_to_go_on_with(text, tmp_path, capsys):
    found = runs.load(SOURCE)
    workdir = tmp_path / "converted"
    shutil.copytree(SOURCE, workdir)
    shutil.rmtree(workdir / "checkpoints")
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        config = config_lib.to_dict(found.config)
        checkpoints.save(0, {"params": found.params}, config=config)
    line = error(capsys, text, workdir)
    assert f"in a new directory, with --init_from={workdir}" in line


@pytest.mark.parametrize(
    ("name", "workdir", "checkpoint"),
    [
        ("a", "a", "best"),
        ("a:latest", "a", "latest"),
        ("a:17", "a", "17"),
        ("a:b", "a:b", "best"),
        ("a:b:best", "a:b", "best"),
        ("gs://bucket/run", "gs://bucket/run", "best"),
        ("gs://bucket/run:17", "gs://bucket/run", "17"),
        ("gs://bucket/run:average:4", "gs://bucket/run", "average:4"),
        ("runs/book:average", "runs/book:average", "best"),
    ],
)
def test_a_suffix_is_one_only_if_it_names_a_checkpoint(name, workdir, checkpoint):
    found = start.Source.parse(name, "own")
    assert (found.workdir, found.checkpoint) == (workdir, checkpoint)


def test_a_store_that_does_not_answer_is_asked_again_by_the_launcher():
    source = start.Source("gs://bucket/run", "gs://bucket/run", "best")
    with pytest.raises(WorthAnotherTry, match="init_from='gs://bucket/run': no answer"):
        with source._named():
            raise WorthAnotherTry("no answer")


def test_a_run_is_no_start_for_itself(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "own")
    for name in (tmp_path / "own", tmp_path / "x" / ".." / "own", tmp_path / "link"):
        with pytest.raises(UserError, match="is workdir itself"):
            start.Source.parse(f"{name}:latest", tmp_path / "own")


# The ids of another vocabulary ----------------------------------------------------


def prepared(vocabulary, text):
    tokens = vocabulary.encode(text)
    return Prepared({"train": tokens}, {"train": None}, vocabulary, {}, None)


@pytest.mark.parametrize("count", [counted.bytes, counted.chars])
def test_ids_are_translated_and_the_text_stays(count):
    here, there = count([b"abcabca"]), count([b"xyccba\n"])
    found = translated(prepared(here, "abcc"), there, where="DIR")
    assert found.vocabulary is there
    assert found.tokens["train"].dtype == there.dtype
    np.testing.assert_array_equal(found.tokens["train"], there.encode("abcc"))


def test_unknown_words_become_the_unknown_word():
    here = counted.words([b"a b c\n"], specials=("<eos>", "<unk>"))
    there = counted.words([b"b a\n"], specials=("<eos>", "<unk>"))
    found = translated(prepared(here, "a b c"), there, where="DIR")
    np.testing.assert_array_equal(found.tokens["train"], there.encode("a b <unk>"))


def test_words_are_looked_up_as_the_other_vocabulary_writes_them():
    here = counted.words([b"A a B\n"], specials=("<eos>", "<unk>"))
    there = counted.words([b"b a\n"], specials=("<S>", "<unk>"), lower=True)
    found = translated(prepared(here, "A a B\n"), there, where="DIR")
    np.testing.assert_array_equal(found.tokens["train"], there.encode("a a b\n"))


def test_a_word_that_stands_once_is_kept_for_other_weights():
    config = config_lib.load("text:path=a.txt,unit=words,debug")
    config.init_from = "DIR"
    assert start.with_every_word(config).data.min_count == 1
    assert config.data.min_count == 0


def test_what_is_unknown_is_said():
    config = config_lib.load("text:path=a.txt,unit=words,debug")
    here = counted.words([b"a b c\n"], specials=("<eos>", "<unk>"))
    run = runs.Run("DIR", config, None, None, here, 7, False)
    found = prepared(here, "a <unk> b <unk>\n")
    assert (
        "40.0% of the training tokens are <unk>" in start.lines(config, run, found)[1]
    )
    assert len(start.lines(config, run, prepared(here, "a b\n"))) == 1


def test_a_start_from_a_mean_says_of_which_steps():
    config = config_lib.load("text:path=a.txt,unit=chars,debug")
    config.init_from = "DIR:average:2"
    run = runs.Run("DIR", config, None, None, counted.chars([b"ab"]), 7, True, (5, 7))
    (line,) = start.lines(config, run, prepared(run.vocabulary, "ab"))
    assert "of steps 5, 7, their mean, of DIR:average:2 (their average);" in line


def test_other_symbols_are_refused():
    here = counted.chars([b"ab"])
    with pytest.raises(UserError, match="DIR has a vocabulary of bytes, config.data g"):
        translated(prepared(here, "ab"), counted.bytes([b"ab"]), where="DIR")
    with pytest.raises(UserError, match="2 chars without 1 .*: 'b'"):
        translated(prepared(here, "ab"), counted.chars([b"ax"]), where="DIR")
    pieces = [Vocabulary(symbols, [1, 1], "pieces") for symbols in ("ab", "ba")]
    tokens = Prepared({"train": np.zeros(3, np.int32)}, {}, pieces[0], {}, None)
    with pytest.raises(UserError, match="DIR has the pieces of another tokenizer"):
        translated(tokens, pieces[1], where="DIR")
    spaced = counted.words([b"a b\n"], unit="chars")
    with pytest.raises(UserError, match="of chars between spaces, config.data gives"):
        translated(prepared(counted.chars([b"a"]), "a"), spaced, where="DIR")
    # What does not stand in the text need not be known.
    translated(prepared(here, "aa"), counted.chars([b"ax"]), where="DIR")
    assert translated(found := prepared(here, "ab"), here, where="DIR") is found
