"""Configurations of Transformer-XL: parameter counts, checks, building."""

import dataclasses
import math
import types

import jax
import pytest
import small_transformer as small
from small_transformer import V

from xlformer import models
from xlformer.errors import UserError
from xlformer.models import TransformerXLConfig, base

WT103 = (20000, 40000, 200000)
LM1B = (60000, 100000, 640000)
BASE = dict(n_layer=12, d_model=512, n_head=8, d_head=64, d_inner=2048)
LARGE = dict(n_layer=24, d_model=1024, n_head=8, d_head=128, d_inner=3072)
WT103_BASE = dict(
    vocab_size=267735, n_layer=16, d_model=410, n_head=10, d_head=41, d_inner=2100,
    cutoffs=WT103, tie_projections=(False, True, True, True),
)  # fmt: skip
WT103_LARGE = WT103_BASE | dict(
    n_layer=18, d_model=1024, n_head=16, d_head=64, d_inner=4096, div_val=4
)
LM1B_BASE = dict(
    vocab_size=793471, n_layer=18, d_model=1024, n_head=8, d_head=128, d_inner=4096,
    cutoffs=LM1B, div_val=4,
)  # fmt: skip
LM1B_LARGE = LM1B_BASE | dict(
    n_layer=24, d_model=1280, n_head=16, d_head=80, d_inner=8192
)
NVIDIA = dict(cutoffs=(19997, 39997, 199997), n_head=8, d_model=512, d_head=64)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (dict(vocab_size=204, **BASE), 41_055_436),
        (dict(vocab_size=27, **BASE), 40_964_635),
        (dict(vocab_size=204, **LARGE), 277_231_820),
        (dict(vocab_size=27, **LARGE), 277_050_395),
        (WT103_BASE, 151_107_538),
        (WT103_BASE | dict(untie_r=True), 151_119_838),
        (WT103_LARGE, 285_170_506),
        (WT103_LARGE | dict(untie_r=True), 285_205_322),
        (LM1B_BASE, 357_812_082),
        (LM1B_BASE | dict(untie_r=True), 357_846_898),
        (LM1B_LARGE, 841_295_982),
        (LM1B_LARGE | dict(untie_r=True), 841_354_862),
        (WT103_BASE | NVIDIA | dict(d_inner=2048), 191_950_298),
    ],
)
def test_parameters_are_those_of_the_originals(fields, expected):
    params = jax.eval_shape(small.build(**fields).init, jax.random.key(0))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(n_layer=2.0), "n_layer=2.0 is not of type int"),
        (dict(n_layer=True), "n_layer=True is not of type int"),
        (dict(dropout="0.1"), "dropout='0.1' is not of type float"),
        (dict(cutoffs=(5.0,)), r"cutoffs=\(5.0,\) is not of type"),
        (dict(window=1.5), "window=1.5 is not of type"),
        (dict(attn_type=4), "attn_type=4 is none of 0, 1, 2, 3"),
        (dict(init="zeros"), "init='zeros' is none of normal, uniform"),
        (dict(init_scheme="jax"), "init_scheme='jax' is none of .*tensorflow"),
        (dict(dtype="float16"), "dtype='float16' is none of .*mean 'bfloat16'"),
        (dict(remat="some"), "remat='some' is none of none, .*full"),
        (dict(attention="flash"), "attention='flash' is none of .*xla"),
        (dict(n_layer=0), "n_layer=0 must be at least 1"),
        (dict(div_val=0), "div_val=0 must be at least 1"),
        (dict(memory_length=-1), "memory_length=-1 must be at least 0"),
        (dict(clamp_length=-1), "clamp_length=-1 must be at least 0"),
        (dict(dropout=1.0), "dropout=1.0 must be at least 0 and below 1"),
        (dict(attention_dropout=-0.1), "attention_dropout=-0.1 must be at least 0"),
        (dict(n_head=3), "n_head=3 does not divide .*d_model=8"),
        (dict(d_model=9, d_head=3), "d_model=9 must be even"),
        (
            dict(attn_type=3, table_length=5, d_head=3, memory_length=0),
            "n_head . d_head = d_model, found 6 and 8",
        ),
        (dict(attn_type=1), "table_length=0 with attn_type=1"),
        (dict(attn_type=3, memory_length=0), "table_length=0 with attn_type=3"),
        (dict(attn_type=2), "memory_length=13 with attn_type=2"),
        (dict(attn_type=3, table_length=5), "memory_length=13 with attn_type=3"),
        (dict(same_length=True, memory_length=0), "same_length with memory_length=0"),
        (dict(window=-1), "window=-1 must be at least 0"),
        (dict(positions="rope"), "positions='rope' is none of .*rotary"),
        (dict(positions="rotary", attn_type=2), "rotary' .*attn_type=2: .*set it to 0"),
        (dict(positions="rotary", clamp_length=9), "rotary' with .*clamp_length=9"),
        (dict(positions="rotary", d_head=5), "rotary' turns pairs, but d_head=5"),
        (dict(cutoffs=(5, 5)), r"cutoffs=\(5, 5\) must ascend"),
        (dict(cutoffs=(0, 5)), r"cutoffs=\(0, 5\) must ascend"),
        (dict(cutoffs=(5, 23)), r"cutoffs=\(5, 23\) .*vocab_size=23"),
        (dict(vocab_size=0), "vocab_size=0 must be at least 1"),
        (dict(tie_projections=(True, False)), "has 2 entries for 1 bins"),
        (dict(cutoffs=(5, 7), div_val=4), "div_val=4 leaves no width in bin 2: .*=8"),
    ],
)
def test_impossible_configurations_name_the_field_and_the_values(fields, message):
    with pytest.raises(UserError, match=f"config.model.*{message}"):
        TransformerXLConfig(**small.FIELDS | fields)


