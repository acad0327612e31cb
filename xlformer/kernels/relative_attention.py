"""The one attention operation of Transformer-XL, and the choice of its implementation.

Score of query t and key s, at distance d = t + M - s with M = S - T:

    qu_t . k_s + qw_t . r_d            (Dai et al. 2019, section 3.3: (a)+(c), (b)+(d))

qu and qw come biased (q + u, q + v of the paper) AND scaled by 1/sqrt(d_head), so the
gradients of q, u and v fall out of autodiff outside of any kernel.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from xlformer.errors import UserError, did_you_mean
from xlformer.kernels import (
    blocked,
    pallas_gpu_tiles,
    pallas_tpu_tiles,
    watching,
    xla,
)
from xlformer.kernels.call import OUTPUT_NAME, Call
from xlformer.kernels.dropout import seeds
from xlformer.kernels.visibility import Visibility

IMPLEMENTATIONS = ("xla", "blocked", "pallas_tpu", "pallas_gpu")
REFUSALS = {
    "pallas_tpu": pallas_tpu_tiles.refusal,
    "pallas_gpu": pallas_gpu_tiles.refusal,
}
# A kernel's tile has 128 queries on a TPU: with fewer than 64 of them more than half
# of its work would be thrown away.
FEW_QUERIES = 64

_log = logging.getLogger(__name__)


def relative_attention(
    qu_BTHK: jax.Array,
    qw_BTHK: jax.Array | None,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    r_SHK: jax.Array | None,
    *,
    window: int | None = None,
    key_start_BT: jax.Array | None = None,
    causal: bool = True,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Multi-head attention over [memory; segment] with relative positions.

    Args:
      qu_BTHK: content queries, biased and scaled.
      qw_BTHK: position queries, biased and scaled; its K may differ from that of qu (a
        column of ones beside a column of r is a bias per distance). None without r.
      k_BSHK, v_BSHK: keys and values, oldest first; the last T are the segment's own.
      r_SHK: row d belongs to distance d, ascending; None for attention without
        relative positions. With causal=False there are T-1 more rows in front, for the
        distances -(T-1) to -1.
      window, key_start_BT, causal: what each query sees; see Visibility.
      dropout_rate: rate of dropout on the attention probabilities. All implementations
        drop the same ones.
      dropout_key: a jax.random key, or one for each row, [B]; None switches it off.
      implementation: 'auto' or a name of IMPLEMENTATIONS.

    Returns:
      The attended values [B, T, H, K] in the dtype of v.

    Raises:
      UserError: an implementation that is unknown, or cannot run this here.
    """
    return visible_attention(
        qu_BTHK,
        qw_BTHK,
        k_BSHK,
        v_BSHK,
        r_SHK,
        Visibility(window, key_start_BT, causal),
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        implementation=implementation,
    )


