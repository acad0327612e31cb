"""GTrXL: DI-engine's gate, and segments of its model.

The program's linear maps have biases. All but one are in our parameters already: those
of queries in u and v, those of values pass attention into that of its output, and those
of keys and positions add the same to all scores of a query. Its queries are made of
what is not normalised (norm_queries=False); `normalised_query/` is the paper's form.
"""

import jax
import jax.numpy as jnp
from golden.comparison import Comparison

from xlformer import models
from xlformer.errors import UserError
from xlformer.layers import gating, memory
from xlformer.models import TransformerXLConfig

NAME = "gtrxl"
PAPER = "normalised_query/"


def matches(names, config):
    del config
    model, gate = {"params/layers.0.gate1.bg"}, {"params/bg", "params/Ug.weight"}
    return model <= names or gate <= names


def compare(arrays, config, dtype):
    return (_gate if "params/bg" in arrays else _model)(arrays, config, dtype)


def _gate(arrays, config, dtype):
    del config, dtype
    given = {"x", "y"} | {name for name in arrays if name.startswith("params/")}

    def loss(theirs):
        weights = _gate_weights(theirs, "params/")
        out = gating.gru(theirs["x"], theirs["y"], weights)
        return (out * arrays["cotangent"]).sum(), out

    theirs = {name: jnp.asarray(arrays[name]) for name in given}
    grads, out = jax.jit(jax.grad(loss, has_aux=True))(theirs)
    gradients = {f"grad/{n.removeprefix('params/')}": x for n, x in grads.items()}
    return Comparison({"out": out}, gradients, {*given, "cotangent"})


def _model(arrays, config, dtype):
    theirs = {
        name.removeprefix("params/"): jnp.asarray(x)
        for name, x in arrays.items()
        if name.startswith("params/")
    }
    values, gradients = {}, {}
    given = {f"params/{name}" for name in theirs}
    for prefix, norm_queries in ("", False), (PAPER, True):
        ours = _Ours(config, theirs, norm_queries)
        # To compile a gradient is nearly all that a form costs.
        graded = any(name.startswith(f"{prefix}seg0/grad/") for name in arrays)
        step = _with_gradient(ours.loss) if graded else jax.jit(ours.loss)
        carried = ours.fresh(config["batch"], dtype)
        for s in range(len(config["lens"])):
            segment = f"seg{s}/"
            x, cotangent = (arrays[segment + n] for n in ("inputs", "cotangent"))
            found = step(theirs, x, cotangent, carried)
            found, grads = found if graded else (found, ({}, None))
            _, (out, carried) = found
            values[f"{prefix}{segment}out"] = out
            values[f"{prefix}{segment}memory"] = ours.memory(carried)
            by_name = {"inputs": grads[1], **grads[0]}
            gradients |= {f"{prefix}{segment}grad/{n}": g for n, g in by_name.items()}
            given |= {segment + "inputs", segment + "cotangent"}
    return Comparison(values, gradients, given)


def _with_gradient(loss):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


