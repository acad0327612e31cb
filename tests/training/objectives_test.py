"""What a model is trained to say: which symbols are hidden, and which losses count."""

import functools

import jax
import numpy as np
import pytest
from training_runs import assert_close, bag, blanks, refusal, small_config, text_config

from xlformer import config as config_lib
from xlformer import fields
from xlformer.data.stream import Stream
from xlformer.train import train
from xlformer.training import objectives, optimizers, state, steps

V, MASK = 13, 13  # symbols of the data; the mask is one more
TOKENS = np.random.default_rng(3).integers(0, V, 601).astype(np.uint8)
KEY = jax.random.key(17)


def make_config(**changes):
    fields = {"objective": "masked", "batch_size": 6, "mask_rate": 0.3}
    return small_config(**fields | changes)


@functools.cache
def step_of(**changes):
    """(the step, compiled, and a fresh state)."""
    config, model = make_config(**changes), blanks(V + 1)
    optimizer = optimizers.build(config.optimizer)
    schedule = optimizers.learning_rate(config.optimizer, config.train.steps)
    make = functools.partial(state.create, config, model, optimizer)
    step = jax.jit(steps.make_step(config, model, optimizer, schedule))
    return step, jax.jit(make)(jax.random.key(5))


def batch(k=0):
    return Stream(TOKENS, batch_size=6, segment_length=7).at(k)


def hidden_of(step):
    """What the step hides of each of 6 rows of 7, from the rule of the keys."""
    key = jax.random.fold_in(jax.random.key(make_config().seed), step)
    key = jax.random.fold_in(key, objectives.STREAM)
    found = np.zeros((6, 7), bool)
    for row in range(6):
        for t in range(7):
            place = jax.random.fold_in(jax.random.fold_in(key, row), t)
            found[row, t] = jax.random.uniform(place) < 0.3
    return found


# Which are hidden ---------------------------------------------------------------------


def test_what_is_hidden_is_the_mask_and_its_target_is_what_it_was():
    inputs_BT = np.random.default_rng(5).integers(0, V, (31, 41))
    places_BT = np.tile(np.arange(37), (31, 1))
    found_BT, targets_BT, hidden_BT = map(
        np.asarray,
        objectives.masked(inputs_BT, KEY, places_BT, rate=0.15, mask_id=MASK),
    )
    # The first four columns are extended context, of which nothing is asked.
    np.testing.assert_array_equal(targets_BT, inputs_BT[:, 4:])
    expected_BT = np.where(hidden_BT, MASK, inputs_BT[:, 4:])
    np.testing.assert_array_equal(found_BT[:, 4:], expected_BT)
    np.testing.assert_array_equal(found_BT[:, :4], inputs_BT[:, :4])
    assert not (targets_BT == MASK).any()


def test_so_many_are_hidden_as_the_rate_says_whatever_the_rows():
    places_BT = np.arange(5000).reshape(8, -1)
    hide = functools.partial(objectives.masked, rate=0.15, mask_id=MASK)
    _, _, hidden_BT = hide(np.zeros_like(places_BT), KEY, places_BT)
    assert abs(hidden_BT.mean() - 0.15) < 3 * np.sqrt(0.15 * 0.85 / 5000)
    # A place of the text is hidden or not however the text is cut.
    _, _, other_BT = hide(np.ones((40, 125), int), KEY, places_BT.reshape(40, -1))
    np.testing.assert_array_equal(hidden_BT.ravel(), other_BT.ravel())


# Which losses count -------------------------------------------------------------------


def test_the_loss_is_the_mean_over_all_that_is_hidden_in_the_batch():
    """Rows hide different numbers, so a mean of means of rows would be another one."""
    model, (step, start) = blanks(V + 1), step_of()
    after, metrics = step(start, batch())
    inputs_BT, hidden_BT = batch()["inputs_BT"], hidden_of(0)
    assert len(set(hidden_BT.sum(axis=1))) > 1
    shown_BT = np.where(hidden_BT, MASK, inputs_BT)
    nll_BT, *_ = model.apply(start.params, shown_BT, inputs_BT, ())
    expected = np.asarray(nll_BT)[hidden_BT].mean()
    np.testing.assert_allclose(metrics["train/loss_nats"], expected, rtol=1e-6)
    # Only hidden symbols are learnt: those beside them are what moves.
    moved = np.asarray(after.params["after_VV"] - start.params["after_VV"]).any(axis=1)
    beside = shown_BT[:, 1:][hidden_BT[:, :-1]]
    assert set(np.flatnonzero(moved)) == set(beside)


def test_each_step_hides_others_and_micro_batches_the_same():
    (whole, start), (parts, _) = step_of(), step_of(micro_batches=3)
    for k in range(2):
        counts = [hidden_of(k)[part::3].sum() for part in range(3)]
        assert len(set(counts)) > 1  # or a mean of means would do
        start = start._replace(step=np.int32(k))
        (a, logged), (b, parts_logged) = (f(start, batch()) for f in (whole, parts))
        assert_close(b.params, a.params)
        np.testing.assert_allclose(
            logged["train/loss_nats"], parts_logged["train/loss_nats"], rtol=1e-6
        )
    assert (hidden_of(0) != hidden_of(1)).any()


def test_nothing_hidden_is_no_loss_and_no_nan():
    step, start = step_of(mask_rate=1e-9)
    after, metrics = step(start, batch())
    assert float(metrics["train/loss_nats"]) == 0 and bool(metrics["train/finite"])
    assert_close(after.params, start.params, 0)


# Which models -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "model", "fragments"),
    [
        ("next_token", blanks(10), ["'next_token'", "causal=False", "with masked"]),
        ("masked", bag(vocab_size=10), ["'masked'", "causal=True", "with next_token"]),
        ("masked", None, ["'masked'", "causal=True", "with next_token"]),
    ],
)
def test_a_model_that_sees_too_much_or_too_little_is_refused_before_the_data(
    tmp_path, objective, model, fragments
):
    found = text_config(tmp_path / "not-there.txt", objective=objective)
    line = refusal(train, found, tmp_path / "run", model=model)
    assert all(fragment in line for fragment in fragments), line
    assert line.startswith("config.train.objective=")


def test_the_mask_is_one_symbol_more():
    found = config_lib.default_config()
    assert config_lib.vocab_size(found, V) == V
    found.train.objective = "masked"
    assert config_lib.vocab_size(found, V) == V + 1
    assert objectives.build(found.train, blanks(V + 1)).mask_id == V


def test_the_table_knows_what_there_is():
    made = {name: x.causal for name, x in objectives.OBJECTIVES.items()}
    assert {name: x.causal for name, x in fields.OBJECTIVES.items()} == made
