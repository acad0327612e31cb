"""The argument names of the PyTorch original, as a configuration of ours, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xlformer.errors import UserError
from xlformer.layers.attention import (
    LEARNED_ABSOLUTE,
    LEARNED_RELATIVE,
    RELATIVE,
    SINUSOID,
)
from xlformer.models import TransformerXLConfig

ABSOLUTE = (SINUSOID, LEARNED_ABSOLUTE)
INTEGERS = ("n_token", "n_layer", "n_head", "d_model", "d_head", "d_inner", "d_embed")
INTEGERS += ("tgt_len", "ext_len", "mem_len", "clamp_len", "attn_type", "div_val")

LENGTHS = ("tgt_len", "ext_len", "mem_len")
# Of a segment and of a memory, whose positions a model computes before anything else;
# the longest published memory has 3,800.
MOST_TOKENS = 1 << 18


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


def of_config(config: TransformerXLConfig, segment_length: int) -> dict[str, Any]:
    """The arguments of the original's model, the inverse of to_config.

    Raises UserError for what the original computes otherwise, or not at all.
    """
    found = shared(config, "the original")
    require(config, "the original", norm_epsilon=1e-5)
    if config.memory_length:
        require(config, "the original", attend_zero_memory=False)
        if config.attn_type in ABSOLUTE:
            raise UserError(
                f"config.model.memory_length={config.memory_length} with attn_type="
                f"{config.attn_type}: the original adds its positions to the memory in "
                "each segment anew"
            )
        if config.extended_length:
            raise UserError(
                f"config.model.extended_length={config.extended_length} with "
                f"memory_length={config.memory_length}: the original forgets other "
                "positions then, as it passes two lengths in the wrong order"
            )
    if config.attn_type == RELATIVE:
        require(config, "the original", untie_r=False)
    if config.attn_type in (LEARNED_RELATIVE, LEARNED_ABSOLUTE):
        # Its tables have a row for each key, so that the segment says their length.
        segment_length = (
            config.table_length - config.extended_length - config.memory_length
        )
        if segment_length < 1:
            raise UserError(
                f"config.model.table_length={config.table_length} leaves no segment of "
                "the original, whose tables have tgt_len + ext_len + mem_len rows"
            )
    return {
        "n_token": config.vocab_size,
        "tie_weight": config.tie_weights,
        "tgt_len": segment_length,
        "ext_len": config.extended_length,
        **found,
    }


def shared(config: TransformerXLConfig, program: str) -> dict[str, Any]:
    """What the original and Hugging Face's model name alike.

    program: names it in errors. Raises UserError for what neither has.
    """
    bins = config.bins
    if not config.proj_same_dim and config.div_val > 1:
        if any(bins.width(b) == config.d_model for b in range(bins.n_tail + 1)):
            require(config, program, proj_same_dim=True)
    if config.attention_window not in (None, config.memory_length - 1):
        raise UserError(
            f"config.model.window={config.window} with memory_length="
            f"{config.memory_length}: {program} shows memory_length keys or all"
        )
    return {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "d_model": config.d_model,
        "d_head": config.head_width,
        "d_inner": config.d_inner,
        "d_embed": config.embedding_width,
        "mem_len": config.memory_length,
        "attn_type": config.attn_type,
        "pre_lnorm": config.pre_norm,
        "clamp_len": config.clamp_length or -1,
        "same_length": config.attention_window is not None,
        "dropout": config.dropout,
        "dropatt": config.attention_dropout,
        "cutoffs": list(config.cutoffs),
        "div_val": config.div_val,
        "tie_projs": list(config.tie_projections or (False,) * (bins.n_tail + 1)),
    }


def require(config, program: str, **fields) -> None:
    """Raises UserError where a field of a config has another value than these."""
    for field, only in fields.items():
        value = getattr(config, field)
        if value != only:
            raise UserError(
                f"config.model.{field}={value!r}: {program} has none such, it has "
                f"{only!r}"
            )


def _checked(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """hparams with values of the right type; those that are None are left out."""
    found = {name: x for name, x in hparams.items() if x is not None}
    for name in INTEGERS:
        # Not isinstance: JSON's true is an int in Python.
        if name in found and type(found[name]) is not int:
            raise UserError(f"hparams: {name}={found[name]!r:.50} is no whole number")
        if name in LENGTHS and found.get(name, 0) > MOST_TOKENS:
            line = f"{found[name]!r:.50} is more than the {MOST_TOKENS} that are taken"
            raise UserError(f"hparams: {name}={line}")
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