class _Ours:
    """Our model with the program's weights, time first as there."""

    def __init__(self, config, theirs, norm_queries):
        L = config["n_layer"]
        known = {name for i in range(L) for name in _names(i)} | {"u", "v"}
        if other := sorted(set(theirs) - known):
            raise UserError(f"params/{other[0]} has no counterpart in this model")
        self.model = models.build(
            TransformerXLConfig(
                vocab_size=1,
                n_layer=L,
                d_model=config["d_model"],
                n_head=config["heads"],
                d_head=config["head_dim"],
                d_inner=config["mlp_hidden"],
                memory_length=config["memory_len"],
                gate="gru",
                norm_queries=norm_queries,
                untie_r=True,
                attend_zero_memory=True,
                dropout=0.0,
                scan_layers=True,
            )
        )

    def fresh(self, B, dtype):
        """Our state, and the outputs that the program remembers and never reads."""
        config = self.model.config
        outputs_BMD = jnp.zeros((B, config.memory_length, config.d_model), dtype)
        return self.model.init_state(B, dtype), outputs_BMD

    def loss(self, theirs, x_TBD, cotangent_TBD, carried):
        config, (state, outputs_BMD) = self.model.config, carried
        layers = [_layer(config, theirs, i) for i in range(config.n_layer)]
        params = {"layers": jax.tree.map(lambda *parts: jnp.stack(parts), *layers)}
        x_BTD = jnp.swapaxes(x_TBD, 0, 1)
        y_BTD, state, _ = self.model.trunk.apply(params, x_BTD, state)
        outputs_BMD = memory.append(outputs_BMD, y_BTD, x_BTD.shape[1])
        out_TBD = jnp.swapaxes(y_BTD, 0, 1)
        return (out_TBD * cotangent_TBD).sum(), (out_TBD, (state, outputs_BMD))

    def memory(self, carried):
        state, outputs_BMD = carried
        all_LBMD = jnp.concatenate([state.hidden_LBMD, outputs_BMD[None]])
        return jnp.swapaxes(all_LBMD, 1, 2)


MATRICES = ("Wr", "Wz", "Wg", "Ur", "Uz", "Ug")
LINEAR = ("attention.attention_q.0", "attention.attention_kv.0", "attention.project.0")
LINEAR += ("attention.project_pos.0", "mlp.0.0", "mlp.2.0", "layernorm1", "layernorm2")


def _names(i):
    """Of the parameters of layer i."""
    for gate in ("gate1", "gate2"):
        yield f"layers.{i}.{gate}.bg"
        yield from (f"layers.{i}.{gate}.{name}.weight" for name in MATRICES)
    for name in LINEAR:
        yield from (f"layers.{i}.{name}.weight", f"layers.{i}.{name}.bias")


def _gate_weights(theirs, prefix):
    r, z, g, *of_residual, reset = (theirs[f"{prefix}{n}.weight"].T for n in MATRICES)
    new_DCE, residual_DCE = jnp.stack([r, z, g], 1), jnp.stack(of_residual, 1)
    return gating.Weights(new_DCE, residual_DCE, reset, theirs[f"{prefix}bg"])


def _layer(config, theirs, i):
    """Our parameters of a layer, of the program's."""
    own = f"layers.{i}."
    H, K, D = config.n_head, config.head_width, config.d_model

    def linear(name):
        return theirs[f"{own}{name}.weight"].T, theirs[f"{own}{name}.bias"]

    def norm(name):
        return dict(zip(("scale", "bias"), linear(name), strict=True))

    def gate(name):
        weights = _gate_weights(theirs, f"{own}{name}.")
        names = ("new_kernel", "residual_kernel", "reset_kernel", "bias")
        return dict(zip(names, weights, strict=True))

    (q_DW, q_bias), (kv_DW, kv_bias), (out_WD, out_bias), (position_DW, _) = map(
        linear, LINEAR[:4]
    )
    (in_DF, in_F), (out_FD, out_D) = linear("mlp.0.0"), linear("mlp.2.0")
    return {
        "attention": {
            "qkv": jnp.concatenate([q_DW, kv_DW], 1).reshape(D, 3, H, K),
            "position": position_DW.reshape(D, H, K),
            "u": theirs["u"] + q_bias.reshape(H, K),
            "v": theirs["v"] + q_bias.reshape(H, K),
            "output": out_WD.reshape(H, K, D),
            "output_bias": out_bias + kv_bias[H * K :] @ out_WD,
        },
        "attention_norm": norm("layernorm1"),
        "attention_gate": gate("gate1"),
        "norm": norm("layernorm2"),
        "feed_forward_gate": gate("gate2"),
        "feed_forward": {
            "in_kernel": in_DF,
            "in_bias": in_F,
            "out_kernel": out_FD,
            "out_bias": out_D,
        },
    }
