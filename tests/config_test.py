"""Loading, overriding and storing configs: what each mistake says."""

import json

import pytest
from own_trunk import Recurrent

from xlformer import config, fields, models
from xlformer.errors import Argument, UserError


def load(*overrides):
    return config.load("wt103_base:debug", overrides)


def message(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_override_sets_a_field():
    found = load("train.steps=3", "data.corpus=enwik8", "model.pre_norm=true")
    assert found.train.steps == 3
    assert found.data.corpus == "enwik8"
    assert found.model.pre_norm is True


def test_int_becomes_float():
    value = load("optimizer.learning_rate=1").optimizer.learning_rate
    assert value == 1.0 and type(value) is float


@pytest.mark.parametrize("text", ["(3,5)", "[3,5]"])
def test_tuple_from_tuple_or_list(text):
    assert load(f"model.cutoffs={text}").model.cutoffs == (3, 5)


def test_field_that_is_none_takes_a_value():
    assert load().model.vocab_size is None
    assert load("model.vocab_size=31").model.vocab_size == 31
    assert load("model.window=none").model.window is None


def test_text_field_takes_anything():
    assert load("data.directory=12").data.directory == "12"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.step=3", "config.train has no field 'step', did you mean 'steps'?"),
        ("trian.steps=3", "config has no field 'trian', did you mean 'train'?"),
        ("train.steps.x=3", "config.train.steps has no field 'x'"),
        ("train.steps=many", "config.train.steps='many': expected int, as in 2"),
        ("train.steps=1.5", "expected int"),
        ("train.steps=True", "expected int"),
        ("model.pre_norm=1", "expected bool"),
        ("model.cutoffs=3", "expected tuple"),
        ("optimizer.learning_rate=high", "expected float"),
        ("train=3", "config.train is a section; name one of its fields"),
        ("train.steps", "config.train.steps needs a value: "),
        ("train.steps.x=1", "config.train.steps has no field 'x'"),
    ],
)
def test_bad_override(override, expected):
    assert expected in message(load, override)


def test_loaded_config_is_locked():
    with pytest.raises(AttributeError):
        load().train.stpes = 3


def test_unknown_config_names_the_nearest():
    text = message(config.load, "wt103_bass")
    assert "no such config, did you mean 'wt103_base'?" in text
    assert "no such file" in message(config.load, "nowhere.py")


def test_arguments_take_the_type_of_their_default():
    defaults = {"debug": False, "batch": 0, "path": "", "rate": 0.5}
    named = Argument("config")
    parsed = fields.parse_pairs("debug,batch=4,path=7,rate=1", defaults, named)
    assert parsed == {"debug": True, "batch": 4, "path": "7", "rate": 1.0}
    assert type(parsed["rate"]) is float
    assert "expected int" in message(fields.parse_pairs, "batch=x", defaults, named)
    for alone in ("batch", "debug,path"):
        line = message(fields.parse_pairs, alone, defaults, named)
        name = alone.split(",")[-1]
        assert line == f"config: {name!r} needs a value: {name}=VALUE"
    text = message(fields.parse_pairs, "bath=4", defaults, named)
    assert "unknown argument 'bath', did you mean 'batch'?" in text


def test_config_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from xlformer.config import default_config\n"
        "def get_config(layers=1):\n"
        "    return default_config('transformer_xl', n_layer=layers)\n"
    )
    found = config.load(f"{path}:layers=2")
    assert found.model.n_layer == 2 and found.name == "mine"
    path.write_text("x = 1\n")
    assert "no get_config" in message(config.load, str(path))
    path.write_text("def get_config():\n    return {'seed': 1}\n")
    assert "get_config returns no ConfigDict" in message(config.load, str(path))
    path.write_text(
        "from xlformer.config import default_config\n"
        "def get_config():\n"
        "    config = default_config('transformer_xl')\n"
        "    config.train.step = 7  # would train as if it were not there\n"
        "    return config\n"
    )
    text = message(config.load, str(path))
    assert text.startswith("config.train.step: there is no such field, did you mean 't")


def test_another_model_is_for_a_config_file(monkeypatch):
    """Its fields are others: the line named one of them that nobody had typed."""
    monkeypatch.setitem(models.MODELS, "leaky", models.TransformerXL)
    line = message(load, "model.name=leaky")
    assert "config.model.name='leaky': another model has other fields; a con" in line
    assert load("model.name=transformer_xl").model.name == "transformer_xl"
    assert "config.model.name='x'; known: " in message(load, "model.name=x")


def test_a_model_cannot_be_evaluated_with_what_it_does_not_have(monkeypatch):
    """Said when the config is checked, not after hours at the first validation."""
    monkeypatch.setitem(models.MODELS, "recurrent", Recurrent)
    found = config.default_config("recurrent")
    config.check(found)
    found.eval.memory_length = 5
    expected = "config.eval: memory_length=5: Recurrent has no memory_length"
    assert message(config.check, found) == expected
    found.eval.update(memory_length=-1, same_length=True)
    assert "same_length=True: Recurrent has no same" in message(config.check, found)
    text = message(load, "eval.memory_length=0", "eval.same_length=true")
    assert text.startswith("config.eval: ") and "a token must see itself" in text


def test_unknown_model_field():
    text = message(lambda: config.default_config("transformer_xl", d_modle=3))
    assert "config.model has no field 'd_modle', did you mean 'd_model'?" in text


@pytest.mark.parametrize("name", ["wt103_large", "quickstart"])
def test_json_round_trip(name):
    found = config.load(name)
    again = config.from_json(config.to_json(found))
    assert again == found and again.is_locked
    assert type(again.model.cutoffs) is tuple
    assert again.model.tie_projections == found.model.tie_projections
    assert config.to_json(again) == config.to_json(found)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"n_layer": 12}', '{"model": {}}'])
def test_foreign_json(text):
    assert "config.json is not a resolved config" in message(config.from_json, text)


def test_json_of_another_version():
    stored = json.loads(config.to_json(load()))
    stored["train"]["step"] = stored["train"].pop("steps")
    text = message(config.from_json, json.dumps(stored))
    assert "config.train has no field 'step', did you mean 'steps'?" in text
    stored = {"model": {"name": "transformer_xxl"}}
    text = message(config.from_json, json.dumps(stored))
    assert "did you mean 'transformer_xl'?" in text
