"""Reading a run with a model of one's own: it knows the contract and nothing else."""

import jax
import numpy as np
import pytest
import trained_run
from own_model import Config, Gated
from training_runs import SYMBOLS, refusal, text_config, write_text

from xlformer import evaluate, generate, runs
from xlformer.train import train


class Other(Gated):
    """Another class with the same parameters."""


def gated(vocab_size):
    return Gated(Config(vocab_size=vocab_size, width=5))


@pytest.fixture(scope="module")
def model():
    return gated(SYMBOLS)


@pytest.fixture(scope="module")
def workdir(model, tmp_path_factory):
    base = tmp_path_factory.mktemp("own")
    config = text_config(write_text(base / "text.txt"), steps=5, eval_every=0)
    train(config, base / "run", model)
    return base / "run"


def test_train_load_evaluate_generate(workdir, model):
    run = runs.load(workdir, model=model)
    assert run.model == model and run.step == 5
    card = evaluate.evaluate(workdir, model=model, split="test", batch_size=1)
    text = (workdir.parent / "text.txt").read_text()
    length = len(text) - len(text) * 95 // 100
    ids = run.vocabulary.encode(text[-length:]).astype(np.int32)[None]
    state = model.init_state(1)
    nll_BT, _, _ = jax.jit(model.apply)(run.params, ids[:, :-1], ids[:, 1:], state)
    assert card["nats"] == pytest.approx(float(nll_BT.sum()), rel=1e-5)
    assert card["tokens_scored"] == length - 1
    assert (card["memory_length"], card["dtype"]) == (None, "float32")
    assert "clamp_length" not in card and "unlimited reach" in card["note"]
    prompt = run.vocabulary.encode("the cat")
    tokens_RN, log_p_RN = generate.generate(
        model, run.params, [prompt], num_tokens=5, sampling=generate.Sampling(0)
    )
    path = np.concatenate([prompt, tokens_RN[0]]).astype(np.int32)[None]
    log_probs_BTV, _ = model.log_probs(run.params, path[:, :-1], state)
    expected = log_probs_BTV[0, -5:].max(axis=-1)
    np.testing.assert_allclose(log_p_RN[0], expected, rtol=1e-5)


def test_only_the_model_of_the_run_reads_it(workdir, model):
    line = refusal(runs.load, workdir)
    assert "trained with a model of one's own, Gated" in line and "model=" in line
    line = refusal(evaluate.evaluate, workdir, model=Other(model.config))
    assert "was trained with Gated, model is of Other" in line
    line = refusal(runs.load, workdir, model=gated(SYMBOLS - 1))
    assert f"model knows {SYMBOLS - 1} ids" in line
    line = refusal(runs.load, workdir, model=gated(SYMBOLS + 2))
    assert "the checkpoint has params/" in line


@pytest.mark.parametrize("main", [evaluate.main, generate.main])
def test_commands_send_to_python(main, workdir, capsys):
    assert main([f"--workdir={workdir}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "with a model of one's own, Gated: read it in Python" in line


def test_a_run_of_ours_is_no_run_of_ones_own(model, base):
    workdir = trained_run.trained(base)
    line = refusal(runs.load, workdir, model=model)
    assert "config.model.name='transformer_xl', model is of Gated" in line
    own = trained_run.loaded(base).model
    assert runs.load(workdir, model=own).model == own
