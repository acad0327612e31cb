"""Scoring a model that is trained on hidden symbols: which ones, and what cards say."""

import jax
import numpy as np
import pytest
from training_runs import (
    SYMBOLS,
    BagConfig,
    Blanks,
    blanks,
    refusal,
    text_config,
    write_text,
)

from xlformer import evaluate, generate, runs, scoring
from xlformer.train import train
from xlformer.training import objectives

RATE, T = 0.3, 5


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    base = tmp_path_factory.mktemp("masked")
    fields = {"objective": "masked", "mask_rate": RATE, "steps": 3, "eval_every": 0}
    config = text_config(write_text(base / "text.txt"), **fields)
    train(config, base / "run", blanks(SYMBOLS + 1))
    return base / "run"


def hidden(n):
    """By the rule: a function of the seed on the card and of the place in the text."""
    key = jax.random.key(20)
    draw = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))
    return np.asarray(draw(np.arange(n))) < RATE


def test_masked_loss_by_hand(workdir):
    model, n = blanks(SYMBOLS + 1), 8 * T
    run = runs.load(workdir, model=model)
    text = (workdir.parent / "text.txt").read_text()
    ids = run.vocabulary.encode(text[: n + 1]).astype(np.int32)
    settings = {"split": "train", "max_tokens": n + 1, "segment_length": T}
    card = evaluate.evaluate(workdir, model=model, batch_size=1, **settings)
    mask_N, nats, apply = hidden(n), 0.0, jax.jit(model.apply)
    for start in range(0, n, T):
        part = slice(start, start + T)
        inputs_BT = np.where(mask_N[part], SYMBOLS, ids[part])[None]
        nll_BT, _, _ = apply(run.params, inputs_BT, ids[None, part], ())
        nats += float(nll_BT[0][mask_N[part]].sum())
    assert card["nats"] == pytest.approx(nats, rel=1e-5)
    assert card["tokens_scored"] == mask_N.sum()
    found = [card[name] for name in ("objective", "mask_rate", "mask_seed")]
    assert found == ["masked", RATE, objectives.EVALUATION_SEED]
    assert (card["bytes_scored"], card["word_ppl"]) == (None, None)
    # Neither rows nor segments change what is hidden.
    rows = evaluate.evaluate(workdir, model=model, batch_size=3, **settings)
    assert rows["nats"] == pytest.approx(nats, rel=1e-5)
    other = evaluate.evaluate(workdir, model=model, **settings | {"segment_length": 7})
    assert other["tokens_scored"] == mask_N.sum() and other["nats"] != card["nats"]


def test_nothing_is_learnt_from_hidden_tokens(workdir):
    options = {"model": blanks(SYMBOLS + 1), "dynamic": "sgd"}
    line = refusal(evaluate.evaluate, workdir, **options)
    assert line.startswith("dynamic='sgd': the run has config.train.objective=masked")


def test_each_hidden_token_is_told_where_it_stands(workdir):
    model, ids = blanks(SYMBOLS + 1), np.arange(41) % SYMBOLS
    plan = scoring.cut_rows_for(model, 41, batch_size=3, segment_length=T)
    objective = objectives.Masked(RATE, SYMBOLS)
    seen = []

    class Seen(scoring.Tally):
        def add(self, scored):
            super().add(scored)
            seen.extend(zip(scored.index_N, scored.ids_N, strict=True))

    params = runs.load(workdir, model=model).params
    scorer = scoring.Evaluator.of(model, plan, None, objective)
    scorer.score(params, ids, plan, tally=Seen())
    assert sorted(seen) == [(i, ids[i]) for i in np.flatnonzero(hidden(40))]
    few = scoring.cut_rows_for(model, 2, batch_size=1, segment_length=T)
    assert not hidden(1).any()
    scorer = scoring.Evaluator.of(model, few, None, objective)
    assert "none of 1 tokens is scored" in refusal(scorer.score, params, ids[:2], few)


def test_a_model_that_sees_ahead_is_told_where_a_row_ends():
    """Whatever it says of positions: what follows is the next row's text."""

    class Told(Blanks):
        positions_from_end = False

        def apply(self, params, inputs_BT, *arrays, lengths_B=None, **options):
            valid_BT = jax.numpy.arange(inputs_BT.shape[1])[None] < lengths_B[:, None]
            inputs_BT = jax.numpy.where(valid_BT, inputs_BT, SYMBOLS)
            return super().apply(params, inputs_BT, *arrays, **options)

    model = Told(BagConfig(SYMBOLS + 1))
    params, ids = model.init(jax.random.key(3)), np.arange(41) % SYMBOLS
    plan = scoring.cut_rows_for(
        model, 41, batch_size=3, segment_length=T, warmup="none"
    )
    scorer = scoring.Evaluator.of(model, plan, None, objectives.Masked(RATE, SYMBOLS))
    score = scorer.score(params, ids, plan)
    expected = 0.0
    for start in range(0, 39, 13):  # Three rows of 13, of which each ends after 12.
        for first in range(start, start + 12, T):
            index = np.arange(first, min(first + T, start + 12))
            mask = hidden(39)[index]
            shown = np.pad(np.where(mask, SYMBOLS, ids[index]), (0, 1))
            shown[len(index)] = SYMBOLS
            before = params["before_VV"][np.roll(shown, 1)[: len(index)]]
            before = np.where(np.arange(len(index))[:, None] > 0, before, 0)
            after = params["after_VV"][shown[1:]]
            after = np.where(np.arange(len(index))[:, None] < T - 1, after, 0)
            log_p = jax.nn.log_softmax(before + after)
            expected -= float(log_p[np.arange(len(index)), ids[index]][mask].sum())
    assert score.nats == pytest.approx(expected, rel=1e-5)


def test_it_does_not_continue_texts(workdir):
    run = runs.load(workdir, model=blanks(SYMBOLS + 1))
    line = refusal(generate.generate, run.model, run.params, [[1]], num_tokens=3)
    assert "causal=False" in line and "cannot continue a text" in line
