"""Linformer's attention in the program of lucidrains."""

import jax
import jax.numpy as jnp
from golden.comparison import Comparison

from xlformer.layers.linformer import linformer_attention

NAME = "linformer"


def matches(names, config):
    return "variants" in config and any(name.endswith("/proj_k") for name in names)


def compare(arrays, config, dtype):
    del dtype  # That of the arrays.
    values, gradients = {}, {}
    for tag in config["variants"]:
        prefix = f"params/{tag}/"
        params = {
            name.removeprefix(prefix): jnp.asarray(x)
            for name, x in arrays.items()
            if name.startswith(prefix)
        }
        inputs, cotangent, context = (
            _find(arrays, tag, name) for name in ("inputs", "cotangent", "context")
        )
        heads = {**config, **config["variants"][tag]}["heads"]
        out, grads = _found(params, inputs, context, cotangent, heads)
        values[f"{tag}/out"] = out
        gradients |= {f"{tag}/grad/{name}": x for name, x in grads.items()}
    inputs = "inputs", "cotangent", "context"
    given = {n for n in arrays if n.startswith("params/") or n.split("/")[-1] in inputs}
    given -= {n for n in arrays if "/grad/" in n}
    return Comparison(values, gradients, given)


def _find(arrays, tag, name):
    """What a variant has, or all share."""
    found = arrays.get(f"{tag}/{name}", arrays.get(name))
    return None if found is None else jnp.asarray(found)


def _found(params, inputs, context, cotangent, heads):
    """The output, and all gradients by name."""

    def loss(by_name):
        out = _attended(by_name, heads)
        return (out * cotangent).sum(), out

    by_name = {**params, "inputs": inputs}
    if context is not None:
        by_name["context"] = context
    grads, out = jax.jit(jax.grad(loss, has_aux=True))(by_name)
    return out, grads


def _attended(given, H):
    x_BTD = given["inputs"]
    context_BSD = given.get("context", x_BTD)
    K = given["to_q.weight"].shape[0] // H

    def heads(name, x_BTD):
        x_BTW = x_BTD @ given[f"{name}.weight"].T
        return x_BTW.reshape(*x_BTW.shape[:2], -1, K)

    q_BTHK, k_BSHK = heads("to_q", x_BTD), heads("to_k", context_BSD)
    v_BSHK, e_NP = k_BSHK, given["proj_k"]
    f_NP = e_NP
    if "proj_v" in given:  # share_kv has no second projection, of neither kind.
        v_BSHK, f_NP = heads("to_v", context_BSD), given["proj_v"]
    y_BTHK = linformer_attention(q_BTHK * K**-0.5, k_BSHK, v_BSHK, e_NP, f_NP)
    y_BTW = y_BTHK.reshape(*y_BTHK.shape[:2], -1)
    return y_BTW @ given["to_out.weight"].T + given["to_out.bias"][None, None]
