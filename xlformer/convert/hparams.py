"""The argument names of the PyTorch original, as a configuration of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xlformer.errors import UserError
from xlformer.layers.attention import LEARNED_ABSOLUTE, LEARNED_RELATIVE, SINUSOID
from xlformer.models import TransformerXLConfig

ABSOLUTE = (SINUSOID, LEARNED_ABSOLUTE)
INTEGERS = ("n_token", "n_layer", "n_head", "d_model", "d_head", "d_inner", "d_embed")
INTEGERS += ("tgt_len", "ext_len", "mem_len", "clamp_len", "attn_type", "div_val")


def to_config(hparams: Mapping[str, Any], **fields) -> TransformerXLConfig:
    """The configuration that hparams describe; `fields` are what they cannot say.

    Raises UserError for a value that is missing, of a wrong type or impossible.
    """
    hparams = _checked(hparams)
    required = ("n_token", "n_layer", "n_head", "d_model", "d_head", "d_inner")
    missing = [name for name in required if name not in hparams]
    if missing:
        raise UserError(f"hparams lack {', '.join(missing)}")
    vocab_size = hparams["n_token"]
    # The original's modules list the vocabulary's size behind their cutoffs. What is
    # not below it cuts nothing.
    cutoffs = tuple(c for c in hparams.get("cutoffs") or () if c < vocab_size)
    bins = len(cutoffs) + 1
    tied = tuple(map(bool, hparams.get("tie_projs") or ()))
    attn_type = hparams.get("attn_type", 0)
    memory_length = hparams.get("mem_len", 0)
    pre_norm, absolute = bool(hparams.get("pre_lnorm", False)), attn_type in ABSOLUTE
    return TransformerXLConfig(
        vocab_size=vocab_size,
        n_layer=hparams["n_layer"],
        n_head=hparams["n_head"],
        d_model=hparams["d_model"],
        d_head=hparams["d_head"],
        d_inner=hparams["d_inner"],
        # -1 is the original's word for d_model, 0 ours; so is clamp_len=-1 for none.
        d_embed=max(hparams.get("d_embed") or 0, 0),
        memory_length=memory_length,
        extended_length=hparams.get("ext_len", 0),
        attn_type=attn_type,
        pre_norm=pre_norm,
        norm_queries=not (pre_norm and absolute),
        # Learned distances (type 1) have a bias for each layer, whatever untie_r says.
        untie_r=bool(hparams.get("untie_r", False)) or attn_type == LEARNED_RELATIVE,
        clamp_length=max(hparams.get("clamp_len", 0), 0),
        same_length=bool(hparams.get("same_length", False)),
        # Absolute positions with a memory confuse old tokens with new ones (Dai et al.
        # 2019, section 3.3). The original allows it; a config of ours must say so.
        allow_incoherent_positions=absolute and memory_length > 0,
        dropout=hparams.get("dropout", 0.0),
        attention_dropout=hparams.get("dropatt", 0.0),
        cutoffs=cutoffs,
        div_val=hparams.get("div_val", 1),
        tie_weights=bool(hparams.get("tie_weight", True)),
        # One for each bin; a file may list more, or fewer.
        tie_projections=(tied + (False,) * bins)[:bins] if any(tied) else (),
        table_length=_table_length(hparams),
        **fields,
    )


def _checked(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """hparams with values of the right type; those that are None are left out."""
    found = {name: x for name, x in hparams.items() if x is not None}
    for name in INTEGERS:
        # Not isinstance: JSON's true is an int in Python.
        if name in found and type(found[name]) is not int:
            raise UserError(f"hparams: {name}={found[name]!r:.50} is no whole number")
    for name, kinds in (("cutoffs", (int,)), ("tie_projs", (bool, int))):
        value = found.get(name, [])
        if not isinstance(value, list | tuple) or any(
            type(x) not in kinds for x in value
        ):
            raise UserError(f"hparams: {name}={value!r:.50} is not a list of {name}")
    return found


def _table_length(hparams) -> int:
    if hparams.get("attn_type", 0) not in (LEARNED_RELATIVE, LEARNED_ABSOLUTE):
        return 0
    # Its tables have a row for each key that a query may see: max_klen there.
    return sum(hparams.get(name, 0) for name in ("tgt_len", "ext_len", "mem_len"))
