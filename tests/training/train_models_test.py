"""Training with bad losses, other models and texts, and with every config."""

import threading

import jax
import numpy as np
import pytest
from training_runs import (
    SYMBOLS,
    Bag,
    BagConfig,
    bag,
    final_state,
    refusal,
    text_config,
    write_text,
)

from xlformer import config as config_lib
from xlformer import models, runs
from xlformer.data.prepared import Prepared
from xlformer.data.stream import Stream
from xlformer.data.vocabulary import ByteVocabulary, WordVocabulary
from xlformer.hosts.faults import NotFinite
from xlformer.runs import log
from xlformer.train import train
from xlformer.training import run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


# Losses that are not finite -----------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_what_helps(text, tmp_path):
    config = text_config(text, save_every=3)
    # Other errors of a run say nothing of its model; these do.
    with pytest.raises(NotFinite) as raised:
        train(config, tmp_path, model=bag(vocab_size=9, nan_steps=(6,)))
    line = str(raised.value)
    assert "not finite at step 7" in line and "last good checkpoint is step 6" in line
    assert "config.optimizer.learning_rate=0.02" in line and "skip_nonfinite" in line
    model = bag(vocab_size=SYMBOLS)
    step, found, _ = final_state(tmp_path, config, model)
    assert step == 6
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.params))
    assert train(config, tmp_path, model=model)["step"] == 24


def test_one_bad_step_among_several_in_a_call_stops_too(text, tmp_path):
    config = text_config(text, segments_per_call=6, eval_every=0)
    # Infinite with a finite gradient: the steps after it look well.
    model = bag(vocab_size=SYMBOLS, inf_steps=(8,))
    line = refusal(train, config, tmp_path, model=model)
    assert "not finite at step 9" in line and "checkpoint is step 6" in line


def test_skipping_goes_on_until_ten_in_a_row(text, tmp_path):
    config = text_config(text, skip_nonfinite=True, segments_per_call=2)
    few = bag(vocab_size=SYMBOLS, nan_steps=(2, 3, *range(8, 17)))
    assert train(config, tmp_path / "few", model=few)["step"] == 24
    _, found, _ = final_state(tmp_path / "few", config, few)
    assert int(found.skipped) == 11 and int(found.skipped_in_a_row) == 0
    assert log.read(tmp_path / "few", kind="train")[-1]["train/skipped"] == 11
    ten = bag(vocab_size=SYMBOLS, nan_steps=tuple(range(9, 19)))
    line = refusal(train, config, tmp_path / "ten", model=ten)
    assert "not finite" in line and "last good checkpoint is step 18" in line


# The text and the model ---------------------------------------------------------------


@pytest.fixture
def config(text):
    found = text_config(text)
    found.optimizer.learning_rate = 0.3
    return found


@pytest.fixture(scope="module")
def own(text, tmp_path_factory):
    """The work directory of a run with a model of one's own; not to be changed."""
    workdir = tmp_path_factory.mktemp("own") / "run"
    config = text_config(text)
    config.optimizer.learning_rate = 0.3
    train(config, workdir, model=bag(vocab_size=SYMBOLS))
    return workdir


def test_your_own_model_is_trained_like_ours(own, config, tmp_path):
    evals = [r["eval/nats_per_token"] for r in log.read(own, kind="eval")]
    assert evals[2] < evals[0]
    assert log.read(own, kind="train")[-1]["step"] == 24
    assert "bag/seen" in log.read(own, kind="train")[0]
    line = refusal(train, config, tmp_path / "b", model=bag(vocab_size=8))
    assert "the model knows 8 ids, the data has 9" in line


def test_a_run_with_a_model_of_ones_own_says_so(own, config):
    """Nobody takes it for the model that config.model describes."""
    kept = runs.read_config(own)
    assert kept.own_model == "Bag" and config.own_model == ""
    # It goes on with that model, from either config, whatever config.model says.
    config.model.d_model = 48
    for given in (kept, config):
        assert train(given, own, model=bag(vocab_size=SYMBOLS))["step"] == 24
    line = refusal(train, config, own)
    assert "config.own_model='Bag', now it is ''" in line and "model=..." in line
    line = refusal(train, config, own, model=Sack(BagConfig(SYMBOLS)))
    assert "config.own_model='Bag', now it is 'Sack'" in line
    for given in ({}, {"model": Sack(BagConfig(SYMBOLS))}):
        line = refusal(train, kept, own / "new", **given)
        assert "config.own_model='Bag', but model= is" in line
    assert not (own / "new").exists()
    kept.train.steps = 25
    line = refusal(train, kept, own, model=bag(vocab_size=SYMBOLS + 1))
    assert "checkpoint has params/table_VV as float32[9,9], here it is" in line


class Sack(Bag):
    """Another class of the same shapes."""


@pytest.mark.parametrize("given", ["quickstart", {"train": {"steps": 3}}])
def test_a_name_is_no_config(given, tmp_path):
    line = refusal(train, given, tmp_path / "run")
    assert line.endswith("not what xlformer.config.load returns")
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_weights_of_a_model_of_ones_own(
    own, config, tmp_path, capsys
):
    config.train.steps, config.init_from = 1, str(own)
    train(config, tmp_path, model=bag(vocab_size=SYMBOLS))
    said = capsys.readouterr().err
    assert f"starting from the parameters of step 24 of {own}" in said
    (loss,) = [r["train/loss_nats"] for r in log.read(tmp_path, kind="train")]
    assert loss < log.read(own, kind="train")[0]["train/loss_nats"] - 0.1
    line = refusal(train, config, tmp_path / "ours")
    assert str(own) in line and "trained with a model of one's own, Bag" in line


