"""NVIDIA's Transformer-XL: segments of its program, with its checkpoint or its arrays.

A folder has a checkpoint as its training wrote it, and expected.npz; a file has the
state dict under params/. `config` is the checkpoint's model_config with the
lengths of the evaluation in it.
"""

import dataclasses
import functools

import jax
import numpy as np
from golden.comparison import Comparison, absolute
from golden.kinds.transformer_xl import below, slots

from xlformer import convert, models
from xlformer.convert import nvidia

NAME = "nvidia"
TOLERANCES = {np.float64: 1e-12, np.float32: 1e-5}
INPUTS = ("inputs", "targets")


def matches(names, config):
    return "n_token" in config and "params/crit.out_layers_biases.0" in names


def compare(arrays, config, dtype):
    return _compare(arrays, below("params/", arrays), config, dtype)


def matches_folder(folder):
    return any((folder / name).is_file() for name in nvidia.NAMES)


def compare_folder(folder, arrays, config, dtype):
    state, _, _ = nvidia.load(folder)
    state = {name: x.astype(dtype) for name, x in state.items()}
    return _compare(arrays, state, config, dtype)


def _compare(arrays, state, config, dtype):
    config, params = convert.from_nvidia(state, config)
    # Scanned, so that all layers are compiled once.
    model = models.build(dataclasses.replace(config, scan_layers=True))
    forward = jax.jit(functools.partial(_forward, model))
    values, s, memory = {}, 0, None
    while segment := below(f"seg{s}/", arrays):
        inputs_BT, targets_BT = (segment[name].T for name in INPUTS)
        if memory is None:
            memory = model.init_state(len(inputs_BT), dtype)
        nll_BT, memory = forward(params, inputs_BT, targets_BT, memory)
        values[f"seg{s}/nll"] = np.asarray(nll_BT).T
        values[f"seg{s}/memory"] = slots(memory)
        s += 1
    given = {name for name in arrays if name.startswith("params/")}
    given |= {f"seg{k}/{name}" for k in range(s) for name in INPUTS}
    tolerances = absolute(TOLERANCES[dtype], arrays, values)
    return Comparison(values, given=given, tolerances=tolerances)


def _forward(model, params, inputs_BT, targets_BT, state):
    nll_BT, state, _ = model.apply(params, inputs_BT, targets_BT, state)
    return nll_BT, state
