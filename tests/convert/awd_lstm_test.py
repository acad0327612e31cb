"""AWD-LSTM's weights: its own numbers, to and fro, and what is refused."""

import golden_weights
import numpy as np
import pytest
from golden import check
from golden_weights import changed

from xlformer import convert
from xlformer.errors import UserError
from xlformer.models import LSTMConfig

FILE = "awd_lstm_split_softmax.npz"
GOLDEN, HPARAMS = golden_weights.read(FILE)


def read(state=GOLDEN, **hparams):
    return convert.from_awd_lstm(state, HPARAMS | hparams)


def of_weight_drop(state, *, with_dropped):
    """As a WeightDrop module keeps it."""
    found = {}
    for name, x in state.items():
        if not name.startswith("rnns."):
            found[name] = x
            continue
        _, k, part = name.split(".")
        raw = f"rnns.{k}.module.{part}" + "_raw" * (part == "weight_hh_l0")
        found[raw] = x
        if with_dropped and part == "weight_hh_l0":
            found[f"rnns.{k}.module.{part}"] = x * 2
    return found


def untied(state):
    """The untied model of these sizes, without tails."""
    random = np.random.default_rng(0)
    V, N, D = 60, 14, 10
    shapes = {"encoder.weight": (V, D), "decoder.weight": (V, N), "decoder.bias": (V,)}
    for k, inputs in enumerate((D, N)):
        shapes |= {f"rnns.{k}.weight_ih_l0": (4 * N, inputs)}
        shapes |= {f"rnns.{k}.weight_hh_l0": (4 * N, N)}
        shapes |= {f"rnns.{k}.bias_{x}_l0": (4 * N,) for x in ("ih", "hh")}
    return {n: random.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
        assert found[name].dtype == x.dtype


def test_the_programs_own_numbers():
    result = check.check(golden_weights.FOLDER / FILE)
    assert result.ok, result.problems
    assert result.compared == result.total == 105


def test_there_and_back_is_the_same_state():
    config, params = read()
    assert config.widths == (10, 14, 10) and config.cutoffs == (8, 25, 40)
    same(convert.to_awd_lstm(config, params), GOLDEN)
    state = untied(GOLDEN)
    config, params = convert.from_awd_lstm(state, {"dropouth": 0.25, "alpha": 2})
    assert (config.widths, config.tie_weights) == ((10, 14, 14), False)
    assert (config.hidden_dropout, config.activation_penalty) == (0.25, 2.0)
    assert config.dropout == config.weight_dropout == 0
    same(convert.to_awd_lstm(config, params), state)


@pytest.mark.parametrize("with_dropped", [False, True])
def test_of_a_model_with_weight_drop_the_raw_weights_count(with_dropped):
    state = of_weight_drop(GOLDEN, with_dropped=with_dropped)
    config, params = read(state, wdrop=0.5)
    assert config.weight_dropout == 0.5
    same(convert.to_awd_lstm(config, params), GOLDEN)


def test_a_tied_decoder_need_not_be_there_and_float64_stays():
    state = {n: x.astype(np.float64) for n, x in GOLDEN.items()}
    del state["decoder.weight"]
    _, params = read(state)
    assert params["trunk"]["lstm_0"]["input_kernel"].dtype == np.float64


@pytest.mark.parametrize(
    ("state", "hparams", "line"),
    [
        ({"decoder__bias": None}, {}, "the state dict lacks 'decoder.bias'"),
        ({"rnns__0__weight_hh_l0": None}, {}, "lacks 'rnns.0.weight_hh_l0'"),
        ({"rnns__1__bias_hh_l0": None}, {}, "lacks 'rnns.1.bias_hh_l0'"),
        ({"criterion__tail_vectors": None}, {}, "lacks 'criterion.tail_vectors'"),
        ({"criterion__tail_bias": np.float32(1)}, {}, "make 3 tails, but .* has 1"),
        ({"rnns__99999999__x": np.ones(3)}, {}, "lacks rnns.2, but has rnns.99999999"),
        ({f"rnns__{'9' * 5000}__x": np.ones(3)}, {}, "unexpected names: rnns.99"),
        ({"encoder__weight": np.ones(3)}, {}, "encoder.weight has shape .3,., expec"),
        ({"rnns__0__bias_ih_l0": np.ones(3)}, {}, "rnns.0.bias_ih_l0 has shape .3,"),
        ({"decoder__bias": np.ones(60, int)}, {}, "decoder.bias holds int64, expected"),
        ({"pos_emb": np.ones(3)}, {}, "the state dict has unexpected names: pos_emb"),
        (
            {"decoder__weight": np.ones((60, 10))},
            {},
            "decoder.weight is tied in the hp",
        ),
        ({}, {"nhid": 15}, "hparams: nhid=15, the state has 14"),
        ({}, {"n_token": 61}, "hparams: n_token=61, the state has 60"),
        ({}, {"splits": []}, r"splits=\[\] make 0 tails, but .*tail_bias has 3"),
        ({}, {"tied": "no"}, "hparams: tied='no' is neither true nor false"),
        ({}, {"splits": "8"}, "hparams: splits='8' is not a list of ids"),
        ({}, {"splits": [8, 25, 99]}, "cutoffs=.* reach beyond the vocabulary"),
        ({}, {"dropouth": "x"}, "config.model.hidden_dropout='x' is not of type float"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(state, hparams, line):
    with pytest.raises(UserError, match=line) as raised:
        read(changed(GOLDEN, **state), **hparams)
    assert "\n" not in str(raised.value)


def test_a_model_of_one_layer_is_read_too():
    state = {n: x for n, x in untied(GOLDEN).items() if not n.startswith("rnns.1")}
    config, _ = convert.from_awd_lstm(state)
    assert config == LSTMConfig(60, 1, 10, 14, tie_weights=False, dropout=0.0)
