"""LSTM layers over a segment, and what AWD-LSTM adds to them (Merity et al. 2018).

Arrays are time-major, [T, B, ...], as the loop over time reads them. Gates stand in the
order i, f, g, o of PyTorch, on an axis of their own, so that a mesh splits the units
and leaves the four gates of a unit on one device. Every mask is an argument, true where
something is kept; who trains draws it. N are a layer's units, D its inputs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from xlformer.sharding import constrain

# Logical axes of the parameters of a layer: see models.parameters.param_axes.
PARAM_AXES = {
    "lstm/input_kernel": ("embed", None, "mlp"),
    "lstm/hidden_kernel": ("embed", None, "mlp"),
    "lstm/input_bias": (None, "mlp"),
    "lstm/hidden_bias": (None, "mlp"),
}
# The two sides of the matrices among them, one for each gate: see models.sides.
MATRICES = {
    "lstm/input_kernel": ((0,), (2,)),
    "lstm/hidden_kernel": ((0,), (2,)),
}


class LSTMState(NamedTuple):
    """What a stack carries, one array [B, N] for each layer.

    Attributes:
      h: outputs after the last token, in the dtype of the computation.
      c: cells, in at least float32: they are sums over the whole text.
    """

    h: tuple
    c: tuple


class Weights(NamedTuple):
    """The parameters of a layer. PyTorch adds two biases, and so they are two here."""

    input_DGN: Any
    hidden_NGN: Any
    input_GN: Any
    hidden_GN: Any


class Masks(NamedTuple):
    """What a stack of L layers keeps of its arrays in training; None keeps all.

    Attributes:
      input_BD: of the vectors that enter the first layer, the same at every step.
      hidden: L - 1 masks [B, N] between layers, likewise.
      output_BN: of the last output, likewise.
      weight: L masks [N, G, N] of the recurrent weights, the same in all rows.
    """

    input_BD: Any = None
    hidden: Any = None
    output_BN: Any = None
    weight: Any = None


class Rates(NamedTuple):
    """How much each of Masks leaves out; what is kept is divided by 1 - rate."""

    input: float = 0.0
    hidden: float = 0.0
    output: float = 0.0
    weight: float = 0.0


class Places(NamedTuple):
    """Which tokens of a segment are what; None where none are.

    Attributes:
      reset_TB: h = c = 0 before this token.
      valid_TB: false for padding, where the state stays as it is.
    """

    reset_TB: Any = None
    valid_TB: Any = None


def places(T: int, resets_BT=None, lengths=None) -> Places:
    """Of resets [B, T] and lengths, [B] or one number; a reset in padding is none."""
    reset_TB = None if resets_BT is None else resets_BT.T
    if lengths is None:
        return Places(reset_TB)
    valid_TB = jnp.arange(T)[:, None] < jnp.atleast_1d(lengths)[None]
    if reset_TB is not None:
        # It comes again with the segment that has this token.
        reset_TB = reset_TB & valid_TB
    return Places(reset_TB, valid_TB)


# Dropout ------------------------------------------------------------------------------


def keep(x: jax.Array, mask: jax.Array | None, rate: float) -> jax.Array:
    """Zeroes what the mask, of the shape of x, leaves out, and rescales the rest."""
    return x if mask is None else jnp.where(mask, x / (1 - rate), 0).astype(x.dtype)


def locked(x_TBN: jax.Array, mask_BN: jax.Array | None, rate: float) -> jax.Array:
    """Dropout with one mask for all steps (Gal & Ghahramani 2016)."""
    return keep(x_TBN, None if mask_BN is None else mask_BN[None], rate)


# The layer ----------------------------------------------------------------------------


def layer(x_TBD, h_BN, c_BN, weights: Weights, at: Places):
    """One layer: outputs [T, B, N], and h and c after the segment.

    The recurrent weights are as the loop shall use them, dropped or not. Computes in
    the dtype of x, gates and cells in at least float32.
    """
    dtype = x_TBD.dtype
    # Gathered over fsdp here: inside the loop that would be once a step. Split over
    # `tensor` by units, each step gathers B x N outputs and, backward, sums as many.
    hidden_NGN = constrain(weights.hidden_NGN.astype(dtype), None, None, "mlp")
    input_DGN = constrain(weights.input_DGN.astype(dtype), None, None, "mlp")
    bias_GN = (weights.input_GN + weights.hidden_GN).astype(dtype)
    with jax.named_scope("input_projection"):
        x_TBGN = jnp.einsum("TBD,DGN->TBGN", x_TBD, input_DGN) + bias_GN[None, None]
        x_TBGN = constrain(x_TBGN, None, "batch", None, "mlp")
    cells = jnp.promote_types(dtype, jnp.float32)
    with jax.named_scope("recurrence"):
        return recurrence(
            x_TBGN, h_BN.astype(dtype), c_BN.astype(cells), hidden_NGN, at
        )


@jax.custom_vjp
def recurrence(x_TBGN, h_BN, c_BN, kernel_NGN, at: Places):
    """The loop over time: outputs [T, B, N], the last h and the last c.

    x_TBGN are the gates' inputs with their biases, c_BN is in at least float32.
    """
    (y_TBN, h_BN, c_BN), _ = _forward(x_TBGN, h_BN, c_BN, kernel_NGN, at)
    return y_TBN, h_BN, c_BN


# Differentiated by JAX, the loop would add to the gradient of kernel_NGN at each step,
# N x 4 N numbers, and be bound by memory; here it is one product over all T B rows at
# the end. Loss and gradient of T = 70 on two CPU cores, both in one process (others ran
# beside it): N = 400, B = 20 take 70 ms and not 133; N = 1152, B = 20 take 805 and not
# 2,369; N = 1152, B = 80 take 3.4 s and not 4.7.
def _forward(x_TBGN, h_BN, c_BN, kernel_NGN, at: Places):
    def step(carry, part):
        h_BN, c_BN = carry
        x_BGN, (reset_B, valid_B) = part
        # `where` and no product: what lies before a reset may be NaN.
        h_BN, c_BN = _after_reset(h_BN, reset_B), _after_reset(c_BN, reset_B)
        gates_BGN = x_BGN.astype(c_BN.dtype) + _product(h_BN, kernel_NGN, c_BN.dtype)
        i_BN, f_BN, o_BN = (jax.nn.sigmoid(gates_BGN[:, k]) for k in (0, 1, 3))
        g_BN = jnp.tanh(gates_BGN[:, 2])
        new_c_BN = f_BN * c_BN + i_BN * g_BN
        new_h_BN = (o_BN * jnp.tanh(new_c_BN)).astype(h_BN.dtype)
        new_c_BN = _if_valid(valid_B, new_c_BN, c_BN)
        new_h_BN = _if_valid(valid_B, new_h_BN, h_BN)
        gates_BGN = jnp.stack([i_BN, f_BN, g_BN, o_BN], axis=1).astype(h_BN.dtype)
        gates_BGN = constrain(gates_BGN, "batch", None, "mlp")
        return (new_h_BN, new_c_BN), (new_h_BN, new_c_BN, gates_BGN)

    carry, kept = lax.scan(step, (h_BN, c_BN), (x_TBGN, at))
    return (kept[0], *carry), kept


def _saved(x_TBGN, h_BN, c_BN, kernel_NGN, at):
    out, (y_TBN, c_TBN, gates_TBGN) = _forward(x_TBGN, h_BN, c_BN, kernel_NGN, at)
    return out, (y_TBN, c_TBN, gates_TBGN, h_BN, c_BN, kernel_NGN, at)


def _backward(saved, gradients):
    y_TBN, c_TBN, gates_TBGN, h_BN, c_BN, kernel_NGN, at = saved
    dy_TBN, dh_BN, dc_BN = gradients
    exact = c_BN.dtype
    before_TBN = _before(h_BN, y_TBN, at.reset_TB)
    c_before_TBN = _before(c_BN, c_TBN, at.reset_TB)

    # Turned once: read across in each step, N = 1152 took 1.2 to 1.8 times as long.
    kernel_GNN = jnp.transpose(kernel_NGN, (1, 2, 0))

    def step(carry, part):
        dh_BN, dc_BN = carry
        dy_BN, c_BN, before_BN, gates_BGN, (reset_B, valid_B) = part
        i_BN, f_BN, g_BN, o_BN = (gates_BGN[:, k].astype(exact) for k in range(4))
        dh_BN = dh_BN + dy_BN.astype(exact)
        tanh_BN = jnp.tanh(c_BN)
        through_BN = dc_BN + dh_BN * o_BN * (1 - tanh_BN * tanh_BN)
        parts = (
            through_BN * g_BN * i_BN * (1 - i_BN),
            through_BN * before_BN * f_BN * (1 - f_BN),
            through_BN * i_BN * (1 - g_BN * g_BN),
            dh_BN * tanh_BN * o_BN * (1 - o_BN),
        )
        dgates_BGN = jnp.stack(parts, axis=1)
        if valid_B is not None:
            dgates_BGN = jnp.where(valid_B[:, None, None], dgates_BGN, 0)
        dgates_BGN = constrain(dgates_BGN, "batch", None, "mlp").astype(dy_BN.dtype)
        dbefore_BN = jnp.einsum(
            "BGN,GNM->BM", dgates_BGN, kernel_GNN, preferred_element_type=exact
        )
        dbefore_BN = constrain(dbefore_BN, "batch", "mlp")
        dh_BN = _after_reset(_if_valid(valid_B, dbefore_BN, dh_BN), reset_B)
        dc_BN = _after_reset(_if_valid(valid_B, through_BN * f_BN, dc_BN), reset_B)
        return (dh_BN, dc_BN), dgates_BGN

    parts = dy_TBN, c_TBN, c_before_TBN, gates_TBGN, at
    (dh_BN, dc_BN), dgates_TBGN = lax.scan(
        step, (dh_BN.astype(exact), dc_BN), parts, reverse=True
    )
    dkernel_NGN = jnp.einsum("TBM,TBGN->MGN", before_TBN, dgates_TBGN)
    return dgates_TBGN, dh_BN.astype(h_BN.dtype), dc_BN, dkernel_NGN, None


recurrence.defvjp(_saved, _backward)


def _product(h_BN, kernel_NGN, dtype):
    h_BN = constrain(h_BN, "batch", None)
    return jnp.einsum("BM,MGN->BGN", h_BN, kernel_NGN, preferred_element_type=dtype)


def _before(first_BN, x_TBN, reset_TB):
    """What each step starts from: the array of the step before, 0 after a reset."""
    x_TBN = jnp.concatenate([first_BN[None], x_TBN[:-1]])
    return x_TBN if reset_TB is None else jnp.where(reset_TB[..., None], 0, x_TBN)


def _after_reset(x_BN, reset_B):
    return x_BN if reset_B is None else jnp.where(reset_B[:, None], 0, x_BN)


def _if_valid(valid_B, new_BN, old_BN):
    return new_BN if valid_B is None else jnp.where(valid_B[:, None], new_BN, old_BN)


# The stack ----------------------------------------------------------------------------


class Outputs(NamedTuple):
    """Of each layer, [T, B, N]: what it gave, and what dropout left of that."""

    raw: tuple
    dropped: tuple


def stack(x_TBD, state: LSTMState, layers, at: Places, masks=None, rates=None):
    """Layers one after the other: (Outputs, the new state).

    Args:
      x_TBD: the vectors of the segment.
      state: before it.
      layers: the Weights of each layer; their widths may differ.
      at: resets and padding.
      masks, rates: of dropout; None leaves everything in.
    """
    masks, rates = masks or Masks(), rates or Rates()
    last = len(layers) - 1
    hidden = masks.hidden or (None,) * last
    weight = masks.weight or (None,) * len(layers)
    if at.valid_TB is not None:
        # Padding may be NaN, and 0 * NaN is NaN in the gradients of the weights.
        x_TBD = jnp.where(at.valid_TB[..., None], x_TBD, 0)
    x_TBD = locked(x_TBD, masks.input_BD, rates.input)
    raw, dropped, h, c = [], [], [], []
    for k, one in enumerate(layers):
        one = one._replace(hidden_NGN=keep(one.hidden_NGN, weight[k], rates.weight))
        y_TBN, h_BN, c_BN = layer(x_TBD, state.h[k], state.c[k], one, at)
        mask, rate = hidden[k] if k < last else masks.output_BN, rates.hidden
        x_TBD = locked(y_TBN, mask, rate if k < last else rates.output)
        for found, x in zip(
            (raw, dropped, h, c), (y_TBN, x_TBD, h_BN, c_BN), strict=True
        ):
            found.append(x)
    return Outputs(tuple(raw), tuple(dropped)), LSTMState(tuple(h), tuple(c))


# Penalties ----------------------------------------------------------------------------


def activation_penalty(y_TBN: jax.Array, at: Places) -> jax.Array:
    """AR: the mean square of the dropped last output (Merity et al. 2017)."""
    return _mean_of_rows(y_TBN, at.valid_TB)


def temporal_penalty(y_TBN: jax.Array, at: Places) -> jax.Array:
    """TAR: the mean square of the raw last output's change from token to token.

    Over a reset there is no change, and none in a segment of one token.
    """
    if y_TBN.shape[0] == 1:
        return jnp.zeros((), _exact(y_TBN))
    counts = [] if at.valid_TB is None else [at.valid_TB[1:]]
    counts += [] if at.reset_TB is None else [~at.reset_TB[1:]]
    counts_TB = functools.reduce(jnp.logical_and, counts) if counts else None
    exact_TBN = y_TBN.astype(_exact(y_TBN))
    return _mean_of_rows(exact_TBN[1:] - exact_TBN[:-1], counts_TB)


def _mean_of_rows(x_TBN, counts_TB):
    """The mean over rows of each row's mean square, where it counts; 0 of nothing."""
    square_TB = jnp.square(x_TBN.astype(_exact(x_TBN))).mean(-1)
    if counts_TB is None:
        return square_TB.mean()
    n_B = jnp.maximum(jnp.broadcast_to(counts_TB, square_TB.shape).sum(0), 1)
    return (jnp.where(counts_TB, square_TB, 0).sum(0) / n_B).mean()


def _exact(x):
    return jnp.promote_types(x.dtype, jnp.float32)
