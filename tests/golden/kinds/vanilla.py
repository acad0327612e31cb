"""The vanilla Transformer with its auxiliary losses: files made from formulas."""

import jax
import jax.numpy as jnp
import numpy as np
from golden.comparison import Comparison

from xlformer import models
from xlformer.models import VanillaConfig

NAME = "vanilla"
GRAD = "grad_progress"  # and the index of the progress that the gradients belong to
# Steps of a training of which a share, as the file has it, is a whole number.
STEPS = 1 << 30
# Ours -> theirs, of one layer.
LAYER = {
    ("attention", "qkv"): ("q", "k", "v"),
    ("attention", "output"): ("o",),
    ("feed_forward", "in_kernel"): ("ff1.weight",),
    ("feed_forward", "in_bias"): ("ff1.bias",),
    ("feed_forward", "out_kernel"): ("ff2.weight",),
    ("feed_forward", "out_bias"): ("ff2.bias",),
    ("attention_norm", "scale"): ("ln1.weight",),
    ("attention_norm", "bias"): ("ln1.bias",),
    ("norm", "scale"): ("ln2.weight",),
    ("norm", "bias"): ("ln2.bias",),
}
CLASSIFIER = {"table": "weight", "bias": "bias"}


def matches(names, config):
    return {"nll_next", "nll_after_next", "progress"} <= names


def compare(arrays, config, dtype):
    del dtype  # That of the arrays.
    model, inputs = models.build(_model_config(arrays, config)), arrays["tokens"]
    ours = {n.removeprefix("params/"): x for n, x in arrays.items() if "params/" in n}
    params, L = _ours(model, ours), config["length"]
    inputs_BT, next_BT, second_BT = (inputs[:, k : k + L] for k in range(3))

    def loss(params, active_N):
        found = model.layers(params, inputs_BT, next_BT, second_BT)
        mean_N = found[1].mean((1, 2))
        mean_N += config["second_target_weight"] * found[2].mean((1, 2))
        return (mean_N * active_N).sum(), found

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    active = [_active(model, progress) for progress in arrays["progress"]]
    found = [grad(params, active_N) for active_N in active]
    hidden, following, second = found[0][0][1]
    values = {
        "hidden": hidden,
        "nll_next": following,
        "nll_after_next": second,
        "layer_active": np.stack(active).astype(float),
        "loss": np.array([total for (total, _), _ in found]),
        "loss_main_only": following[-1].mean(),
    }
    gradients = {}
    for i, (_, grads) in enumerate(found):
        gradients |= {f"{GRAD}{i}/{n}": x for n, x in _theirs(grads).items()}
    given = {"tokens", "progress", *(f"params/{n}" for n in ours)}
    return Comparison(values, gradients, given)


def _active(model, progress) -> np.ndarray:
    """Which layers predict at this share of the training."""
    return np.asarray(model.active(int(np.ceil(float(progress) * STEPS))))


def _model_config(arrays, config) -> VanillaConfig:
    return VanillaConfig(
        vocab_size=config["n_token"],
        n_layer=config["n_layer"],
        d_model=config["d_model"],
        n_head=config["heads"],
        d_inner=config["d_inner"],
        context_length=len(arrays["params/layers.0.positions"]),
        # Whatever the weight is, the file has the classifiers.
        second_target_weight=1.0,
        loss_steps=STEPS,
        norm_epsilon=config["ln_eps"],
        dropout=0.0,
        attention_dropout=0.0,
        scan_layers=True,
    )


def _ours(model, arrays) -> dict:
    """The parameters of a file as ours."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    last = model.config.n_layer - 1

    def take(path, leaf):
        parts = [jnp.asarray(arrays[name]) for name in _names(path, leaf, last)]
        if _key(path)[-1] == "qkv":
            L, D, _, H, K = leaf.shape
            parts = [x.reshape(D, H, K) for x in parts]
            parts = [jnp.stack(parts[i : i + 3], 1) for i in range(0, 3 * L, 3)]
        if "table" in _key(path)[-1] and _key(path)[0] != "embedding":
            parts = [x.T for x in parts]
        if len(parts) == 1 and not _stacked(path):
            return parts[0]
        return jnp.stack([x.reshape(leaf.shape[1:]) for x in parts])

    return jax.tree_util.tree_map_with_path(take, shapes)


def _theirs(tree) -> dict:
    """A tree like the parameters by the names and in the layout of the file."""
    found, last = {}, len(tree["trunk"]["position"]) - 1
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        key, parts = _key(path), list(leaf) if _stacked(path) else [leaf]
        if key[-1] == "qkv":
            parts = [x[:, i].reshape(len(x), -1) for x in parts for i in range(3)]
        if key[-2:] == ("attention", "output"):
            parts = [x.reshape(-1, x.shape[-1]) for x in parts]
        if "table" in key[-1] and key[0] != "embedding":
            parts = [x.T for x in parts]
        found |= zip(_names(path, leaf, last), parts, strict=True)
    return found


def _names(path, leaf, last: int) -> list[str]:
    """The names of a parameter in the file, of each layer in order.

    last: the number of the last layer, whose classifier is the softmax.
    """
    key = _key(path)
    if key == ("embedding", "table"):
        return ["embedding"]
    if key[0] == "softmax":
        return [f"layers.{last}.classifier.{CLASSIFIER[key[1]]}"]
    if key[0] == "auxiliary":
        kind, _, part = key[1].partition("_")
        name = "classifier" if kind == "next" else "classifier2"
        return [f"layers.{i}.{name}.{CLASSIFIER[part]}" for i in range(len(leaf))]
    theirs = ("positions",) if key[1] == "position" else LAYER[key[2:]]
    return [f"layers.{i}.{name}" for i in range(len(leaf)) for name in theirs]


def _stacked(path) -> bool:
    return _key(path)[0] in ("trunk", "auxiliary")


def _key(path) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
