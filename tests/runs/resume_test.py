"""A run that is called again with other options: refused, taken and said, or free."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import training_runs
from training_runs import SYMBOLS, bag, final_state, text_config, write_text

from xlformer import config as config_lib
from xlformer import models, train
from xlformer.data.vocabulary import CharVocabulary
from xlformer.fields import FREE, REFUSED, TAKEN
from xlformer.runs import reading, resume
from xlformer.training import averaging, optimizers, run
from xlformer.training.state import TrainState, resumed

# Another valid value, where one more or "not" is none.
OTHER = {
    "model.name": "lstm",
    "model.vocab_size": 31,
    "model.d_model": 48,
    "model.n_head": 1,
    "model.attn_type": 1,
    "model.positions": "rotary",
    "model.cutoffs": (7,),
    "model.tie_projections": (True,),
    "model.window": 3,
    "model.init": "uniform",
    "model.init_scheme": "tensorflow",
    "model.dtype": "bfloat16",
    "model.remat": "full",
    "model.attention": "blocked",
    "data.corpus": "stdlib",
    "data.unit": "words",
    "data.newline": "drop",
    "optimizer.name": "lamb",
    "optimizer.schedule": "constant",
    "optimizer.decay_at": (0.25,),
    "eval.split": "test",
}


def config(**changes):
    found = config_lib.default_config(dropout=0.25, attention_dropout=0.25)
    found.data.corpus = "text"
    found.train.update(ema_decay=0.5, tail_average=0.5, spike_factor=2.0)
    found.optimizer.update(momentum=0.5, weight_decay=0.5, final_fraction=0.5)
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        with found.ignore_type():
            (found[section] if section else found)[field] = value
    return found


def other(name):
    value = config_lib.flat(config())[name]
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    return value / 2 if isinstance(value, float) else value + 1


def rate_at(step):
    return functools.partial(optimizers.next_rate, step=step, scale=1.0)


FIELDS = sorted(config_lib.flat(config()))


refusal = functools.partial(training_runs.refusal, resume.check, "DIR")


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_by_its_class(name):
    """In `old` it has one value, in `new` another; nothing else differs."""
    old, new = config(), config(**{name: other(name)})
    values = [config_lib.flat(c)[name] for c in (old, new)]
    assert values[0] != values[1]
    kind = config_lib.rules(old)[name].resume
    if kind == REFUSED:
        line = refusal(old, new)
        assert all(f"{value!r}" in line for value in values) and name in line
        return
    resume.check("DIR", old, new)
    said = resume.lines(old, new, 7, rate_at(7))
    assert len(said) == (kind == TAKEN)
    if kind == TAKEN:
        assert (
            f"from step 7 on config.{name}={values[1]!r}, before {values[0]!r}"
            in (said[0])
        )
    free = config_lib.flat(resume.with_free_fields(old, new))[name]
    assert free == values[kind == FREE and not name.startswith("model.")]


def test_what_may_change_of_a_model_and_of_the_data():
    """By hand: the table itself could be wrong."""
    rules = config_lib.rules(config())
    kinds = {name: rules[name].resume for name in FIELDS}
    model = {n for n in FIELDS if n.startswith("model.") and kinds[n] != REFUSED}
    dropout = {"model.dropout", "model.attention_dropout"}
    assert model == dropout | {
        "model.attention",
        "model.remat",
        "model.scan_layers",
        "model.dtype",
    }
    for name in ("seed", "data.documents", "data.unit", "data.corpus"):
        assert kinds[name] == REFUSED
    for name in ("batch_size", "segment_length", "variable_length"):
        assert kinds[f"train.{name}"] == REFUSED
    for name in ("train.steps", "optimizer.learning_rate", "optimizer.schedule"):
        assert kinds[name] == TAKEN


@pytest.mark.parametrize(
    "name",
    [
        "train.ema_decay",
        "train.tail_average",
        "optimizer.clip_norm",
        "optimizer.momentum",
    ],
)
def test_what_has_arrays_of_its_own_cannot_be_switched(name):
    on, off = config(**{name: 0.25}), config(**{name: 0.0})
    assert f"config.{name}=0.25, now it is 0.0" in refusal(on, off)
    assert f"config.{name}=0.0, now it is 0.25" in refusal(off, on)
    resume.check("DIR", on, config(**{name: 0.125}))


def test_a_model_that_began_with_other_weights_says_how_to_go_on():
    old = config(**{"model.d_inner": 7, "init_from": "../a"})
    assert "init_from='../a': pass it again" in refusal(old, config())


def test_more_steps_say_what_becomes_of_the_rate():
    """Of a cosine of 2 at step 1000 of 1000 and of 3000: 1 and 2 (0.5 + 0.5 cos)."""
    sizes = {"optimizer.learning_rate": 2.0, "optimizer.schedule": "cosine"}
    old = config(**sizes, **{"train.steps": 1000})
    new = config(**sizes, **{"train.steps": 3000})
    (line,) = resume.lines(old, new, 1000, rate_at(1000))
    assert line.endswith("config.train.steps=3000, before 1000: the next step's rate "
                         "is 1.75, not 1")  # fmt: skip


@pytest.mark.parametrize(("given", "taken"), [(0, 1), (3, 3)])
def test_the_least_count_of_a_word_stays_where_none_is_given(given, taken):
    old, new = config(**{"data.min_count": 1}), config(**{"data.min_count": given})
    assert resume.gone_on(old, new).data.min_count == taken


def test_losses_of_other_settings_are_forgotten():
    """And not what they have brought about: the scale of the rate, an average."""
    plateau = optimizers.plateau_init()._replace(
        best=jnp.float32(0.5), bad_count=jnp.int32(3), scale=jnp.float32(0.25)
    )
    average = averaging.init(2)._replace(
        losses_N=jnp.ones(2), least=jnp.float32(0.5), triggered=jnp.array(True),
        count=jnp.int32(7), rate=jnp.float32(0.125),
    )  # fmt: skip
    entries = dict.fromkeys(TrainState._fields)
    found = TrainState(**entries | {"plateau": plateau, "averaging": average})
    assert resumed(found, config(), config()) is found
    anew = resumed(found, config(), config(**{"eval.max_tokens": 5}))
    assert (float(anew.plateau.best), int(anew.plateau.bad_count)) == (np.inf, 0)
    assert float(anew.plateau.scale) == 0.25
    average = anew.averaging
    assert np.isinf([*average.losses_N, average.least]).all()
    assert (bool(average.triggered), int(average.count)) == (True, 7)
    assert float(average.rate) == 0.125


def test_a_run_with_another_validation_begins_its_plateau_anew(tmp_path):
    found = text_config(write_text(tmp_path / "text.txt"), steps=1)
    found.optimizer.learning_rate = 0.0
    model, losses = bag(vocab_size=SYMBOLS), []
    for steps, tokens in ((1, 17), (2, 61)):
        found.train.steps, found.eval.max_tokens = steps, tokens
        result = train.train(found, tmp_path / "run", model)
        losses.append(result["eval/nats_per_token"])
    assert losses[1] > losses[0]
    _, state, _ = final_state(tmp_path / "run", found, model)
    np.testing.assert_allclose(state.plateau.best, losses[1], rtol=1e-6)


def test_a_rate_that_stays_is_said_once():
    sizes = {"optimizer.learning_rate": 2.0, "optimizer.schedule": "constant"}
    old, new = config(**sizes), config(**sizes, **{"train.steps": 3000})
    (line,) = resume.lines(old, new, 7, rate_at(7))
    assert line.endswith("before 1000: the next step's rate is 2")


def test_a_complete_run_says_what_it_did_not_do():
    old, new = config(**{"train.steps": 60}), config(**{"train.steps": 30})
    assert resume.complete(old, old, 60) == "the run is complete: it has taken 60 steps"
    assert "and config.train.steps=30 asks for no more" in resume.complete(old, new, 60)
    new = config(**{"train.steps": 60, "optimizer.b1": 0.5})
    assert resume.complete(old, new, 60).endswith(
        "; config.optimizer.b1 changed nothing"
    )


def test_a_config_of_another_system_is_refused_by_its_name(monkeypatch):
    monkeypatch.setitem(models.MODELS, "wings", models.MODELS["transformer_xl"])
    old, new = config(), config(**{"model.name": "wings"})
    assert "config.model.name='transformer_xl', now it is 'wings'" in refusal(old, new)


def test_a_model_of_ones_own_does_not_read_config_model():
    old = config(own_model="Bag")
    resume.check("DIR", old, config(own_model="Bag", **{"model.d_model": 48}))
    assert "config.own_model='Bag', now it is ''" in refusal(old, config())
    assert "train(config, workdir, model=...)" in refusal(config(), old)


def test_what_0_2_0_sealed_without_a_word_of_its_model_goes_on_with_any():
    """Whether the weights are this model's their shapes say, when they are read."""
    adam = {"optimizer.weight_decay": 0.0, "optimizer.momentum": 0.0}
    adam["train.tail_average"] = 0.0  # A run keeps one average.
    valid = functools.partial(config, **adam)
    said = config_lib.to_dict(valid())
    del said["own_model"]
    old = config_lib.from_dict(said)
    for own_model in ("", "Bag"):
        resume.check("DIR", old, valid(own_model=own_model))
        assert resume.differences(old, valid(own_model=own_model)) == []
    resume.check("DIR", old, valid(own_model="Bag", **{"model.d_model": 48}))
    assert "config.model.d_model=512, now it is 48" in refusal(
        old, valid(**{"model.d_model": 48})
    )
    assert run._sealing(old, None).own_model == ""
    assert run._sealing(old, bag()).own_model == "Bag"
    vocabulary = CharVocabulary("abc", (1, 1, 1))
    assert reading._model("DIR", old, vocabulary, bag()) == bag()
    assert reading._model("DIR", old, vocabulary, None).config.d_model == 512
