"""FLOPs by arithmetic against those that XLA finds in the program of a small model."""

import jax
import pytest

from xlformer import config as config_lib
from xlformer import models

B, T = 4, 32


def small(**fields):
    config = config_lib.load("quickstart:debug")
    config.model.update(n_layer=2, d_model=256, n_head=4, d_head=64, d_inner=512)
    config.model.update(memory_length=48, attention="xla", dtype="float32", **fields)
    return models.build(config.model, vocab_size=512)


def counted(model) -> float:
    """Ours, with all keys for all queries: that is what 'xla' computes."""
    found = model.flops(batch_size=B, segment_length=T)
    seen = sum(range(49, 49 + T))  # keys of the queries, each its own included
    return found.forward + found.attention * (T * (48 + T) / seen - 1)


def by_xla(model) -> float:
    """Of the program before it is optimized; elementwise operations count there too."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(lambda: model.init_state(B))
    tokens_BT = jax.ShapeDtypeStruct((B, T), "int32")
    lowered = jax.jit(model.apply).lower(params, tokens_BT, tokens_BT, state)
    return lowered.cost_analysis()["flops"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"positions": "rotary"},
        {"attn_type": 1, "table_length": 80},
        {"gate": "gru"},
        {"attn_type": 2, "allow_incoherent_positions": True},
    ],
    ids=["relative", "rotary", "learned", "gated", "sinusoid"],
)
def test_forward_is_what_xla_counts(fields):
    model = small(**fields)
    assert 1 < by_xla(model) / counted(model) < 1.02


def test_rotary_positions_need_no_products_of_their_own():
    plain, rotary = small(), small(positions="rotary")
    sizes = {"batch_size": B, "segment_length": T}
    a, b = (m.flops(**sizes) for m in (plain, rotary))
    assert b.positions == 0 and b.attention == a.attention * 2 / 3
    saved = by_xla(plain) - by_xla(rotary)
    assert saved == pytest.approx(counted(plain) - counted(rotary), rel=0.05)
