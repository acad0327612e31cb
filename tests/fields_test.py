"""The table of options: complete, and refused before anything else happens."""

import dataclasses
import math

import pytest
import training_runs

from xlformer import config as config_lib
from xlformer import fields, models
from xlformer.errors import UserError
from xlformer.training import optimizers


def refusal(*overrides, spec="text:path=not-there.txt,debug"):
    return training_runs.refusal(config_lib.load, spec, overrides)


@pytest.mark.parametrize("name", models.MODELS)
def test_every_field_has_a_rule_and_every_rule_a_field(name):
    config = config_lib.default_config(name)
    assert set(config_lib.rules(config)) == set(config_lib.flat(config))
    config_class = models.MODELS[name].Config
    own = {field.name for field in dataclasses.fields(config_class)}
    assert set(config_class.RULES) == own
    for rule in config_lib.rules(config).values():
        assert rule.resume in (fields.REFUSED, fields.TAKEN, fields.FREE)


def numbers():
    config = config_lib.default_config()
    for name, value in config_lib.flat(config).items():
        if type(value) in (int, float):
            yield name, value, config_lib.rules(config)[name]


@pytest.mark.parametrize(("name", "value", "rule"), list(numbers()))
def test_a_number_has_bounds(name, value, rule):
    """Below its least, above its most, and no number at all."""
    assert not (rule.choices and rule.least), name
    if rule.choices:
        wrong = [max(rule.choices) + 1]
    else:
        low = rule.least if rule.above is None else rule.above
        assert low is not None, f"{name} has no lower bound"
        wrong = [below for below in (low - 1, low - 2, low - 3) if below != rule.off]
    if isinstance(value, float):
        wrong = [*map(float, wrong), math.nan, math.inf, -math.inf]
    elif rule.most is None and not rule.choices:
        wrong.append(1 << 31)
    for bad in wrong:
        with pytest.raises(UserError, match=f"^{name}={bad}"):
            rule.check(name, bad)
    rule.check(name, value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.b1=1.5"], "optimizer.b1=1.5 must be at least 0 and below 1"),
        (["optimizer.plateau_factor=0"], "plateau_factor=0.0 must be above 0"),
        (["optimizer.final_fraction=-0.1"], "final_fraction=-0.1 must be at least 0"),
        (["optimizer.learning_rate=1e999"], "learning_rate=inf must be a finite"),
        (["optimizer.name=adma"], "name='adma' is none of .* mean 'adam'"),
        (["optimizer.schedule=cosin"], "schedule='cosin' is none of .* mean 'cosine'"),
        (["optimizer.weight_decay=0.1"], "weight_decay=0.1 has no effect with 'adam'"),
        (["optimizer.momentum=0.5"], "momentum=0.5 has no effect with 'adam'; .*sgd"),
        (
            ["optimizer.schedule=plateau", "train.eval_every=0"],
            "eval_every=0 with 'plateau' in config.optimizer",
        ),
        (["eval.split=validaton"], "split='validaton' is none of .*'validation'"),
        (["model.memory_length=-7"], "model.memory_length=-7 must be at least 0"),
        (["model.dropout=1"], "model.dropout=1.0 must be at least 0 and below 1"),
        (["model.n_head=3", "model.d_head=0"], "n_head=3 does not divide"),
        (["seed=9223372036854775808"], "seed=9223372036854775808 must be"),
        (["train.steps=0"], "train.steps=0 must be at least 1"),
        (["train.spike_factor=0.5"], r"spike_factor=0.5 must be above 1 \(or 0\)"),
        (["train.micro_batches=5"], "batch_size=2 .*micro_batches=5"),
        (["data.newline=drop"], "newline=drop is for the bytes of enwik8"),
        (["data.max_vocab=9"], "data.max_vocab=9 is for the words of your own text"),
        (["data.corpus=text8"], "path and .documents need config.data.corpus=text"),
        (
            ["train.variable_length=True", "model.extended_length=3"],
            "variable_length .*extended_length=3",
        ),
        (
            ["model.attend_zero_memory=True", "data.documents=True"],
            "documents=True .*resets_in_segment=False",
        ),
        (["train.mask_rate=0"], "mask_rate=0.0 must be above 0"),
    ],
)
def test_what_cannot_be_is_said_before_the_text_is_looked_for(overrides, message):
    with pytest.raises(UserError, match=message):
        config_lib.load("text:path=not-there.txt,debug", overrides)


def test_a_config_that_was_made_otherwise_is_of_the_right_types_too():
    config = config_lib.default_config()
    with config.ignore_type():
        config.train.steps = 3.0
    with pytest.raises(UserError, match="^config.train.steps=3.0 is not of type int"):
        config_lib.check(config)
    found = config_lib.to_dict(config_lib.default_config()) | {"seed": 1 << 63}
    with pytest.raises(UserError, match=f"^there: config.seed={1 << 63} must be at"):
        config_lib.from_dict(found, where="there")


def test_what_only_the_model_knows_waits_for_one_of_ones_own():
    config = config_lib.default_config(extended_length=3)
    config.train.update(variable_length=True, objective="masked")
    with pytest.raises(UserError, match="variable_length .*extended_length=3"):
        config_lib.check(config)
    config.own_model = "Mine"
    found = config_lib.from_dict(config_lib.to_dict(config))
    assert found.train.objective == "masked"


@pytest.mark.parametrize("name", config_lib.names())
def test_every_config_can_be(name):
    config_lib.check(config_lib.load(f"{name}:debug"))


def test_the_table_knows_what_there_is():
    table = fields.TABLE["optimizer"]
    assert set(table["name"].rule.choices) == set(optimizers.OPTIMIZERS)
    assert set(table["schedule"].rule.choices) == set(optimizers.SCHEDULES)
    assert set(fields.ONLY_OF) < set(table)
