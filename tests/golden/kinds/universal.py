"""Universal Transformer: tensor2tensor's decoders, and its halting of given logits."""

import dataclasses

import halting_steps
import jax
import jax.numpy as jnp
import numpy as np
from golden.comparison import Comparison

from xlformer import models
from xlformer.errors import UserError
from xlformer.layers import halting
from xlformer.models import UniversalConfig

NAME = "universal"
# Of tensor2tensor's act_type.
MODES = {
    "basic": halting.CONVEX,
    "accumulated": halting.ACCUMULATE,
    "global": halting.GLOBAL,
}
FORCED = "formula_forced_halt/"


def matches(names, config):
    return "act_max_steps" in config and (
        {"logits", "states"} <= names or ("x" in names and "recurrence_type" in config)
    )


def compare(arrays, config, dtype):
    return (_given_logits if "logits" in arrays else _decoder)(arrays, config, dtype)


# Halting of given logits --------------------------------------------------------------


def _given_logits(arrays, config, dtype):
    del dtype
    logits, states = jnp.asarray(arrays["logits"]), jnp.asarray(arrays["states"])
    cotangent, epsilon = arrays["cotangent"], config["act_epsilon"]
    values, gradients = {}, {}

    def loss(logits, states, mode):
        p_NBT = jax.nn.sigmoid(logits)
        found = halting_steps.run(p_NBT, states, mode, epsilon=epsilon)
        rho_BT = found[2].updates_BT + found[2].remainder_BT  # Graves' name
        ponder = config["act_loss_weight"] * rho_BT.mean()
        return (found[0] * cotangent).sum() + ponder, (*found, ponder)

    for name, mode in MODES.items():
        if f"{name}/out" not in arrays:
            continue
        grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, found), grads = jax.jit(grad, static_argnums=2)(logits, states, mode)
        y_BTD, weights_NBT, state, ponder = found
        updates, rest = state.updates_BT, state.remainder_BT
        if mode == halting.GLOBAL:  # all positions have the same, stored once
            updates, rest = updates[:, 0], rest[:, 0]
        values[f"{name}/out"], values[f"{name}/ponder_loss"] = y_BTD, ponder
        values[f"{name}/n_updates"], values[f"{name}/remainders"] = updates, rest
        effective = halting_steps.effective_weights(weights_NBT, mode)
        values[f"{name}/effective_weights"] = effective
        for of, x in zip(("logits", "states"), grads, strict=True):
            gradients[f"{name}/grad/{of}"] = x
    y_BTD, weights_NBT, _ = halting_steps.run(
        jax.nn.sigmoid(logits), states, halting.ACCUMULATE, epsilon=epsilon, force=True
    )
    values[f"{FORCED}weights"], values[f"{FORCED}out"] = weights_NBT, y_BTD
    values = {name: x for name, x in values.items() if name in arrays}
    return Comparison(values, gradients, {"logits", "states", "cotangent"})


# Decoders -----------------------------------------------------------------------------


def _decoder(arrays, config, dtype):
    names = [n.removeprefix("params/") for n in arrays if n.startswith("params/")]
    model, layout = models.build(_model_config(config, arrays)), _Layout(names)
    params = layout.ours(model, {n: arrays[f"params/{n}"] for n in names})
    x_BTD, state = arrays["x"], model.init_state(len(arrays["x"]), dtype)
    act = config["recurrence_type"] == "act"

    def loss(params, x_BTD):
        y_BTD, _, aux = model.trunk.apply(params, x_BTD, state)
        total = (y_BTD * arrays["cotangent"]).sum() + (aux.loss if act else 0)
        return total, (y_BTD, aux.loss)

    @jax.jit
    def both(params, x_BTD):
        found = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x_BTD)
        halted = halting_steps.of_tokens(model, params, x_BTD, state) if act else None
        return *found, halted

    (total, (y_BTD, ponder)), (grads, dx_BTD), halted = both(params, x_BTD)
    values = {"out": y_BTD, "loss": total}
    if act:
        updates, rest = halted
        if config["act_type"] == "global":
            updates, rest = updates[:, 0], rest[:, 0]
        values |= {"n_updates": updates, "remainders": rest, "ponder_loss": ponder}
    gradients = {f"grad/{n}": x for n, x in layout.theirs(grads).items()}
    gradients["grad/x"] = dx_BTD
    given = {"x", "cotangent", *(f"params/{n}" for n in names)}
    return Comparison(values, gradients, given)


def _model_config(config, arrays) -> UniversalConfig:
    """Our options for the file's."""
    kind, act = config["recurrence_type"], "none"
    if kind not in ("basic", "act"):
        raise UserError(f"recurrence_type={kind!r} is not one of this model's")
    if kind == "act":
        if config["act_type"] not in MODES:
            raise UserError(f"act_type={config['act_type']!r} is not one of ours")
        act = MODES[config["act_type"]]
    step = config["step_timing_signal_type"]
    fields = {
        "n_step": config["num_rec_steps"],
        "n_layer": config["num_inrecurrence_layers"],
        "d_model": config["hidden_size"],
        "n_head": config["num_heads"],
        "d_inner": config["filter_size"],
        "positions": "sinusoid" if config["add_position_timing_signal"] else "none",
        "step_signal": step if config["add_step_timing_signal"] else "none",
        "transition": config["transformer_ffn_type"],
        "act": act,
        # A constant of float32 in the program, which it casts to float64.
        "norm_epsilon": float(np.float32(config["norm_epsilon"])),
        "causal": config["causal"],
    }
    if kind == "act":
        names = ("act_max_steps", "act_epsilon", "act_loss_weight")
        fields |= {name: config[name] for name in names}
        fields["force_halt_last"] = False
    rest = dict(dropout=0.0, scan_layers=True)
    return UniversalConfig(vocab_size=1, **fields, **rest)


