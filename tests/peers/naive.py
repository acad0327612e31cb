"""A plain JAX port, as one writes it from the paper.

Positions are shifted by pad, reshape and slice; the memory of layer inputs is projected
again in every segment; layers are unrolled. It shows how much of xlformer's speed is
JAX's. Only what the CPU settings need: one softmax, float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from settings import Setting


def init(setting: Setting, key):
    d, W = setting.d_model, setting.n_head * setting.d_head

    def normal(*shape):
        nonlocal key
        key, used = jax.random.split(key)
        return 0.02 * jax.random.normal(used, shape)

    def norm():
        return {"scale": jnp.ones(d), "bias": jnp.zeros(d)}

    layers = [
        {
            "qkv": normal(d, 3 * W),
            "r": normal(d, W),
            "out": normal(W, d),
            "norm1": norm(),
            "up": normal(d, setting.d_inner),
            "up_bias": jnp.zeros(setting.d_inner),
            "down": normal(setting.d_inner, d),
            "down_bias": jnp.zeros(d),
            "norm2": norm(),
        }
        for _ in range(setting.n_layer)
    ]
    heads = setting.n_head, setting.d_head
    return {
        "table": normal(setting.vocab_size, d),
        "bias": jnp.zeros(setting.vocab_size),
        "u": normal(*heads),
        "v": normal(*heads),
        "layers": layers,
    }


def forward(setting: Setting, params, inputs_BT, targets_BT, memory, key=None):
    """(mean nll, the next memory): one [B, M, D] for each layer."""
    T, S = inputs_BT.shape[1], inputs_BT.shape[1] + setting.memory_length

    def drop(x):
        nonlocal key
        if key is None:
            return x
        key, used = jax.random.split(key)
        keep = jax.random.bernoulli(used, 1 - setting.dropout, x.shape)
        return jnp.where(keep, x / (1 - setting.dropout), 0)

    rates_F = 1e4 ** -(jnp.arange(0, setting.d_model, 2) / setting.d_model)
    angles_SF = jnp.arange(S - 1, -1, -1)[:, None] * rates_F[None]
    r_SD = drop(jnp.concatenate([jnp.sin(angles_SF), jnp.cos(angles_SF)], axis=-1))
    distance_TS = jnp.arange(T)[:, None] + (S - T) - jnp.arange(S)[None]
    hidden_TS = distance_TS < 0
    if setting.same_length:
        hidden_TS |= distance_TS >= setting.memory_length
    x_BTD = drop(params["table"][inputs_BT] * setting.d_model**0.5)
    kept = []
    for layer, memory_BMD in zip(params["layers"], memory, strict=True):
        context_BSD = jnp.concatenate([memory_BMD, x_BTD], axis=1)
        kept.append(jax.lax.stop_gradient(context_BSD[:, T:]))
        y_BTD = attention(setting, params, layer, context_BSD, r_SD, hidden_TS)
        x_BTD = norm(x_BTD + drop(y_BTD), layer["norm1"])
        up_BTF = drop(jax.nn.relu(x_BTD @ layer["up"] + layer["up_bias"]))
        y_BTD = up_BTF @ layer["down"] + layer["down_bias"]
        x_BTD = norm(x_BTD + drop(y_BTD), layer["norm2"])
    logits_BTV = drop(x_BTD) @ params["table"].T + params["bias"]
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    nll_BT1 = -jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)
    return nll_BT1.mean(), kept


def attention(setting, params, layer, context_BSD, r_SD, hidden_TS):
    heads = setting.n_head, setting.d_head
    T, S = hidden_TS.shape
    B = context_BSD.shape[0]
    qkv_BSCHK = (context_BSD @ layer["qkv"]).reshape(B, S, 3, *heads)
    q_BTHK, k_BSHK, v_BSHK = (
        qkv_BSCHK[:, -T:, 0],
        qkv_BSCHK[:, :, 1],
        qkv_BSCHK[:, :, 2],
    )
    r_SHK = (r_SD @ layer["r"]).reshape(S, *heads)
    scores = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK + params["u"][None, None], k_BSHK)
    raw = jnp.einsum("BTHK,SHK->BHTS", q_BTHK + params["v"][None, None], r_SHK)
    scores = (scores + shift(raw)) * setting.d_head**-0.5
    scores = jnp.where(hidden_TS[None, None], -1e30, scores)
    y_BTHK = jnp.einsum("BHTS,BSHK->BTHK", jax.nn.softmax(scores), v_BSHK)
    return y_BTHK.reshape(B, T, -1) @ layer["out"]


def shift(raw_BHTS):
    """Appendix B of the paper: one column of zeros, seen with rows of another width."""
    B, H, T, S = raw_BHTS.shape
    padded = jnp.pad(raw_BHTS, ((0, 0), (0, 0), (0, 0), (1, 0)))
    return padded.reshape(B, H, S + 1, T)[:, :, 1:].reshape(B, H, T, S)


def norm(x, params):
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(variance + 1e-5)
    return centred * scale * params["scale"][None, None] + params["bias"][None, None]


def build(setting: Setting, batches):
    """(run, parameters) as worker.serve wants them."""
    params = init(setting, jax.random.key(0))
    shape = (setting.batch_size, setting.memory_length, setting.d_model)
    memory = [jnp.zeros(shape) for _ in range(setting.n_layer)]
    optimizer = optax.chain(optax.clip_by_global_norm(0.25), optax.adam(2.5e-4))

    @jax.jit
    def score(state, inputs_BT, targets_BT):
        params, opt_state, memory, key = state
        loss, memory = forward(setting, params, inputs_BT, targets_BT, memory)
        return (params, opt_state, memory, key), loss

    def train(state, inputs_BT, targets_BT):
        params, opt_state, memory, key = state
        key, used = jax.random.split(key)

        def loss_fn(params):
            return forward(setting, params, inputs_BT, targets_BT, memory, used)

        (loss, memory), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state, memory, key), loss

    step = jax.jit(train, donate_argnums=0) if setting.train else score
    state = (params, optimizer.init(params), memory, jax.random.key(1))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    loss = None

    def run(times: int) -> int:
        nonlocal state, loss
        for k in range(times):
            previous = loss
            state, loss = step(state, *batches[k % len(batches)])
            if previous is not None:
                previous.block_until_ready()  # two in flight
        loss.block_until_ready()
        return times * setting.tokens

    return run, count
