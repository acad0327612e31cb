"""What a training step of an LSTM is made of, in XLA and in PyTorch: see parts.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
from settings import Recurrent

from xlformer.kernels.cross_entropy import softmax_nll
from xlformer.layers import recurrent


def products(setting: Recurrent) -> dict:
    """{part: (einsum, shape, shape)} of the forward pass."""
    B, T = setting.batch_size, setting.segment_length
    found = {}
    for D, N in dict.fromkeys(setting.layers):
        name = f"{D:,} to {N:,}"
        found[f"inputs, {name}"] = ("nd,dw->nw", (B * T, D), (D, 4 * N))
        found[f"one step, {name}"] = ("nd,dw->nw", (B, N), (N, 4 * N))
    d, V = setting.d_model, setting.vocab_size
    return found | {"vocabulary": ("nd,vd->nv", (B * T, d), (V, d))}


def wholes(setting: Recurrent) -> list[tuple]:
    """(part, FLOPs, [ours, PyTorch's]): layers and the loss, forward and backward."""
    tokens = setting.batch_size * setting.segment_length
    found = []
    for D, N in dict.fromkeys(setting.layers):
        # The gradient of a product is one more for each of its two arguments.
        count = 3 * 8.0 * tokens * N * (D + N)
        pair = [_our_layer(setting, D, N), _their_layer(setting, D, N)]
        found.append((f"layer, {D:,} to {N:,}", count, pair))
    count = 3 * 2.0 * tokens * setting.d_model * setting.vocab_size
    return [
        *found,
        ("softmax and loss", count, [_our_loss(setting), _their_loss(setting)]),
    ]


def _our_layer(setting, D, N):
    B, T, rng = setting.batch_size, setting.segment_length, np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(0.03 * rng.standard_normal(shape, np.float32))

    shapes = ((D, 4, N), (N, 4, N), (4, N), (4, N))
    weights = recurrent.Weights(*(array(*shape) for shape in shapes))
    x_TBD, h_BN, dy_TBN = array(T, B, D), array(B, N), array(T, B, N)

    @jax.jit
    def both(weights, x_TBD, h_BN, dy_TBN):
        def forward(weights, x_TBD):
            return recurrent.layer(x_TBD, h_BN, h_BN, weights, recurrent.Places())[0]

        y_TBN, backward = jax.vjp(forward, weights, x_TBD)
        return y_TBN, backward(dy_TBN)

    return lambda: jax.block_until_ready(both(weights, x_TBD, h_BN, dy_TBN))


def _their_layer(setting, D, N):
    B, T = setting.batch_size, setting.segment_length
    layer = torch.nn.LSTM(D, N)
    x, h, dy = torch.randn(T, B, D), torch.randn(1, B, N), torch.randn(T, B, N)
    x.requires_grad_()

    def both():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x, (h, h))[0].backward(dy)

    return both


def _our_loss(setting):
    N, rng = setting.batch_size * setting.segment_length, np.random.default_rng(0)
    h_ND = jnp.asarray(rng.standard_normal((N, setting.d_model), np.float32))
    shape = (setting.vocab_size, setting.d_model)
    table_VD = jnp.asarray(0.1 * rng.standard_normal(shape, np.float32))
    targets_N = jnp.asarray(rng.integers(0, setting.vocab_size, N))
    bias_V = jnp.zeros(setting.vocab_size)

    @jax.jit
    def both(h_ND, table_VD, bias_V, targets_N):
        def loss(*arrays):
            return softmax_nll(*arrays, targets_N).mean()

        return jax.value_and_grad(loss, (0, 1, 2))(h_ND, table_VD, bias_V)

    return lambda: jax.block_until_ready(both(h_ND, table_VD, bias_V, targets_N))


def _their_loss(setting):
    N = setting.batch_size * setting.segment_length
    leaves = (
        torch.randn(N, setting.d_model),
        0.1 * torch.randn(setting.vocab_size, setting.d_model),
    )
    h, table, bias = (
        x.requires_grad_() for x in (*leaves, torch.zeros(setting.vocab_size))
    )
    targets = torch.randint(0, setting.vocab_size, (N,))

    def both():
        for x in (h, table, bias):
            x.grad = None
        logits = torch.nn.functional.linear(h, table, bias)
        # As SplitCrossEntropyLoss does it without splits.
        log_p = torch.nn.functional.log_softmax(logits, dim=-1)
        (-log_p.gather(1, targets[:, None]).sum() / N).backward()

    return both
