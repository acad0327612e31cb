"""Every named config: it loads, its model has the published size, and it shrinks."""

import math
import runpy

import jax
import pytest

from xlformer import config, models
from xlformer.data import sources
from xlformer.errors import UserError
from xlformer.training import optimizers

NAMES = config.names()
SOURCES = {f.stem: f for d in config.directories() for f in d.glob("[!_]*.py")}

# Debug forms of one family have equal parameters, so that tests compile them once.
FAMILIES = [
    ("enwik8_base", "enwik8_large", "text8_base", "text8_large"),
    ("wt103_base", "wt103_base_nvidia"),
    ("lm1b_base", "lm1b_base_paper", "lm1b_large"),
    ("quickstart", "text", "penn", "pennchar"),
    ("lstm_penn", "lstm_enwik8", "lstm_small"),
    ("universal_base",),
    ("universal_small",),
    ("performer_imagenet64", "performer_pg19"),
]
CHARACTER = {"attn_type", "pre_norm", "final_norm", "gate", "untie_r", "same_length"}
CHARACTER |= {"dropout", "attention_dropout", "init_std", "scan_layers"}
CHARACTER |= {"tie_weights", "word_dropout", "weight_dropout", "activation_penalty"}
CORPORA = {*sources.CORPORA, "stdlib", "text"}


def shapes(name, vocab_size, **fields):
    """The parameters of a named config's model as shapes; nothing is computed."""
    model_config = {**config.load(name).model.to_dict(), **fields}
    model = models.build(model_config, vocab_size=vocab_size)
    return jax.eval_shape(model.init, jax.random.key(0))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def fields(node, prefix=""):
    """Every option as a dotted name with the type of its value."""
    for key, value in node.items():
        if hasattr(value, "items"):
            yield from fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", type(value)


def test_the_names_are_the_files():
    assert set(NAMES) == set(SOURCES) and {"quickstart", "text"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["", ":debug"])
def test_loads_with_known_fields_and_values(name, form):
    found = config.load(name + form)
    # default_config is not locked while a config is made: a misspelt field would stay.
    default = config.default_config(found.model.name)
    assert dict(fields(found)) == dict(fields(default))
    assert found.name == name and found.is_locked
    assert found.optimizer.schedule in optimizers.SCHEDULES
    optimizers.build(found.optimizer)
    assert found.data.corpus in CORPORA
    models.build(found.model, vocab_size=1_000_000)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_source(name):
    constants = runpy.run_path(str(SOURCES[name]))
    found = count(shapes(name, constants["VOCAB_SIZE"]))
    message = "set PARAMETERS only if the run itself was meant to change"
    assert found == constants["PARAMETERS"], message


@pytest.mark.parametrize(
    ("name", "field", "value", "expected"),
    [
        ("wt103_base", "untie_r", True, 151_119_838),
        ("wt103_large", "untie_r", False, 285_170_506),
        ("lm1b_base", "untie_r", False, 357_812_082),
        ("lm1b_large", "untie_r", False, 841_295_982),
        ("lm1b_base", "proj_same_dim", False, 355_749_746),
        ("lm1b_base_paper", "proj_same_dim", False, 466_962_290),
        ("lm1b_large", "proj_same_dim", False, 838_078_062),
    ],
)
def test_parameters_of_the_other_original(name, field, value, expected):
    vocab_size = runpy.run_path(str(SOURCES[name]))["VOCAB_SIZE"]
    assert count(shapes(name, vocab_size, **{field: value})) == expected


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_what_a_run_is(name):
    head = runpy.run_path(str(SOURCES[name]))["__doc__"]
    for entry in ("Paper: ", "Command: ", "Hardware: ", "Expected: "):
        assert f"\n{entry}" in head, f"{name} does not open with {entry}"
    assert f"--config={name}" in head or name == "text"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0])
def test_debug_shapes_are_identical_within_a_family(family):
    first, *others = [shapes(f"{name}:debug", 23) for name in family]
    assert count(first) < 10_000
    for other in others:
        assert jax.tree.structure(other) == jax.tree.structure(first)
        assert jax.tree.leaves(other) == jax.tree.leaves(first)
    memories = {config.load(f"{n}:debug").model.get("memory_length") for n in family}
    assert len(memories) == 1


@pytest.mark.parametrize("name", NAMES)
def test_debug_keeps_the_character(name):
    full, small = config.load(name), config.load(f"{name}:debug")
    for field in CHARACTER & set(full.model):
        assert small.model[field] == full.model[field]
    if "cutoffs" in full.model:
        assert bool(small.model.cutoffs) == bool(full.model.cutoffs)
    if "div_val" in full.model:
        assert (small.model.div_val > 1) == (full.model.div_val > 1)
    assert small.data == full.data
    same = dict(small.optimizer, warmup_steps=full.optimizer.warmup_steps)
    assert same == dict(full.optimizer)
    assert small.train.steps == 2 and small.train.segment_length == 7
    assert small.train.batch_size == small.eval.batch_size == 2


@pytest.mark.parametrize("form", ["batch=8", "debug,batch=8", "batch=8,debug"])
def test_batch_argument_wins(form):
    assert config.load(f"enwik8_base:{form}").train.batch_size == 8


def test_quickstart_has_a_rotary_variant():
    assert config.load("quickstart").model.positions == "original"
    found = config.load("quickstart:positions=rotary,debug").model
    assert found.positions == "rotary"
    models.build(found, vocab_size=256)


def test_text_takes_your_own_text():
    found = config.load("text:path=book.txt,unit=chars,documents")
    assert found.data.path == "book.txt" and found.data.unit == "chars"
    assert found.data.corpus == "text" and found.data.documents is True


def test_unknown_argument_names_the_nearest():
    with pytest.raises(UserError, match="'debgu', did you mean 'debug'?"):
        config.load("enwik8_base:debgu")


def test_arguments_of_the_performer_that_nothing_reads_are_refused():
    for name in ("performer_small", "performer_pg19", "performer_protein"):
        with pytest.raises(UserError, match="features=elu with .*mechanism='softmax'"):
            config.load(f"{name}:mechanism=softmax,features=elu")
        config.load(f"{name}:mechanism=softmax,debug")
    found = config.load("performer_protein:features=positive,projected").model
    assert (found.features, found.n_features) == ("positive", 256)
    found = config.load("performer_protein").model
    assert (found.features, found.projected, found.n_features) == ("relu", False, 0)