def test_whole_numbers_and_lists_are_taken_as_meant():
    config = TransformerXLConfig(**small.FIELDS | dict(dropout=0, cutoffs=[5, 7]))
    assert config.dropout == 0.0 and type(config.dropout) is float
    assert config.cutoffs == (5, 7)


def test_the_vocabulary_comes_from_the_config_or_the_caller():
    open_config = dict(name="transformer_xl", **small.FIELDS) | dict(vocab_size=None)
    closed = open_config | dict(vocab_size=V)
    assert (
        models.build(open_config, V) == models.build(closed) == models.build(closed, V)
    )
    assert models.build(TransformerXLConfig(**small.FIELDS)).vocab_size == V
    with pytest.raises(UserError, match="vocab_size is not set"):
        models.build(open_config)
    with pytest.raises(UserError, match="vocab_size=23 but the data has 29"):
        models.build(closed, 29)
    with pytest.raises(UserError, match="vocab_size=0 must be at least 1"):
        models.build(open_config, 0)


def test_what_others_ask_of_the_model():
    model = small.build(clamp_length=5, same_length=True, extended_length=3)
    card = {"memory_length": 13, "extended_length": 3, "clamp_length": 5, "window": 12}
    assert model.card() == card
    assert model.width == 8 and not model.needs_rngs and model.causal
    assert small.build(attention_dropout=0.1).needs_rngs
    assert small.build(dtype="bfloat16").dtype() == "bfloat16"
    model.check_mesh(types.SimpleNamespace(shape={"tensor": 2}))
    with pytest.raises(UserError, match="n_head=2 is not divisible by .*tensor=3"):
        model.check_mesh(types.SimpleNamespace(shape={"tensor": 3}))


def test_reading_and_generating_move_what_is_visible():
    model = small.build(same_length=True, extended_length=3)
    assert model.for_reading(memory_length=5).config.attention_window == 4
    explicit = model.for_reading(memory_length=5, window=9, same_length=None)
    assert explicit.config.attention_window == 9
    generating = model.for_generation()
    assert generating.extended_length == 0 and generating.config.window == 12
    assert small.build().for_generation().config.window == 13
    assert small.build(window=99).for_generation().config.window == 13


def test_the_tiny_form_keeps_the_character():
    large = {"n_layer": 16, "d_model": 410, "n_head": 10, "d_head": 41, "div_val": 4}
    large |= {"cutoffs": (20, 21, 22), "memory_length": 7, "same_length": True}
    config = TransformerXLConfig(
        **small.FIELDS | large, tie_projections=(False,) + (True,) * 3
    )
    tiny = config.tiny()
    assert (tiny.n_layer, tiny.d_model, tiny.head_width) == (2, 16, 8)
    assert (tiny.memory_length, tiny.attention_window) == (5, 4)
    assert (tiny.cutoffs, tiny.div_val) == ((11, 19), 2)
    assert tiny.tie_projections == (False, True, True)
    assert tiny.tiny() == tiny and tiny.norm_epsilon == config.norm_epsilon
    for field in ("extended_length", "clamp_length", "table_length", "d_embed"):
        assert getattr(tiny, field) == 0  # what is off stays off
    fields = {"name": "transformer_xl", **dataclasses.asdict(config)}
    assert models.tiny(fields) == {**fields, **dataclasses.asdict(tiny)}


def test_rotary_positions_have_no_parameters():
    shapes = jax.eval_shape(small.build(positions="rotary").init, jax.random.key(0))
    assert set(shapes["trunk"]) == {"layers"}
    assert set(shapes["trunk"]["layers"]["attention"]) == {"qkv", "output"}


def test_unknown_names_are_met_with_the_nearest():
    with pytest.raises(UserError, match="'n_layers', did you mean 'n_layer'?"):
        models.build(dict(name="transformer_xl", n_layers=3), V)
    with pytest.raises(UserError, match="name='transformer', did you mean 'transf"):
        models.build(dict(name="transformer"), V)
    with pytest.raises(UserError, match="name is missing; known: .*transformer_xl"):
        models.build(dict(n_layer=3), V)


def test_rotary_turns_pairs_of_a_head_whatever_the_width_of_the_model():
    fields = small.FIELDS | dict(d_model=9, n_head=3, d_head=4, positions="rotary")
    assert TransformerXLConfig(**fields).d_model == 9


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("tpu", None, "bfloat16"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", "7.5", "float32"),
        ("gpu", "gfx90a", "float32"),  # not known of AMD's
        ("cpu", None, "float32"),
    ],
)
def test_auto_is_bfloat16_where_that_is_native(
    platform, capability, expected, monkeypatch
):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert base.compute_dtype("auto").name == expected
