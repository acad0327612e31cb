"""One layer of the Performer, and the attention that each mechanism puts into it."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from xlformer.kernels import linear_attention, published
from xlformer.kernels.call import OUTPUT_NAME
from xlformer.kernels.dropout import fold
from xlformer.kernels.features import Features
from xlformer.kernels.relative_attention import visible_attention
from xlformer.kernels.visibility import Visibility
from xlformer.layers import linformer, lsh, positions
from xlformer.layers import memory as memory_lib
from xlformer.layers.attention import LEARNED_ABSOLUTE, Attention
from xlformer.layers.feed_forward import FeedForward, LayerNorm
from xlformer.models.performer.config import (
    FAVOR,
    IDENTITY,
    LINFORMER,
    LSH,
    SOFTMAX,
    PerformerConfig,
)
from xlformer.sharding import constrain

# Logical axes of the parameters: see models.parameters.param_axes.
PARAM_AXES = {
    "layers/length_keys": ("embed", None),
    "layers/length_values": ("embed", None),
}
# The two sides of these matrices: see models.sides.
MATRICES = dict.fromkeys(PARAM_AXES, ((0,), (1,)))


class Segment(NamedTuple):
    """What every layer has to know of a segment.

    Attributes:
      start_BT: the first position that each one may see, an index into the segment; -1
        is also what the sums hold. Never decreasing; None hides nothing.
      valid_BT: False is padding, on the right; None without.
      table_BTK: the sinusoids of the positions by which queries and keys are turned,
        [1 or B, T, K]; None where positions are not rotary.
      hash_B: a key a row, of the hashes of lsh; None for others.
    """

    start_BT: Any
    valid_BT: Any
    table_BTK: Any
    hash_B: Any

    def visibility(self, causal: bool) -> Visibility:
        start_BT = self.start_BT
        return Visibility(
            None, None if start_BT is None else jnp.maximum(start_BT, 0), causal
        )


class Own(NamedTuple):
    """What a layer has of its own beside its parameters.

    Attributes:
      index: its number.
      projection_MK: of the features; None where nothing is projected.
      sums: linear_attention.Sums of all that came before; None where nothing is
        carried.
    """

    index: Any
    projection_MK: Any = None
    sums: Any = None


class Layer(nn.Module):
    """Attention and the feed-forward network, each after a norm, with residuals."""

    config: PerformerConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD, segment: Segment, own: Own, key=None):
        """(The layer's output, its new sums or None.)"""
        config = self.config
        keys = [fold(key, i) for i in range(4)]
        attend = {
            FAVOR: self._favor,
            SOFTMAX: self._softmax,
            LSH: self._lsh,
            LINFORMER: self._linformer,
            IDENTITY: lambda q, k, v, *_: (v, None),
        }[config.mechanism]

        def turned(q_BTHK, _, k_BTHK, v_BTHK):
            if segment.table_BTK is not None:
                with jax.named_scope("positions"):
                    q_BTHK, k_BTHK = (
                        positions.rotate(x, segment.table_BTK) for x in (q_BTHK, k_BTHK)
                    )
            with jax.named_scope(config.mechanism):
                y_BTHK, kept = attend(q_BTHK, k_BTHK, v_BTHK, segment, own, keys[0])
            return checkpoint_name(y_BTHK, OUTPUT_NAME), kept

        # A hidden NaN would still spoil a sum over values: see layers/memory.py.
        seen_BTD, bad_BT = memory_lib.finite(x_BTD)
        if segment.valid_BT is not None:
            bad_BT &= segment.valid_BT
        z_BTD = LayerNorm(config.norm_epsilon, name="attention_norm")(seen_BTD)
        more_BTD, sums = self._attention()(
            z_BTD, z_BTD, None, keys=(None, keys[1]), attend=turned
        )
        # A query that does see such a vector gives NaN, as if nothing were hidden.
        sees_BT = bad_BT
        if config.mechanism != IDENTITY:
            visibility = segment.visibility(config.causal)
            sees_BT = visibility.sees(bad_BT, x_BTD.shape[1])
        y_BTD = x_BTD + jnp.where(sees_BT[..., None], jnp.nan, more_BTD)
        if sums is not None:
            sums = _spoilt(sums, sees_BT[:, -1])
        network = FeedForward(
            config.d_inner,
            config.dropout,
            nn.initializers.normal(config.init_std),
            self.dtype,
            name="feed_forward",
        )
        z_BTD = LayerNorm(config.norm_epsilon, name="norm")(y_BTD)
        y_BTD = y_BTD + network(z_BTD, keys[2:])
        return constrain(y_BTD, "batch", None, None), sums

    def _attention(self):
        config = self.config
        return Attention(
            n_head=config.n_head,
            d_head=config.head_width,
            attn_type=LEARNED_ABSOLUTE,  # nothing is left for it to do
            own_biases=False,
            table_length=0,
            clamp_length=0,
            dropout=config.dropout,
            attention_dropout=0.0,
            kernel_init=nn.initializers.normal(config.init_std),
            dtype=self.dtype,
            name="attention",
        )

    # Mechanisms -----------------------------------------------------------------------
    #
    # Each gets queries that are divided by sqrt(K) already, as softmax wants them.

    def _favor(self, q_BTHK, k_BTHK, v_BTHK, segment: Segment, own: Own, key):
        config, K = self.config, self.config.head_width
        options: dict[str, Any] = {
            "start_BT": segment.start_BT,
            "valid_BT": segment.valid_BT,
            "causal": config.causal,
        }
        if config.stabiliser != "running":
            original = published.Original(
                feature_epsilon=config.epsilon,
                renormaliser=config.delta,
                maxima=config.maxima,
                scaled=config.estimates,
            )
            arrays = q_BTHK * K**0.5, k_BTHK, v_BTHK
            arguments = *arrays, config.features, own.projection_MK, original
            return published.attention(*arguments, **options), None
        # exp(q.k) of two vectors that are each divided by K^(1/4); other kernels are of
        # q and k as they are (Google's).
        scale = K**-0.25 if config.estimates else 1.0
        y_BTHK, sums = linear_attention.linear_attention(
            q_BTHK * (K**0.5 * scale),
            k_BTHK * scale,
            v_BTHK,
            Features(config.features, config.epsilon),
            own.projection_MK,
            sums=own.sums,
            **options,
        )
        if not config.carries:
            return y_BTHK, None
        # Each device has those of its own rows and heads.
        return y_BTHK, jax.tree.map(
            lambda x: constrain(x, "batch", "heads", *(None,) * (x.ndim - 2)), sums
        )

    def _softmax(self, q_BTHK, k_BTHK, v_BTHK, segment: Segment, own: Own, key):
        config, visibility = self.config, segment.visibility(self.config.causal)
        turn_B = None
        if not config.causal and segment.valid_BT is not None:
            # Only what comes before a position can be hidden, by where it begins to
            # see. So the padding is turned round to the front.
            T = q_BTHK.shape[1]
            turn_B = T - segment.valid_BT.sum(1)
            q_BTHK, k_BTHK, v_BTHK = (
                memory_lib.turned(x, turn_B) for x in (q_BTHK, k_BTHK, v_BTHK)
            )
            # No position begins to see after itself; what padding sees does not matter.
            start_BT = jnp.minimum(turn_B[:, None], jnp.arange(T)[None])
            visibility = Visibility(None, start_BT, causal=False)
        y_BTHK = visible_attention(
            q_BTHK,
            None,
            k_BTHK,
            v_BTHK,
            None,
            visibility,
            dropout_rate=config.attention_dropout,
            dropout_key=key,
            implementation=config.attention,
        )
        return (y_BTHK if turn_B is None else memory_lib.turned(y_BTHK, -turn_B)), None

    def _lsh(self, q_BTHK, k_BTHK, v_BTHK, segment: Segment, own: Own, key):
        config, K = self.config, self.config.head_width
        rotations_BHKRN = lsh.rotations(
            fold(segment.hash_B, own.index),
            config.n_head,
            K,
            config.rounds,
            config.buckets,
            q_BTHK.dtype,
        )
        options = lsh.Lsh(
            config.chunk,
            causal=config.causal,
            after=0 if config.causal else 1,
            scaling=config.scaling,
            same_bucket_only=config.same_bucket_only,
            discount_duplicates=config.discount_duplicates,
        )
        # Queries are keys: what was learnt as the projection of keys is not read.
        y_BTHK = lsh.lsh_attention(
            q_BTHK * K**0.5,
            v_BTHK,
            rotations_BHKRN,
            options,
            buckets=config.buckets,
            valid_BT=segment.valid_BT,
        )
        return y_BTHK, None

    def _linformer(self, q_BTHK, k_BTHK, v_BTHK, segment: Segment, own: Own, key):
        config = self.config
        shape = config.context_length, config.projection_length
        # As in the paper: N(0, 1/k), so that lengths are kept.
        normal = nn.initializers.normal(config.projection_length**-0.5)
        # Rows of all positions are read at once, so that each device gathers them.
        e_NP, f_NP = (
            constrain(self.param(name, normal, shape).astype(self.dtype), None, None)
            for name in ("length_keys", "length_values")
        )
        if config.share_kv:
            v_BTHK, f_NP = k_BTHK, e_NP
        y_BTHK = linformer.linformer_attention(
            q_BTHK, k_BTHK, v_BTHK, e_NP, f_NP, valid_BT=segment.valid_BT
        )
        return y_BTHK, None


def _spoilt(sums, bad_B):
    """Sums that are NaN in the rows whose last position sees one."""
    scale_BH = jnp.where(bad_B[:, None], jnp.nan, sums.scale_BH)
    return sums._replace(scale_BH=scale_BH)
