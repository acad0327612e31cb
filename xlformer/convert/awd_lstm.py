"""Weights of AWD-LSTM's PyTorch program, to and fro.

    config, params = from_awd_lstm(state, hparams)
    state = to_awd_lstm(config, params)

Names are those of its state dict, with its criterion's under `criterion.`:

    encoder.weight, decoder.weight, decoder.bias
    rnns.L.weight_ih_l0, rnns.L.weight_hh_l0, rnns.L.bias_ih_l0, rnns.L.bias_hh_l0
    criterion.tail_vectors, criterion.tail_bias     the split softmax's

A model trained with wdrop has rnns.L.module.NAME for each of these names, and the
recurrent weights as weight_hh_l0_raw. Beside them PyTorch may have kept weight_hh_l0,
which is what the last step left of them: the raw ones count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from xlformer.convert.entries import Entry, check, fill, lstm, matrix, required, said
from xlformer.errors import UserError
from xlformer.models import LSTMConfig

# What a run of the original is given, and our name for it.
RATES = {
    "dropout": "dropout",
    "dropouth": "hidden_dropout",
    "dropouti": "input_dropout",
    "dropoute": "word_dropout",
    "wdrop": "weight_dropout",
    "alpha": "activation_penalty",
    "beta": "temporal_penalty",
}
# Nine digits at most: Python reads no number of thousands of them.
LAYER = re.compile(r"rnns\.(\d{1,9})\.(module\.)?(\w+?)(_raw)?$")


def from_awd_lstm(
    state: Mapping[str, np.ndarray], hparams: Mapping[str, Any] | None = None
) -> tuple[LSTMConfig, dict]:
    """Reads a state dict of AWD-LSTM.

    Args:
      state: names to numpy arrays; their dtype is kept.
      hparams: the original's argument names to values. Shapes say what n_token, ninp,
        nhid, n_layer and tied are, so that these need not be given; needed are `splits`
        where there are tails. Rates of dropout, alpha and beta are taken over, else 0.
        Others are ignored.

    Returns:
      The configuration and the parameters, for models.build(config).

    Raises:
      UserError: a name is missing or too many, or a shape does not fit.
    """
    state = _plain_names({name: np.asarray(x) for name, x in state.items()})
    config = _config(state, {k: x for k, x in (hparams or {}).items() if x is not None})
    return config, fill(config, state, check(state, _entries(config), "expected"))


def to_awd_lstm(config: LSTMConfig, tree) -> dict[str, np.ndarray]:
    """The inverse of from_awd_lstm, for any tree shaped like params, gradients too.

    Tied arrays appear under both names.
    """
    return {entry.name: entry.of(tree) for entry in _entries(config)}


def _entries(config: LSTMConfig) -> Iterator[Entry]:
    V, widths = config.vocab_size, config.widths
    table = ("embedding", "table")
    yield Entry("encoder.weight", table, ..., (V, widths[0]))
    for k, (D, N) in enumerate(zip(widths, widths[1:], strict=False)):
        yield from lstm(f"rnns.{k}", ("trunk", f"lstm_{k}"), D, N)
    tied, shape = config.tie_weights, (V, widths[-1])
    path = table if tied else ("softmax", "table")
    yield Entry("decoder.weight", path, ..., shape, tied=tied)
    yield Entry("decoder.bias", ("softmax", "bias"), ..., (V,))
    if tails := len(config.cutoffs):
        # It reads the tombstone of tail k from column -k of the head.
        order = slice(None, None, -1)
        kernel, shape = ("softmax", "cluster_kernel"), (tails, widths[-1])
        yield Entry("criterion.tail_vectors", kernel, order, shape)
        bias = ("softmax", "cluster_bias")
        yield Entry("criterion.tail_bias", bias, order, (tails,))


def _plain_names(state: dict) -> dict:
    """The state as a model without weight drop would have it."""
    plain, raw = {}, {}
    for name, x in state.items():
        found = LAYER.fullmatch(name)
        if found is None:
            plain[name] = x
            continue
        layer, _, part, is_raw = found.groups()
        (raw if is_raw else plain)[f"rnns.{layer}.{part}"] = x
    return plain | raw


def _config(state: dict, hparams: dict) -> LSTMConfig:
    """What the shapes say, and of the hparams what they cannot say."""
    for name in ("encoder.weight", "rnns.0.weight_hh_l0", "decoder.bias"):
        required(state, name)
    n_layer = _n_layer(state)
    vocab_size, d_model = matrix(state, "encoder.weight")
    last = matrix(state, f"rnns.{n_layer - 1}.weight_hh_l0")[1]
    tied = _tied(state, hparams)
    fields = {ours: hparams.get(name, 0.0) for name, ours in RATES.items()}
    config = LSTMConfig(
        vocab_size=vocab_size,
        n_layer=n_layer,
        d_model=d_model,
        # The one layer of a tied model is not of this width.
        d_hidden=matrix(state, "rnns.0.weight_hh_l0")[1] if n_layer > 1 else last,
        tie_weights=tied,
        cutoffs=_splits(state, hparams, vocab_size),
        **fields,
    )
    names = {"n_token": "vocab_size", "ninp": "d_model", "n_layer": "n_layer"}
    names |= {"nhid": "d_hidden"} if n_layer > 1 or not tied else {}
    said(config, hparams, names)
    return config


def _n_layer(state: dict) -> int:
    """How many layers there are, which must be 0, 1, ...: none may be left out."""
    found = {int(m[1]) for m in map(LAYER.fullmatch, state) if m}
    for layer in range(len(found)):
        # One name with a large number in it would else ask for a list of as many.
        if layer not in found:
            raise UserError(
                f"the state dict lacks rnns.{layer}, but has rnns.{max(found)}"
            )
    return len(found)


def _tied(state: dict, hparams: dict) -> bool:
    """Whether the softmax uses the embeddings, which shapes alone do not tell."""
    encoder, decoder = state["encoder.weight"], state.get("decoder.weight")
    equal = decoder is None or (
        decoder.shape == encoder.shape and np.array_equal(decoder, encoder)
    )
    tied = hparams.get("tied", equal)
    if not isinstance(tied, bool):
        raise UserError(f"hparams: tied={tied!r:.50} is neither true nor false")
    if tied and not equal:
        raise UserError(
            "decoder.weight is tied in the hparams but differs from encoder.weight"
        )
    if not tied and decoder is None:
        raise UserError("the state dict lacks 'decoder.weight', and tied is false")
    return tied


def _splits(state: dict, hparams: dict, vocab_size: int) -> tuple[int, ...]:
    splits = hparams.get("splits", ())
    if not isinstance(splits, list | tuple) or any(type(x) is not int for x in splits):
        raise UserError(f"hparams: splits={splits!r:.50} is not a list of ids")
    tails = np.size(state.get("criterion.tail_bias", ()))
    if len(splits) != tails:
        raise UserError(
            f"hparams: splits={list(splits)} make {len(splits)} tails, but "
            f"criterion.tail_bias has {tails}"
        )
    return tuple(splits)