ATTENTION = "self_attention/multihead_attention/"
CONV = "ffn/sepconv_relu_sepconv/"
NORM = "layer_prepostprocess/layer_norm/layer_norm_"
# Ours -> theirs, of one layer of a step.
LAYER = {
    ("attention", "qkv"): tuple(f"{ATTENTION}{n}/kernel" for n in "qkv"),
    ("attention", "output"): f"{ATTENTION}output_transform/kernel",
    ("attention_norm", "scale"): f"self_attention/{NORM}scale",
    ("attention_norm", "bias"): f"self_attention/{NORM}bias",
    ("norm", "scale"): f"ffn/{NORM}scale",
    ("norm", "bias"): f"ffn/{NORM}bias",
    ("feed_forward", "in_kernel"): "ffn/conv1/kernel",
    ("feed_forward", "in_bias"): "ffn/conv1/bias",
    ("feed_forward", "out_kernel"): "ffn/conv2/kernel",
    ("feed_forward", "out_bias"): "ffn/conv2/bias",
    ("separable", "in_depthwise"): f"{CONV}conv1_single/depthwise_kernel",
    ("separable", "in_kernel"): f"{CONV}conv1_single/pointwise_kernel",
    ("separable", "in_bias"): f"{CONV}conv1_single/bias",
    ("separable", "out_depthwise"): f"{CONV}conv2_single/depthwise_kernel",
    ("separable", "out_kernel"): f"{CONV}conv2_single/pointwise_kernel",
    ("separable", "out_bias"): f"{CONV}conv2_single/bias",
}
HALTING = "sigmoid_activation_for_pondering/dense/"


@dataclasses.dataclass
class _Layout:
    """Parameters by the program's names and shapes, and as ours."""

    names: list[str]

    def ours(self, model, arrays):
        shapes = jax.eval_shape(model.trunk.init, jax.random.key(0))

        def take(path, leaf):
            parts = [jnp.asarray(arrays[n]) for n in self._names(path, leaf)]
            if _key(path)[-1] == "qkv":
                L, D, _, H, K = leaf.shape
                by_layer = [parts[i : i + 3] for i in range(0, len(parts), 3)]
                parts = [
                    jnp.stack([x.reshape(D, H, K) for x in qkv], 1) for qkv in by_layer
                ]
            if _key(path)[0] == "layers":
                return jnp.stack([x.reshape(leaf.shape[1:]) for x in parts])
            return parts[0].reshape(leaf.shape)

        return jax.tree_util.tree_map_with_path(take, shapes)

    def theirs(self, tree) -> dict:
        found = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            names, parts = self._names(path, leaf), [leaf]
            if _key(path)[0] == "layers":
                parts = list(leaf)
            if _key(path)[-1] == "qkv":
                parts = [x[:, i] for x in parts for i in range(3)]
            for name, x in zip(names, parts, strict=True):
                found[name] = np.asarray(x).reshape(self._shape(name, x))
        return found

    def _names(self, path, leaf) -> list[str]:
        """The program's names of a parameter, of each layer in order."""
        key = _key(path)
        if key[0] == "final_norm":
            return [self._one(f"/{NORM}{key[1]}", outside=True)]
        if key[0] in ("halting_kernel", "halting_bias"):
            return [self._one(HALTING + key[0].removeprefix("halting_"))]
        if key[0] == "signals":
            return [self._one("/layer_embedding")]
        theirs = LAYER[key[1:]]
        theirs = (theirs,) if isinstance(theirs, str) else theirs
        return [
            self._one(f"/rec_layer_{i}/{n}")
            for i in range(leaf.shape[0])
            for n in theirs
        ]

    def _one(self, end: str, outside: bool = False) -> str:
        """The only name with this end; `outside` of the steps' scope."""
        found = [n for n in self.names if n.endswith(end)]
        if outside:
            found = [n for n in found if "universal_transformer_" not in n]
        if len(found) != 1:
            raise UserError(f"{len(found)} parameters end with {end!r}")
        return found[0]

    def _shape(self, name, x):
        """Theirs: heads side by side, and the axes of length 1 of its convolutions."""
        if "multihead_attention" in name:
            D = x.shape[-1] if "output_transform" in name else x.shape[0]
            return (-1, D) if "output_transform" in name else (D, -1)
        if name.endswith("depthwise_kernel"):
            return x.shape[0], 1, x.shape[1], 1
        if name.endswith("pointwise_kernel"):
            return 1, 1, *x.shape
        if name.endswith("layer_embedding"):
            return x.shape[0], 1, 1, x.shape[1]
        if HALTING in name:
            return (-1, 1) if name.endswith("kernel") else (1,)
        return x.shape


def _key(path) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
