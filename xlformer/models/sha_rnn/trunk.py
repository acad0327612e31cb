"""The blocks of SHA-RNN: an LSTM, attention where there is any, the Boom."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from xlformer.errors import UserError
from xlformer.kernels import watching
from xlformer.kernels.dropout import dropout, fold, seeds
from xlformer.layers import recurrent, single_head
from xlformer.layers.feed_forward import boom, layer_norm
from xlformer.layers.recurrent import LSTMState
from xlformer.models.base import Aux
from xlformer.models.lstm import LSTMModule
from xlformer.models.sha_rnn.config import SHARNNConfig
from xlformer.sharding import constrain

EPSILON = 1e-12  # of all norms
# Each block has all six, used or not, as in the original, whose count of parameters
# they are part of. Without attention `middle` and `memory` are read by nobody, `output`
# (its lnout) never is.
NORMS = ("start", "middle", "memory", "output", "residual", "inner")
# Which number is folded into a row's key for what; blocks count on from the last.
INPUT_KEY, OUTPUT_KEY, BLOCK_KEY = range(3)
# The same inside a block.
LSTM_KEY, QUERY_KEY, OWN_KEY, MEMORY_KEY, WEIGHT_KEY, MIX_KEY, UNITS_KEY, BOOM_KEY = (
    range(8)
)


class State(NamedTuple):
    """What is carried: of each block h and c, and the ring, or () without attention."""

    lstm: LSTMState
    memory: Any


class Segment(NamedTuple):
    """What every block has to know of a segment."""

    at: recurrent.Places
    seen: Any
    next_B: Any


class Attention(nn.Module):
    """Single-headed attention; see layers.single_head."""

    config: SHARNNConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD, m_BTD, rows_BPD, seen, key=None):
        """What the queries of x find in the ring and in m, both [B, T, D]."""
        config, D = self.config, x_BTD.shape[-1]
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        kernel_DE = self.param(
            "query_kernel", nn.initializers.normal(config.std), (D, D)
        )
        bias_D = self.param("query_bias", zeros, (D,))
        norm = (
            self.param("norm_scale", ones, (D,)),
            self.param("norm_bias", zeros, (D,)),
        )
        query_D, key_D = (
            self.param(f"{n}_gate", zeros, (D,)) for n in ("query", "key")
        )
        value_D = self._value(D)
        # The original has these two as well, and its count of parameters; it reads
        # neither: its other way to make gates, and the gate of a branch that is off.
        self.param("other_gates", zeros, (3, D))
        self.param("residual_gate", ones, (D,))
        with jax.named_scope("queries"):
            q_BTD = jnp.einsum("BTD,DE->BTE", x_BTD, kernel_DE.astype(self.dtype))
            # One head has no second device to lie on: each has all of the query.
            q_BTD = constrain(q_BTD, "batch", None, None)
            q_BTD = q_BTD + bias_D.astype(self.dtype)[None, None]
            q_BTD = layer_norm(q_BTD, *norm, EPSILON)
            q_BTD = q_BTD * self._row(jax.nn.sigmoid(query_D))
            q_BTD = dropout(q_BTD, config.hidden_dropout, fold(key, QUERY_KEY))
            # K = sigmoid(ks) m: the gate meets the queries instead, which are fewer.
            q_BTD = q_BTD * self._row(jax.nn.sigmoid(key_D) * D**-0.5)
        own_BTD, memory_BPD, drops = m_BTD, rows_BPD, None
        if key is not None and config.hidden_dropout:
            rate = config.hidden_dropout
            own_BTD = dropout(own_BTD, rate, fold(key, OWN_KEY))
            memory_BPD = dropout(rows_BPD, rate, fold(key, MEMORY_KEY))
            seeds_BH2 = seeds(fold(key, WEIGHT_KEY), len(x_BTD), 1)
            drops = single_head.Drops(rate, seeds_BH2[:, 0])
        y_BTD = single_head.attend(
            q_BTD, (m_BTD, own_BTD), (rows_BPD, memory_BPD), seen, drops
        )
        return y_BTD * self._row(value_D)

    def _value(self, D: int):
        """The vector that all values are multiplied by, in at least float32."""
        config = self.config
        if config.collapsed:
            # About what the other form begins with.
            init = nn.initializers.normal(0.025)
            return self.param("value_gate", init, (D,))
        gate_D = self.param("value_gate", nn.initializers.zeros, (D,))
        init = nn.initializers.normal(config.std)
        kernel_DCN = self.param("value_kernel", init, (D, 2, D))
        bias_CN = self.param("value_bias", nn.initializers.zeros, (2, D))
        return single_head.overparameterised(gate_D, kernel_DCN, bias_CN)

    def _row(self, x_D):
        return x_D.astype(self.dtype)[None, None]


class BoomModule(nn.Module):
    """The Boom; see layers.feed_forward.boom."""

    config: SHARNNConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD, key=None):
        config, D = self.config, x_BTD.shape[-1]
        init = nn.initializers.normal(config.std)
        kernel_DCN = self.param("kernel", init, (D, config.chunks, D))
        bias_CN = self.param("bias", nn.initializers.zeros, (config.chunks, D))
        weights = kernel_DCN.astype(self.dtype), bias_CN.astype(self.dtype)
        return boom(x_BTD, *weights, config.hidden_dropout, key)


class Block(nn.Module):
    """LSTM, attention or none, Boom: what is added, is added to normalised vectors."""

    config: SHARNNConfig
    dtype: Any
    attends: bool

    @nn.compact
    def __call__(self, x_BTD, h_BD, c_BD, rows_BPD, segment: Segment, key=None):
        """(output, h, c, the block's part of the ring, None without attention)."""
        norms, rate = self._norms(x_BTD.shape[-1]), self.config.hidden_dropout
        drop = functools.partial(dropout, rate=rate)
        weights = LSTMModule(x_BTD.shape[-1], name="lstm")(x_BTD.shape[-1])
        x_TBD = jnp.swapaxes(norms["start"](x_BTD), 0, 1)
        y_TBD, h_BD, c_BD = recurrent.layer(x_TBD, h_BD, c_BD, weights, segment.at)
        # Gathered from the loop, whose units are split over `tensor`: a norm reads all.
        y_BTD = constrain(jnp.swapaxes(y_TBD, 0, 1), "batch", None, None)
        # No residual around the LSTM, as published.
        x_BTD = drop(y_BTD, key=fold(key, LSTM_KEY))
        if self.attends:
            m_BTD = single_head.finite(norms["memory"](x_BTD))
            x_BTD = norms["middle"](x_BTD)
            # Written first and read then, so that the compiler need not copy them.
            rows_BPD = single_head.write(
                rows_BPD, jax.lax.stop_gradient(m_BTD), segment.seen, segment.next_B
            )
            attention = Attention(self.config, self.dtype, name="attention")
            more_BTD = attention(x_BTD, m_BTD, rows_BPD, segment.seen, key)
            x_BTD = x_BTD + drop(more_BTD, key=fold(key, MIX_KEY))
        module = BoomModule(self.config, self.dtype, name="boom")
        more_BTD = module(norms["inner"](x_BTD), fold(key, UNITS_KEY))
        more_BTD = constrain(more_BTD, "batch", None, None)
        x_BTD = norms["residual"](x_BTD) + drop(more_BTD, key=fold(key, BOOM_KEY))
        return x_BTD, h_BD, c_BD, rows_BPD

    def _norms(self, D: int):
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        return {
            name: functools.partial(
                layer_norm,
                scale_D=self.param(f"{name}_scale", ones, (D,)),
                bias_D=self.param(f"{name}_bias", zeros, (D,)),
                epsilon=EPSILON,
            )
            for name in NORMS
        }


class TrunkModule(nn.Module):
    """The trunk of models.tokens."""

    config: SHARNNConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BTD,
        state: State,
        *,
        resets_BT=None,
        lengths=None,
        step=None,
        train=False,
        keys=None,
    ):
        del step, train  # No schedule inside this model; `keys` says what is dropped.
        config, T, attending = self.config, x_BTD.shape[1], self.config.attending
        key = None if keys is None else keys.rows_B
        at = recurrent.places(T, resets_BT, lengths)
        if at.valid_TB is not None:
            # Padding may be NaN, and 0 * NaN is NaN in the gradients of the weights.
            x_BTD = jnp.where(at.valid_TB.T[..., None], x_BTD, 0)
        x_BTD = dropout(
            x_BTD.astype(self.dtype), config.input_dropout, fold(key, INPUT_KEY)
        )
        memory, seen, rows = state.memory, None, {}
        if attending:
            self._check_length(T)
            seen = single_head.seen(memory, resets_BT, lengths, T, config.window)
            rows = dict(zip(attending, memory.rows, strict=True))
        segment = Segment(at, seen, memory.next_B if attending else None)
        h, c, kept = [], [], []
        for k in range(config.n_layer):
            rows_BPD = rows.get(k)
            if rows_BPD is not None:
                rows_BPD = rows_BPD.astype(self.dtype)
                # Only a reset makes slots hidden that may have come from elsewhere.
                if resets_BT is not None:
                    rows_BPD = single_head.repaired(rows_BPD)
            block = Block(config, self.dtype, k in attending, name=f"block_{k}")
            with watching.inside(k):
                x_BTD, h_BD, c_BD, rows_BPD = block(
                    x_BTD,
                    state.lstm.h[k],
                    state.lstm.c[k],
                    rows_BPD,
                    segment,
                    fold(key, BLOCK_KEY + k),
                )
            h.append(h_BD)
            c.append(c_BD)
            kept += [rows_BPD] if k in attending else []
        x_BTD = dropout(x_BTD, config.dropout, fold(key, OUTPUT_KEY))
        if attending:
            memory = single_head.after(memory, tuple(kept), seen, resets_BT)
        return x_BTD, State(LSTMState(tuple(h), tuple(c)), memory), Aux(0.0, {})

    def _check_length(self, T: int):
        P, longest = self.config.memory_length, self.config.longest_segment
        if T > longest:
            within = "" if longest == P else f" and config.model.window={P - longest}"
            raise UserError(
                f"a segment of {T} tokens, but config.model.memory_length={P}{within}: "
                f"memory and segment together hold no more, so it has at most {longest}"
            )