def visible_attention(
    qu_BTHK: jax.Array,
    qw_BTHK: jax.Array | None,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    r_SHK: jax.Array | None,
    visibility: Visibility,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """relative_attention, for callers that hold a Visibility."""
    B, T, H, _ = qu_BTHK.shape
    S = k_BSHK.shape[1]
    if (qw_BTHK is None) != (r_SHK is None):
        raise ValueError("pass both qw_BTHK and r_SHK, or neither")
    rows = S if visibility.causal else S + T - 1
    if r_SHK is not None and r_SHK.shape[0] != rows:
        raise ValueError(f"r_SHK has {r_SHK.shape[0]} rows, expected {rows}")
    watching.tell(lambda: _by_distance(qu_BTHK, qw_BTHK, k_BSHK, r_SHK, visibility))
    # A rate without a key is evaluation. It is set to 0 before the Call is made, so
    # that evaluation shares the choice and the kernels of a model without dropout.
    if dropout_key is None:
        dropout_rate = 0.0
    call = Call.of(qu_BTHK, k_BSHK, v_BSHK, r_SHK, visibility, dropout_rate)
    if implementation == "auto":
        implementation = choose(call, platform())
    elif implementation not in IMPLEMENTATIONS:
        near = did_you_mean(implementation, ["auto", *IMPLEMENTATIONS])
        raise UserError(f"config.model.attention={implementation!r}{near}")
    elif implementation in REFUSALS:
        why_not = REFUSALS[implementation](call, platform())
        if why_not:
            raise UserError(f"config.model.attention={implementation!r}: {why_not}")
    # By this name a profile and the compiled text show which implementation ran.
    with jax.named_scope(f"relative_attention_{implementation}"):
        y_BTHK = _module(implementation).attention(
            qu_BTHK,
            qw_BTHK,
            k_BSHK,
            v_BSHK,
            r_SHK,
            visibility,
            dropout_rate=dropout_rate,
            seeds_BH2=seeds(dropout_key, B, H) if dropout_rate else None,
        )
    # The fused kernels name their output themselves, and beside it the softmax's sums,
    # which their backward pass needs as well.
    if implementation in REFUSALS:
        return y_BTHK
    return checkpoint_name(y_BTHK, OUTPUT_NAME)


def _by_distance(qu_BTHK, qw_BTHK, k_BSHK, r_SHK, visibility) -> watching.ByDistance:
    """The weights themselves, [B, H, T, S]: for who looks at a small part of a text."""
    T, S = qu_BTHK.shape[1], k_BSHK.shape[1]
    scores_BHTS = xla.scores(qu_BTHK, qw_BTHK, k_BSHK, r_SHK)
    mask = visibility.mask(np.arange(T), np.arange(S), S - T)
    p_BHTS = jax.nn.softmax(jnp.where(mask, scores_BHTS, -jnp.inf), axis=-1)
    return watching.by_distance(p_BHTS, mask, watching.pairs(T, S))


def _module(implementation: str):
    """Pallas is imported where it is used: 0.17 s of every start (2 CPU cores)."""
    if implementation == "pallas_tpu":
        from xlformer.kernels import pallas_tpu

        return pallas_tpu
    if implementation == "pallas_gpu":
        from xlformer.kernels import pallas_gpu

        return pallas_gpu
    return {"xla": xla, "blocked": blocked}[implementation]


def platform() -> str:
    """The platform of the mesh to compile for, whose machines may not be here.

    `xlformer.plan` compiles for TPUs and GPUs on a machine that has neither.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def choose(call: Call, platform: str) -> str:
    """The implementation that 'auto' stands for; logs each choice once."""
    # Measured on 2 CPU cores (float32, forward and backward, against the paper's form):
    # at T = M of 256 and 512 `blocked` takes 0.59 to 0.77 of the time, at T = 128, with
    # chunks of 64, 0.95 to 1.24.
    name, why = "xla", f"{call.T} queries are fewer than two chunks"
    if call.T >= 2 * blocked.CHUNK_SIZE:
        name, why = "blocked", "chunks of queries skip keys out of sight"
        # Chunks would leave nothing out then.
        if call.visibility.keys_seen(call.T, call.S).min() == call.S:
            name, why = "xla", "every query sees every key"
    fused = f"pallas_{platform}"
    if fused in REFUSALS:
        refused = REFUSALS[fused](call, platform)
        # What `auto` avoids below runs all the same where a person asks for it by name:
        # it is slow, not wrong.
        if call.T < FEW_QUERIES:
            refused = f"{call.T} queries are too few for a tile"
        if platform == "gpu" and call.dtype == "float32":
            refused = "in float32 only tiles of 32 fit the registers"
        if refused:
            why += f"; not {fused}: {refused}"
        elif _works(fused, call):
            name, why = fused, "scores stay on the chip"
        else:
            name, why = "blocked", f"{fused} does not work"
    _say(name, f"{call.T} queries, {call.S} keys on {platform}: {why}")
    return name


# Each layer of each program that is traced asks again; the log has one line.
@functools.cache
def _say(name: str, why: str) -> None:
    _log.info("attention=auto is %r for %s", name, why)


@functools.cache
def _works(fused: str, call: Call) -> bool:
    """Whether the kernel compiles here and does what it should; warns if not.

    Asked while tracing, because a failure inside of the whole program comes too late.
    """
    try:
        _module(fused).try_out(call)
    # Whatever the compiler raises, there is another way to compute the same.
    except Exception as error:
        line = (str(error).strip() or repr(error)).splitlines()[0][:200]
        _log.warning(
            "attention=auto: the fused kernel does not work for %s; 'blocked' runs "
            "instead, which moves several times the bytes: %s",
            call,
            line,
        )
        return False
    return True
