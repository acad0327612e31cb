"""Transformer-XL: segments of the PyTorch original, and folders of Hugging Face's."""

import dataclasses
import functools
import json

import jax
import numpy as np
from golden.comparison import VALUES, Comparison, absolute

from xlformer import convert, models

NAME = "transformer_xl"


def matches(names, config):
    needed = {"seg0/nll", "params/crit.out_layers.0.bias"}
    return "attn_type" in config and needed <= names


def compare(arrays, config, dtype):
    params = below("params/", arrays)
    config, params = convert.from_original(params, config)
    # Scanned, as in training, and compiled once for all layers.
    model = models.build(dataclasses.replace(config, scan_layers=True))
    loss = functools.partial(_loss, model)
    forward = jax.jit(loss), jax.jit(jax.value_and_grad(loss, has_aux=True))
    segments = []
    while f"seg{len(segments)}/inputs" in arrays:
        segments.append(below(f"seg{len(segments)}/", arrays))
    # Gradients wherever another segment of this length compiles them anyway.
    graded = {s["inputs"].shape for s in segments if any("grad/" in name for name in s)}
    values, gradients = {}, {}
    memory = model.init_state(segments[0]["inputs"].shape[1], dtype)
    for s, segment in enumerate(segments):
        with_gradient = segment["inputs"].shape in graded
        inputs_BT, targets_BT = segment["inputs"].T, segment["targets"].T
        found = forward[with_gradient](params, inputs_BT, targets_BT, memory)
        if with_gradient:
            found, grads = found
            grads = convert.to_original(config, grads)
            gradients |= {f"seg{s}/grad/{name}": x for name, x in grads.items()}
        _, (nll_BT, memory) = found
        values[f"seg{s}/nll"] = np.asarray(nll_BT).T
        if "memory" in segment:
            # The last entry, the output of the last layer, is never read, and no memory
            # of ours has it: it is the file's own here.
            filled, last = slots(memory), segment["memory"][-1:]
            fits = filled.shape[1:] == last.shape[1:]  # If not, it differs as it is.
            values[f"seg{s}/memory"] = (
                np.concatenate([filled, last]) if fits else filled
            )
    given = {name for name in arrays if name.startswith("params/")}
    given |= {
        f"seg{s}/{n}" for s in range(len(segments)) for n in ("inputs", "targets")
    }
    nll = [name for name in values if name.endswith("/nll")]
    tolerances = absolute(VALUES[dtype], arrays, nll)
    return Comparison(values, gradients, given, tolerances=tolerances)


def matches_folder(folder):
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "transfo-xl"


def compare_folder(folder, arrays, config, dtype):
    """Its numbers were computed in float32; all is in the folder's own config.json."""
    del config
    config, params = convert.from_hf(folder)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    model = models.build(config)
    tokens_BN, T = arrays["tokens"], int(arrays["segment_length"])
    state = model.init_state(len(tokens_BN), dtype)
    apply = jax.jit(model.log_probs)
    values = {}
    for s in range(tokens_BN.shape[1] // T):
        inputs_BT = tokens_BN[:, s * T : (s + 1) * T]
        values[f"seg{s}/log_probs"], state = apply(params, inputs_BT, state)
        values[f"seg{s}/memory"] = np.asarray(state.hidden_LBMD).transpose(0, 2, 1, 3)
    tolerances = absolute(1e-5, arrays, values)
    return Comparison(values, given=("tokens", "segment_length"), tolerances=tolerances)


def _loss(model, params, inputs_BT, targets_BT, state):
    nll_BT, state, _ = model.apply(params, inputs_BT, targets_BT, state)
    return nll_BT.mean(), (nll_BT, state)


def below(prefix, arrays):
    """The arrays whose names begin so, by the rest of the name."""
    return {
        name.removeprefix(prefix): x
        for name, x in arrays.items()
        if name.startswith(prefix)
    }


def slots(memory):
    """The valid ones, [L, m, B, D] as in the original."""
    (m,) = set(np.asarray(memory.length_B).tolist())  # All rows have equally many.
    hidden_LBMD = np.asarray(memory.hidden_LBMD)
    return hidden_LBMD[:, :, hidden_LBMD.shape[2] - m :].transpose(0, 2, 1, 3)
