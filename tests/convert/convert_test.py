"""Parity with the originals' own programs, in values, memory and gradients."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from jax import jit

from xlformer import convert, models
from xlformer.errors import UserError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = sorted(p.stem for p in GOLDEN.glob("attn*.npz"))
HF_CASES = sorted(p.name for p in GOLDEN.glob("hf_*"))


@functools.cache
def _load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        arrays = dict(arrays)
    hparams = json.loads(bytes(arrays["config"]))
    state = {
        k[len("params/") :]: x for k, x in arrays.items() if k.startswith("params/")
    }
    return hparams, state, arrays


def _loss(model, params, inputs_BT, targets_BT, state):
    nll_BT, state, _ = model.apply(params, inputs_BT, targets_BT, state)
    return nll_BT.mean(), (nll_BT, state)


def _assert_close_norm(actual, expected, tolerance, name):
    """Relative to the norm of the whole array; absolute for one that is zero."""
    scale = max(np.linalg.norm(expected), 1e-3)
    assert np.linalg.norm(actual - expected) <= tolerance * scale, name


def _check_case(name, dtype, nll_tolerance, gradient_tolerance):
    hparams, state_dict, arrays = _load(name)
    state_dict = {k: x.astype(dtype) for k, x in state_dict.items()}
    config, params = convert.from_original(state_dict, hparams)
    assert jax.tree.leaves(params)[0].dtype == dtype
    model = models.build(dataclasses.replace(config, scan_layers=True))
    step = jit(jax.value_and_grad(functools.partial(_loss, model), has_aux=True))
    memory = model.init_state(hparams["batch"])
    for s in range(len(hparams["lens"])):
        segment = {
            k.removeprefix(f"seg{s}/"): x
            for k, x in arrays.items()
            if k.startswith(f"seg{s}/")
        }
        inputs_BT, targets_BT = segment["inputs"].T, segment["targets"].T
        (_, (nll_BT, memory)), grads = step(params, inputs_BT, targets_BT, memory)
        assert nll_BT.dtype == dtype
        np.testing.assert_allclose(nll_BT.T, segment["nll"], atol=nll_tolerance, rtol=0)
        if "memory" in segment:
            expected = segment["memory"][:-1]  # The last entry is never read.
            m = expected.shape[1]
            assert (np.asarray(memory.length_B) == m).all()
            hidden = np.asarray(memory.hidden_LBMD)[
                :, :, memory.hidden_LBMD.shape[2] - m :
            ]
            np.testing.assert_allclose(
                hidden.transpose(0, 2, 1, 3), expected, atol=10 * nll_tolerance, rtol=0
            )
        grads = convert.to_original(config, grads)
        compared = [k for k in segment if k.startswith("grad/")]
        assert compared or s < len(hparams["lens"]) - 1
        for key in compared:
            expected = segment[key]
            _assert_close_norm(grads[key[5:]], expected, gradient_tolerance, key)


def test_the_golden_cases_are_all_here():
    assert len(CASES) == 10 and len(HF_CASES) == 2


# One of each form of attention: what the options compute is told in float64.
@pytest.mark.parametrize(
    "name",
    [
        "attn0_adaptive_div4",
        "attn0_pre_ln_same_length_clamp",
        "attn1_learned_relative",
        "attn2_sinusoid_absolute_no_memory",
        "attn3_learned_absolute_no_memory",
    ],
)
def test_equals_the_original_in_float32(name):
    _check_case(name, np.float32, 1e-4, 1e-3)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_original_in_float64(name):
    with jax.enable_x64(True):
        # The gradients are stored in float32.
        _check_case(name, np.float64, 1e-9, 1e-7)


@pytest.mark.parametrize("name", CASES)
def test_to_original_is_the_inverse(name):
    hparams, state, _ = _load(name)
    config, params = convert.from_original(state, hparams)
    back = convert.to_original(config, params)
    assert set(back) == set(state)
    for key, expected in state.items():
        np.testing.assert_array_equal(back[key], expected, err_msg=key)


@pytest.mark.parametrize("name", HF_CASES)
def test_equals_hugging_face(name):
    config, params = convert.from_hf(GOLDEN / name)
    model = models.build(config)
    with np.load(GOLDEN / name / "expected.npz", allow_pickle=False) as arrays:
        expected = dict(arrays)
    tokens_BN, T = expected["tokens"], int(expected["segment_length"])
    state = model.init_state(len(tokens_BN))
    apply = jit(model.log_probs)
    for s in range(tokens_BN.shape[1] // T):
        inputs_BT = tokens_BN[:, s * T : (s + 1) * T]
        log_probs_BTV, state = apply(params, inputs_BT, state)
        np.testing.assert_allclose(
            log_probs_BTV, expected[f"seg{s}/log_probs"], atol=1e-5, rtol=0
        )
        memory = np.asarray(state.hidden_LBMD).transpose(0, 2, 1, 3)
        np.testing.assert_allclose(
            memory, expected[f"seg{s}/memory"], atol=1e-5, rtol=0
        )


def test_a_model_that_the_original_lacks_is_refused():
    config = models.TransformerXLConfig(
        vocab_size=7, n_layer=1, d_model=4, n_head=2, d_head=2, d_inner=5,
        positions="rotary",
    )  # fmt: skip
    model = models.build(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(UserError, match="config.model.positions='rotary'"):
        convert.to_original(config, params)