def test_a_model_of_ours_that_is_passed_is_what_the_config_then_says(text, tmp_path):
    """Else who reads the run would build another."""
    found = text_config(text, steps=1)
    with found.ignore_type():
        found.model.d_inner = 24
    model = models.build(found.model, vocab_size=SYMBOLS)
    sealed = run._sealing(text_config(text), model)
    assert sealed.own_model == "" and sealed.model.d_inner == 24
    assert sealed.model.name == "transformer_xl" and sealed.model.vocab_size is None
    assert run._fitting(model, sealed, SYMBOLS) is model
    line = refusal(run._fitting, model, sealed, SYMBOLS - 1)
    assert "the model knows 9 ids, the data has 8" in line


def carried_by_hand(stream, steps, starts):
    """How many tokens each row of a bag holds after that many steps."""
    seen = []
    for row in range(2):
        position = row * stream.row_length
        count = 0
        for k in range(steps):
            _, offset, length = stream.place(k)
            for t in range(offset, offset + length):
                count = 0 if t == 0 or position + t in starts else count
                count += 1
        seen.append(count)
    return seen


@pytest.mark.parametrize("documents", [False, True])
def test_the_memory_ends_where_a_row_or_a_document_begins(tmp_path, documents):
    (tmp_path / "a.txt").write_text("abcdefghi" * 11)  # 99 characters
    (tmp_path / "b.txt").write_text("ihgfedcba" * 13)
    model = bag(vocab_size=9)
    config = text_config(f"{tmp_path}/a.txt;{tmp_path}/b.txt", steps=17)
    config.data.documents = documents
    train(config, tmp_path / "run", model=model)
    _, found, _ = final_state(tmp_path / "run", config, model)
    seen = np.asarray(found.carried["seen_VB"]).sum(axis=0).tolist()
    stream = Stream(np.zeros(194, np.uint8), batch_size=2, segment_length=7)
    assert stream.row_length == 97 and stream.steps_per_epoch == 13
    assert seen == carried_by_hand(stream, 17, {99} if documents else ())
    assert seen == ([28, 26] if documents else [28, 28])  # the second epoch


def test_a_trace_of_the_chosen_steps_is_written(text, tmp_path):
    config = text_config(text, steps=8, segments_per_call=3)
    config.train.update(profile_start=2, profile_steps=2)
    train(config, tmp_path, model=bag(vocab_size=SYMBOLS))
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


def test_outside_of_the_main_thread_it_runs_without_signals(text, tmp_path):
    found = []
    config = text_config(text, steps=2, eval_every=0)
    model = bag(vocab_size=SYMBOLS)

    def call():
        found.append(train(config, tmp_path, model=model))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert found[0]["step"] == 2


# Every config -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpora():
    """Random tokens, and a vocabulary of 31 symbols for bytes and for words."""
    tokens = np.random.default_rng(7).integers(0, 31, 601).astype(np.uint8)
    counts = [100 - k for k in range(31)]
    words = ["<eos>", *(f"w{k}" for k in range(30))]
    vocabularies = {
        "bytes": ByteVocabulary(range(97, 128), counts),
        "words": WordVocabulary(words, counts),
    }
    splits = ("train", "validation", "test")
    return {
        unit: Prepared(
            tokens={split: tokens for split in splits},
            documents={split: None for split in splits},
            vocabulary=vocabulary,
            card={"corpus": unit, "payload_sha256": unit},
            directory=None,
        )
        for unit, vocabulary in vocabularies.items()
    }


# Whose small form is that of another config, but for the text and the rates.
ALIKE = {
    "text8_base": "enwik8_base",
    "text8_large": "enwik8_large",
    "lm1b_base_paper": "lm1b_base",
}


@pytest.mark.parametrize("name", ALIKE)
def test_these_configs_are_small_alike(name):
    pair = [config_lib.load(f"{n}:debug").to_dict() for n in (name, ALIKE[name])]
    for section in ("model", "train", "eval", "mesh"):
        assert pair[0][section] == pair[1][section]


@pytest.mark.parametrize("name", sorted(set(config_lib.names()) - set(ALIKE)))
def test_every_config_trains_two_steps(name, corpora, tmp_path, monkeypatch):
    config = config_lib.load(f"{name}:debug")
    config.mesh.data = 1
    if "scan_layers" in config.model:  # compiles faster
        config.model.scan_layers = True
    words = config.data.corpus in ("wikitext103", "lm1b", "penn")
    prepared = corpora["words" if words else "bytes"]
    monkeypatch.setattr(
        "xlformer.training.run.preparing.prepare", lambda data: prepared
    )
    result = train(config, tmp_path)
    assert result["step"] == config.train.steps == 2
    unit = "ppl" if words else "bpc"
    assert 0 < result[f"eval/{unit}"] < 200
    assert [r["step"] for r in log.read(tmp_path, kind="train")] == [1, 2]
    assert runs.read_config(tmp_path).name == name
