"""A run of xlformer 0.1.0, read, scored, sampled and continued by this release."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from xlformer import evaluate, generate, models, runs
from xlformer.data import vocabularies
from xlformer.runs import leaves, log
from xlformer.runs.checkpoints import Checkpoints
from xlformer.train import train
from xlformer.training import optimizers, state

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "run-0.1.0"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy; its config says path=text.txt, so the tests stand beside that."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    return tmp_path / "golden" / "run"


def test_its_state_is_restored_bit_for_bit(run):
    config = runs.read_sealed(run, "latest")
    size = vocabularies.load(run / runs.VOCABULARY).size
    model = models.build(config.model, vocab_size=size)
    optimizer = optimizers.build(config.optimizer)
    create = functools.partial(state.create, config, model, optimizer)
    abstract = jax.eval_shape(create, jax.random.key(0))
    checkpoints = Checkpoints(run / runs.CHECKPOINTS, read_only=True)
    step, found, _ = checkpoints.restore(abstract)
    assert step == checkpoints.best() == EXPECTED["step"]
    flat = {k: x for k, x in leaves.flatten(found).items() if x.size}
    assert leaves.digests(flat) == EXPECTED["leaves"]
    assert int(found.step) == EXPECTED["step"]


def test_its_next_steps_have_the_losses_they_had(run, capsys):
    config = runs.read_sealed(run, "latest")
    assert config.train.steps == EXPECTED["step"]
    config.train.steps += 6
    train(config, run)
    said = capsys.readouterr().err
    assert "from step 12 on config.train.steps=18, before 12: the next step's" in said
    # Its validations scored an average that held the initial parameters too.
    found = {str(r["step"]): r for r in log.read(run, kind="train")}
    for step, loss in EXPECTED["losses"].items():
        np.testing.assert_allclose(found[step]["train/loss_nats"], loss, rtol=1e-5)
    assert json.loads((run / runs.CONFIG).read_text())["format"] == 2


def test_it_is_scored_and_continued_as_it_was(run):
    for params, nats in (("ema", "test_nats"), ("raw", "test_nats_raw")):
        card = evaluate.evaluate(run, split="test", warmup="exact", params=params)
        assert card["tokens_scored"] == EXPECTED["tokens_scored"]
        np.testing.assert_allclose(card["nats"], EXPECTED[nats], rtol=1e-5)
    found = runs.load(run)
    prompt = found.vocabulary.encode("the cat", close_line=False)
    tokens_RN, log_p_RN = generate.generate(
        found.model, found.params, [prompt], num_tokens=20, seed=3
    )
    assert found.vocabulary.decode(tokens_RN[0]) == EXPECTED["generated"]
    np.testing.assert_allclose(log_p_RN[0], EXPECTED["log_probs"], rtol=1e-4)
