"""Reformer's attention: Hugging Face's layer, and reformer-pytorch's.

A case has its arrays under its own name, or shares them with others under what its name
begins with: rotations, buckets, inputs, a mask. Hugging Face's has weights of heads,
reformer-pytorch's is given one head. Both take a mask of padding, True for tokens:
`attention_mask` and `input_mask`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from golden.comparison import Comparison

from xlformer.errors import UserError
from xlformer.layers import lsh

NAME = "reformer"
HUGGING_FACE = "params/query_key.weight"
INPUTS = "inputs", "qk", "v", "cotangent", "rotations", "attention_mask", "input_mask"


def matches(names, config):
    if "cases" not in config:
        return False
    return HUGGING_FACE in names or ({"qk", "v"} <= names and "bucket_size" in config)


def compare(arrays, config, dtype):
    del dtype  # That of the arrays.
    case_of = _hugging_face if HUGGING_FACE in arrays else _reformer_pytorch
    values, gradients = {}, {}
    for tag, options in config["cases"].items():
        found = case_of(functools.partial(_find, arrays, tag), {**config, **options})
        out, buckets, grads = found
        values[f"{tag}/out"] = out
        if buckets is not None:
            values[_find(arrays, tag, "buckets", name_only=True)] = buckets
        gradients |= {f"{tag}/grad/{name}": x for name, x in grads.items()}
    given = {n for n in arrays if n.startswith("params/") or n.split("/")[-1] in INPUTS}
    given -= {n for n in arrays if "/grad/" in n}
    return Comparison(values, gradients, given)


def _find(arrays, tag, name, name_only=False):
    """What a case has, or shares: `a/b/name`, `a/name` or `name`."""
    parts = tag.split("/")
    for n in range(len(parts), -1, -1):
        path = "/".join([*parts[:n], name])
        if path in arrays:
            return path if name_only else arrays[path]
    return None


def _hugging_face(find, config):
    H, K, L = config["heads"], config["head_dim"], config["length"]
    form = lsh.Lsh(
        config["chunk_length"],
        config["causal"],
        before=_chunks(config, "before", 1),
        after=_chunks(config, "after", 0),
    )
    rotations, mask = find("rotations"), find("attention_mask")
    valid_BT = None if mask is None else mask[:, :L].astype(bool)
    x_BTD, cotangent_BTD = (find(name)[:, :L] for name in ("inputs", "cotangent"))
    weights = tuple(find(f"params/{n}.weight") for n in ("query_key", "value"))

    def attended(x_BTD, query_key, value):
        qk_BTHK, v_BTHK = (
            (x_BTD @ w.T).reshape(*x_BTD.shape[:2], H, K) for w in (query_key, value)
        )
        bucket_BHRT = None
        if form.chunk_length < L:
            factors = _factors(config, rotations)
            bucket_BHRT = lsh.hashed(qk_BTHK, rotations[None], factors)
            if valid_BT is not None and not valid_BT.all():
                bucket_BHRT = _with_last(bucket_BHRT, math.prod(factors), valid_BT)
        y_BTHK = _attended(qk_BTHK, v_BTHK, bucket_BHRT, form, valid_BT)
        return y_BTHK.reshape(cotangent_BTD.shape), bucket_BHRT

    names = "inputs", "query_key.weight", "value.weight"
    return _with_gradients(attended, (x_BTD, *weights), names, cotangent_BTD)


def _chunks(config, where, default):
    """How many neighbouring chunks are seen: as the layer or its config names it."""
    name = f"num_chunks_{where}"
    return config.get(name, config.get(f"lsh_{name}", default))


def _factors(config, rotations):
    """What num_buckets is, or is taken to be where it is None."""
    if config["num_buckets"] is not None:
        return np.atleast_1d(config["num_buckets"]).tolist()
    C, total = config["chunk_length"], 2 * rotations.shape[-1]
    power = (2 * (config["length"] // C)).bit_length() - 1
    longest = config.get("max_position_embeddings", 4096)
    if 2**power <= 2 * max(int((longest // C) ** 0.5), C):
        factors = [2**power]
    else:
        factors = [2 ** (power // 2), 2 ** (power - power // 2)]
    # The layer keeps the number that its first input has led to.
    return factors if sum(factors) == total else [total]


def _with_last(bucket_BHRT, count, valid_BT):
    """Each round has one bucket more, with its padding."""
    round_R = jnp.arange(bucket_BHRT.shape[2])[None, None, :, None]
    bucket_BHRT = bucket_BHRT + round_R
    last_BHRT = jnp.broadcast_to((count + 1) * round_R + count, bucket_BHRT.shape)
    return jnp.where(valid_BT[:, None, None], bucket_BHRT, last_BHRT)


def _reformer_pytorch(find, config):
    rotations, mask = find("rotations"), find("input_mask")
    R, L = config["rounds"], find("qk").shape[1]
    if rotations.shape[2] != R:
        raise UserError(f"rounds={R}, but rotations of {rotations.shape[2]}")
    form = lsh.Lsh(
        config["bucket_size"],
        config["causal"],
        scaling=lsh.UNIT_SCALED,
        same_bucket_only=config["same_bucket_only"],
        discount_duplicates=config["discount_duplicates"],
    )
    valid_BT = None
    if mask is not None:
        more = ((0, 0), (0, L - mask.shape[1]))
        valid_BT = np.pad(mask.astype(bool), more, constant_values=True)

    def attended(qk_BTK, v_BTK):
        qk_BTHK, v_BTHK = qk_BTK[:, :, None], v_BTK[:, :, None]
        # Padding has the buckets of what it holds.
        bucket_BHRT = lsh.hashed(qk_BTHK, rotations[:, None])
        y_BTK = _attended(qk_BTHK, v_BTHK, bucket_BHRT, form, valid_BT)[:, :, 0]
        if valid_BT is not None:
            # Padding sees itself alone.
            y_BTK = jnp.where(valid_BT[..., None], y_BTK, v_BTK)
        return y_BTK, bucket_BHRT[:, 0]

    inputs = find("qk"), find("v")
    return _with_gradients(attended, inputs, ("qk", "v"), find("cotangent"))


def _attended(qk_BTHK, v_BTHK, bucket_BHRT, form, valid_BT):
    if valid_BT is None:
        return lsh.attend(qk_BTHK, v_BTHK, bucket_BHRT, form)
    options = dict(valid_BT=valid_BT, compact=False)
    return lsh.attend(qk_BTHK, v_BTHK, bucket_BHRT, form, **options)


def _with_gradients(attended, inputs, names, cotangent):
    def loss(*inputs):
        out, buckets = attended(*inputs)
        return (out * cotangent).sum(), (out, buckets)

    inputs = [jnp.asarray(x) for x in inputs]
    grad = jax.grad(loss, tuple(range(len(inputs))), has_aux=True)
    grads, (out, buckets) = jax.jit(grad)(*inputs)
    return out, buckets, dict(zip(names, grads, strict=True))
