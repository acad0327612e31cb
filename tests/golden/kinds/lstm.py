"""AWD-LSTM: segments of its PyTorch program, and one with given masks of dropout."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
from golden.comparison import Comparison

from xlformer import convert, models
from xlformer.layers import adaptive, recurrent
from xlformer.layers.recurrent import Masks, Places, Rates

NAME = "awd_lstm"
RATES = ("dropout", "hidden_dropout", "input_dropout", "word_dropout", "weight_dropout")
NO_RATES = dict.fromkeys(RATES, 0.0)
INPUTS = ("inputs", "targets")


def matches(names, config):
    return {"nhid", "ninp"} <= set(config) and "seg0/raw_outputs/0" in names


def compare(arrays, config, dtype):
    config, params = convert.from_awd_lstm(_below("params/", arrays), config)
    # In training mode the model adds its penalties; its dropout is held against given
    # masks below.
    model = models.build(dataclasses.replace(config, **NO_RATES))
    plain = models.build(dataclasses.replace(model.config, **_no_penalties()))
    reg = jax.jit(jax.value_and_grad(_loss(model), has_aux=True))
    step = jax.jit(jax.value_and_grad(_loss(plain), has_aux=True))
    values, gradients, segments = {}, {}, []
    while f"seg{len(segments)}/inputs" in arrays:
        segments.append(_below(f"seg{len(segments)}/", arrays))
    state = model.init_state(segments[0]["inputs"].shape[1], dtype)
    for s, segment in enumerate(segments):
        ids = segment["inputs"].T, segment["targets"].T
        before = state
        (loss, (nll_BT, state)), grads = step(params, *ids, before)
        (loss_reg, _), grads_reg = reg(params, *ids, before)
        outputs, _ = _stack(params, segment, before)
        found = {"nll": nll_BT.T, "loss": loss, "loss_reg": loss_reg}
        found |= _of_state(state) | _of_outputs(outputs)
        if "logits" in segment:
            found["logits"] = _logits(plain, params, segment, before)
        values |= _above(f"seg{s}/", found)
        grads = {"grad/": grads, "grad_reg/": grads_reg}
        gradients |= _above(f"seg{s}/", _of_gradients(config, grads))
    if dropped := _below("dropped/", arrays):
        found, grads = _dropped(config, params, {**segments[-1], **dropped}, before)
        values |= _above("dropped/", found)
        gradients |= _above("dropped/", _of_gradients(config, {"grad_reg/": grads}))
    given = {n for n in arrays if n.startswith(("params/", "dropped/mask/"))}
    given |= {f"seg{s}/{name}" for s in range(len(segments)) for name in INPUTS}
    return Comparison(values, gradients, given)


def _loss(model):
    def loss(params, inputs_BT, targets_BT, state):
        arrays = inputs_BT, targets_BT, state
        nll_BT, state, aux = model.apply(params, *arrays, train=True)
        return nll_BT.mean() + aux.loss, (nll_BT, state)

    return loss


def _logits(model, params, segment, state):
    """Those of the file, as far as probabilities say what they are.

    To a number for each position, the sum, that is: it is taken from the file.
    """
    log_probs_BTV, _ = jax.jit(model.log_probs)(params, segment["inputs"].T, state)
    log_probs_TBV = jnp.swapaxes(log_probs_BTV, 0, 1)
    return log_probs_TBV + jax.nn.logsumexp(segment["logits"], axis=-1, keepdims=True)


def _dropped(config, params, segment, state):
    """The layers' functions with the given masks: what was found, and its gradient."""

    def loss(params):
        outputs, _ = _stack(params, segment, state, config)
        found = _of_outputs(outputs)
        nll_TB = _nll(config, params, outputs.dropped[-1], segment["targets"])
        penalty = config.activation_penalty * found["ar"]
        penalty += config.temporal_penalty * found["tar"]
        found |= {"nll": nll_TB, "loss": nll_TB.mean()}
        found["loss_reg"] = found["loss"] + penalty
        return found["loss_reg"], found

    grads, found = jax.jit(jax.grad(loss, has_aux=True))(params)
    return found, grads


def _stack(params, segment, state, config=None):
    """The stack over a segment; with a config, dropped by the masks of the file."""
    table_VE = jnp.asarray(params["embedding"]["table"])
    ids_TB = segment["inputs"]
    x_TBD = table_VE[ids_TB]
    layers = _layers(params)
    masks, rates = Masks(), Rates()
    if config is not None:
        masks, rates = _masks(segment, len(layers)), config.rates
        if "mask/embedding" in segment:
            keep_V = segment["mask/embedding"][:, 0].astype(bool)
            x_TBD = adaptive.drop_words(x_TBD, ids_TB, keep_V, config.word_dropout)
    return recurrent.stack(x_TBD, state, layers, Places(), masks, rates)


def _layers(params):
    found = [params["trunk"][f"lstm_{k}"] for k in range(len(params["trunk"]))]
    names = "input_kernel", "hidden_kernel", "input_bias", "hidden_bias"
    return [recurrent.Weights(*(one[name] for name in names)) for one in found]


def _masks(segment, n_layer):
    def mask(name, turn):
        x = segment.get(f"mask/{name}")
        return None if x is None else turn(x).astype(bool)

    def locked(name):
        return mask(name, lambda x: x[0])

    def weight(k):
        return mask(f"weight/{k}", lambda x: x.T.reshape(x.shape[1], 4, -1))

    return Masks(
        locked("input"),
        tuple(locked(f"hidden/{k}") for k in range(n_layer - 1)),
        locked("output"),
        tuple(weight(k) for k in range(n_layer)),
    )


def _nll(config, params, y_TBN, targets_TB):
    """Of the softmax layer, which the public model drops its own outputs into."""
    softmax = adaptive.AdaptiveSoftmax(
        config.softmax_bins, config.tie_weights, (), None, None, None, y_TBN.dtype
    )
    table = types.SimpleNamespace(table=jnp.asarray(params["embedding"]["table"]))
    arrays = y_TBN.reshape(-1, y_TBN.shape[-1]), targets_TB.reshape(-1), table
    nll_N = softmax.apply({"params": params["softmax"]}, *arrays)
    return nll_N.reshape(targets_TB.shape)


def _of_outputs(outputs):
    found = {f"raw_outputs/{k}": y for k, y in enumerate(outputs.raw)}
    found |= {f"outputs/{k}": y for k, y in enumerate(outputs.dropped)}
    found["ar"] = recurrent.activation_penalty(outputs.dropped[-1], Places())
    found["tar"] = recurrent.temporal_penalty(outputs.raw[-1], Places())
    return found


def _of_state(state):
    pairs = (("h", state.h), ("c", state.c))
    return {f"{name}/{k}": x for name, xs in pairs for k, x in enumerate(xs)}


def _of_gradients(config, trees):
    return {
        prefix + name: x
        for prefix, tree in trees.items()
        for name, x in convert.to_awd_lstm(config, tree).items()
    }


def _no_penalties():
    return {"activation_penalty": 0.0, "temporal_penalty": 0.0}


def _below(prefix, arrays):
    n = len(prefix)
    return {name[n:]: x for name, x in arrays.items() if name.startswith(prefix)}


def _above(prefix, arrays):
    return {prefix + name: x for name, x in arrays.items()}
