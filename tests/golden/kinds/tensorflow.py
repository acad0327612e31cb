"""Checkpoints of the TensorFlow Transformer-XL, with what its evaluation gives."""

import dataclasses
import functools

import jax
import numpy as np
from golden.comparison import Comparison, absolute

from xlformer import convert, models

NAME = "tensorflow"
# A correct port is within 1.1e-6 of its float32, a looser one hides what is wrong.
TOLERANCE = {np.float64: 1e-12, np.float32: 1e-5}


def matches_folder(folder):
    return any(folder.glob("*.index"))


def compare_folder(folder, arrays, config, dtype):
    config, params = convert.from_tf(folder, config)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    # Scanned, as in training, and compiled once for all layers.
    model = models.build(dataclasses.replace(config, scan_layers=True))
    loss = functools.partial(_loss, model)
    forward = jax.jit(loss), jax.jit(jax.value_and_grad(loss, has_aux=True))
    values, gradients, given, nlls = {}, {}, [], []
    memory = model.init_state(arrays["seg0/inputs"].shape[1], dtype)
    graded = {name.split("/")[0] for name in arrays if "/grad/" in name}
    # Gradients wherever another segment of this length compiles them anyway.
    graded = {arrays[f"{segment}/inputs"].shape for segment in graded}
    while (segment := f"seg{len(nlls)}") + "/inputs" in arrays:
        names = [f"{segment}/inputs", f"{segment}/targets"]
        inputs_BT, targets_BT = (arrays[name].T for name in names)
        with_gradient = arrays[names[0]].shape in graded
        found = forward[with_gradient](params, inputs_BT, targets_BT, memory)
        if with_gradient:
            found, grads = found
            grads = convert.to_tf(config, grads)
            gradients |= {f"{segment}/grad/{name}": x for name, x in grads.items()}
        _, (nll_BT, memory) = found
        nlls.append(nll_BT)
        values[f"{segment}/nll"] = values[f"{segment}/nll_float32"] = nll_BT.T
        values[f"{segment}/memory"] = memory.hidden_LBMD.transpose(0, 2, 1, 3)
        given += names
    values["mean_nll"] = values["mean_nll_float32"] = np.concatenate(nlls, 1).mean()
    # Its own float32 says nothing of our float64 that its float64 does not say better.
    if dtype == np.float64:
        given += [name for name in arrays if name.endswith("_float32")]
    tolerances = absolute(TOLERANCE[dtype], arrays, values)
    tolerances |= dict.fromkeys(gradients, 1e-5)
    return Comparison(values, gradients, given, tolerances=tolerances)


def _loss(model, params, inputs_BT, targets_BT, state):
    nll_BT, state, _ = model.apply(params, inputs_BT, targets_BT, state)
    return nll_BT.mean(), (nll_BT, state)
