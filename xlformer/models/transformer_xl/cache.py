"""Transformer-XL's memory as cached keys, values and position rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xlformer.layers import cache as cache_lib
from xlformer.layers import memory as memory_lib
from xlformer.layers import positions
from xlformer.layers.attention import LEARNED_RELATIVE, RELATIVE, learned_rows
from xlformer.layers.cache import Cache, Ring
from xlformer.layers.feed_forward import layer_norm
from xlformer.layers.memory import Memory
from xlformer.models.transformer_xl.config import TransformerXLConfig


def to_cache(
    config: TransformerXLConfig, layers, state: Memory, segment_length: int, dtype
) -> Cache | Ring:
    """Projects the memory once for all segments that follow; see Model.to_cache.

    layers: the stacked parameters of all layers.
    """
    with jax.named_scope("to_cache"):
        # Slots that do not count may hold NaN, which a mask does not hide.
        hidden_LBMD = memory_lib.valid_slots(state).hidden_LBMD.astype(dtype)
        keys_LBHMK, values_LBHMK = _keys_values(config, layers, hidden_LBMD)
        S = config.memory_length + segment_length
        r_LSHK = _position_rows(config, layers["attention"], S, dtype)
        cache = Cache(keys_LBHMK, values_LBHMK, r_LSHK, state.length_B)
        return cache_lib.ring(cache) if is_ring(config, segment_length) else cache


def is_ring(config: TransformerXLConfig, segment_length: int) -> bool:
    """Whether a ring serves: for single tokens, all of which enter the memory.

    With extended context a token enters the memory later than it is read, and a memory
    of no slots makes no ring.
    """
    return segment_length == 1 and config.memory_length > 0 == config.extended_length


def axes(config: TransformerXLConfig, segment_length: int) -> Cache | Ring:
    """Logical axis names of what to_cache gives."""
    relative = config.encoding in (RELATIVE, LEARNED_RELATIVE)
    if is_ring(config, segment_length):
        names = cache_lib.RING_AXES
        return names if relative else names._replace(r_LCHK=None)
    names = cache_lib.CACHE_AXES
    return names if relative else names._replace(r_LSHK=None)


def check_call(state: Cache | Ring, T: int, lengths, train: bool) -> None:
    """Raises ValueError where a cached state cannot do what the plain one can."""
    if train:
        raise ValueError("train=True needs the state of init_state, not of to_cache")
    if state.longest is not None and T > state.longest:
        raise ValueError(
            f"a segment of {T} inputs, but the state was made by to_cache(..., "
            f"segment_length={state.longest})"
        )
    if isinstance(state, Ring) and lengths is not None:
        raise ValueError(
            "lengths_B with a state of to_cache(..., segment_length=1): its rows "
            "advance together"
        )


def after_resets(config: TransformerXLConfig, layers, state, resets_BT):
    """The state of rows that are reset before the segment: as `to_cache` of zeros.

    With `attend_zero_memory` the keys and values of zeros are seen. Otherwise old ones
    are masked, and those of a ring are overwritten here, so that no NaN stays behind a
    mask; a Cache takes care of that where it reads them.
    """
    if resets_BT is None or not (config.attend_zero_memory or isinstance(state, Ring)):
        return state
    fresh = jnp.zeros((), state[0].dtype), jnp.zeros((), state[1].dtype)
    if config.attend_zero_memory:
        zeros_LBMD = jnp.zeros((config.n_layer, 1, 1, config.d_model), state[0].dtype)
        fresh = _keys_values(config, layers, zeros_LBMD)
    reset_LBHMK = resets_BT[None, :, :1, None, None]
    # Keys and values are the first two fields of both forms; the others stay.
    kept = [jnp.where(reset_LBHMK, *x) for x in zip(fresh, state, strict=False)]
    return type(state)(*kept, *state[2:])


def _keys_values(config, layers, hidden_LBMD):
    """Keys and values of stored layer inputs, as Layer and Attention project them.

    It does not call those modules, because here all layers are projected at once, and
    nothing but the memory.
    """
    dtype = hidden_LBMD.dtype

    def one(params, hidden_BMD):
        if config.norm_first:
            norm = params["attention_norm"]
            hidden_BMD = layer_norm(
                hidden_BMD, norm["scale"], norm["bias"], config.norm_epsilon
            )
        qkv_DCHK = params["attention"]["qkv"].astype(dtype)
        # 1 and 2 are keys and values; the memory makes no queries.
        return tuple(
            jnp.einsum("BMD,DHK->BHMK", hidden_BMD, qkv_DCHK[:, c]) for c in (1, 2)
        )

    needed = {k: layers[k] for k in ("attention", "attention_norm")}
    return jax.vmap(one)(needed, hidden_LBMD)


def _position_rows(config, attention, S: int, dtype):
    # Without dropout, which the sinusoids have in training: a cache knows none.
    if config.encoding == RELATIVE:
        clamped = positions.distances(S, config.clamp_length)
        r_SD = positions.sinusoid(clamped, config.d_model, dtype)
        position_LDHK = attention["position"].astype(dtype)
        return jnp.einsum("SD,LDHK->LSHK", r_SD, position_LDHK)
    if config.encoding == LEARNED_RELATIVE:
        table_LNHK, bias_LNH = (
            attention[name].astype(dtype) for name in ("distance", "distance_bias")
        )
        return jax.vmap(learned_rows, (0, 0, None, None))(
            table_LNHK, bias_LNH, S, config.clamp_length
        )
    return None
