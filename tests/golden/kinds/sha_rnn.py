"""SHA-RNN: segments of its PyTorch program, with what it carries between them.

Of a model where several blocks attend, `memory` has an axis of these blocks in front.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from golden.comparison import GRADIENTS, VALUES, Comparison

from xlformer import convert, models

NAME = "sha_rnn"
INPUTS = ("inputs", "targets")


def matches(names, config):
    return "max_positions" in config and "params/blocks.0.lnstart.weight" in names


def compare(arrays, config, dtype):
    config, params = convert.from_sha_rnn(_below("params/", arrays), config)
    config = dataclasses.replace(
        config, dropout=0.0, hidden_dropout=0.0, input_dropout=0.0
    )
    model = models.build(config)

    def loss(params, *given):
        nll_BT, state, _ = model.apply(params, *given)
        return nll_BT.mean(), (nll_BT, state)

    step = jax.jit(jax.grad(loss, has_aux=True))
    log_probs = jax.jit(model.log_probs)
    values, gradients, s, state = {}, {}, 0, None
    while segment := _below(f"seg{s}/", arrays):
        inputs_BT, targets_BT = (segment[name].T for name in INPUTS)
        if state is None:
            state = model.init_state(len(inputs_BT), dtype)
        arguments = params, inputs_BT, targets_BT, state
        log_probs_BTV, _ = log_probs(params, inputs_BT, state)
        # Of a segment without gradients too: it has the program of another one.
        grads, (nll_BT, state) = step(*arguments)
        grads = convert.to_sha_rnn(config, grads)
        gradients |= {f"seg{s}/grad/{name}": x for name, x in grads.items()}
        found = {"nll": nll_BT.T, **_of_state(state, segment)}
        # Probabilities say the logits to one number for each token, their sum, which is
        # taken from the file.
        if "logits" in segment:
            sums_TB1 = jax.nn.logsumexp(segment["logits"], axis=-1, keepdims=True)
            found["logits"] = jnp.swapaxes(log_probs_BTV, 0, 1) + sums_TB1
        values |= {f"seg{s}/{name}": x for name, x in found.items()}
        s += 1
    given = {name for name in arrays if name.startswith("params/")}
    given |= {f"seg{k}/{name}" for k in range(s) for name in INPUTS}
    return Comparison(values, gradients, given, tolerances=_tolerances(arrays))


def _tolerances(arrays):
    """Those of float32 for what the program computed in it, whatever we compute in."""
    nll = arrays["seg0/nll"]
    if not np.array_equal(nll, nll.astype(np.float32)):
        return {}
    gradients = {name for name in arrays if "/grad/" in name}
    return {n: (GRADIENTS if n in gradients else VALUES)[np.float32] for n in arrays}


def _of_state(state, segment):
    """LSTMs [L, B, D], and the memory, [m, B, D] of each block, oldest first."""
    found = {"lstm_h": jnp.stack(state.lstm.h), "lstm_c": jnp.stack(state.lstm.c)}
    if not state.memory:
        return found
    rows, length_B, next_B = state.memory
    m = int(length_B[0])
    in_order = jax.vmap(lambda x_PD, first: jnp.roll(x_PD, -first, 0))
    memory = [in_order(x, next_B)[:, -m:].swapaxes(0, 1) for x in rows]
    expected = segment.get("memory")
    if len(memory) == 1 and (expected is None or expected.ndim == 3):
        return {**found, "memory": memory[0]}
    return {**found, "memory": np.stack(memory)}


def _below(prefix, arrays):
    n = len(prefix)
    return {name[n:]: x for name, x in arrays.items() if name.startswith(prefix)}
