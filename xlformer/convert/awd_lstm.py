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
from typing import Any, NamedTuple

import jax
import numpy as np

from xlformer import models
from xlformer.errors import UserError, some
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


class Entry(NamedTuple):
    """An array of the original: its name, where it lies in our tree, and its shape.

    Attributes:
      name: in the original's state dict.
      path: in our tree.
      shape: there.
      gates: whether its rows are the units of four gates, [4 N, ...], and our gates and
        units its last axes, [..., 4, N].
      reverse: whether its rows stand the other way round.
      tied: whether another entry holds the same numbers.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    gates: bool = False
    reverse: bool = False
    tied: bool = False

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        if self.gates:
            return x.T.reshape(*x.shape[1:], 4, x.shape[0] // 4)
        return x[::-1] if self.reverse else x

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        if self.gates:
            return x.reshape(*x.shape[:-2], -1).T
        return x[::-1] if self.reverse else x


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
    entries = list(_entries(config))
    _check(config, state, entries)
    dtype = np.result_type(*state.values())
    shapes = jax.eval_shape(models.build(config).init, jax.random.key(0))
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, dtype), shapes)
    for entry in entries:
        if entry.name in state and not entry.tied:
            _leaf(tree, entry.path)[...] = entry.to_ours(state[entry.name])
    return config, tree


def to_awd_lstm(config: LSTMConfig, tree) -> dict[str, np.ndarray]:
    """The inverse of from_awd_lstm, for any tree shaped like params, gradients too.

    Tied arrays appear under both names.
    """
    return {
        entry.name: entry.to_theirs(np.asarray(_leaf(tree, entry.path)))
        for entry in _entries(config)
    }


def _leaf(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def _entries(config: LSTMConfig) -> Iterator[Entry]:
    V, widths = config.vocab_size, config.widths
    table = ("embedding", "table")
    yield Entry("encoder.weight", table, (V, widths[0]))
    for k, (D, N) in enumerate(zip(widths, widths[1:], strict=False)):
        for theirs, ours, shape in (
            ("weight_ih_l0", "input_kernel", (4 * N, D)),
            ("weight_hh_l0", "hidden_kernel", (4 * N, N)),
            ("bias_ih_l0", "input_bias", (4 * N,)),
            ("bias_hh_l0", "hidden_bias", (4 * N,)),
        ):
            path = ("trunk", f"lstm_{k}", ours)
            yield Entry(f"rnns.{k}.{theirs}", path, shape, gates=True)
    tied, shape = config.tie_weights, (V, widths[-1])
    path = table if tied else ("softmax", "table")
    yield Entry("decoder.weight", path, shape, tied=tied)
    yield Entry("decoder.bias", ("softmax", "bias"), (V,))
    if tails := len(config.cutoffs):
        # It reads the tombstone of tail k from column -k of the head.
        kernel = ("softmax", "cluster_kernel")
        shape = (tails, widths[-1])
        yield Entry("criterion.tail_vectors", kernel, shape, reverse=True)
        bias = ("softmax", "cluster_bias")
        yield Entry("criterion.tail_bias", bias, (tails,), reverse=True)


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
        _required(state, name)
    n_layer = _n_layer(state)
    vocab_size, d_model = _matrix(state, "encoder.weight")
    last = _matrix(state, f"rnns.{n_layer - 1}.weight_hh_l0")[1]
    tied = _tied(state, hparams)
    fields = {ours: hparams.get(name, 0.0) for name, ours in RATES.items()}
    config = LSTMConfig(
        vocab_size=vocab_size,
        n_layer=n_layer,
        d_model=d_model,
        # The one layer of a tied model is not of this width.
        d_hidden=_matrix(state, "rnns.0.weight_hh_l0")[1] if n_layer > 1 else last,
        tie_weights=tied,
        cutoffs=_splits(state, hparams, vocab_size),
        **fields,
    )
    said = {"n_token": "vocab_size", "ninp": "d_model", "n_layer": "n_layer"}
    said |= {"nhid": "d_hidden"} if n_layer > 1 or not tied else {}
    for name, ours in said.items():
        found = getattr(config, ours)
        if hparams.get(name, found) != found:
            raise UserError(
                f"hparams: {name}={hparams[name]!r:.50}, the state has {found}"
            )
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


def _required(state: dict, name: str) -> np.ndarray:
    if name not in state:
        raise UserError(f"the state dict lacks {name!r}")
    return state[name]


def _matrix(state: dict, name: str) -> tuple[int, int]:
    x = _required(state, name)
    if x.ndim != 2:
        raise UserError(f"{name} has shape {x.shape}, expected a matrix")
    return x.shape


def _check(config: LSTMConfig, state: dict, entries: list[Entry]) -> None:
    known = {entry.name for entry in entries}
    for entry in entries:
        if entry.tied and entry.name not in state:
            continue
        found = _required(state, entry.name)
        if found.shape != entry.shape:
            raise UserError(
                f"{entry.name} has shape {found.shape}, expected {entry.shape}"
            )
        if not np.issubdtype(found.dtype, np.floating):
            raise UserError(f"{entry.name} holds {found.dtype}, expected floats")
    if unexpected := sorted(set(state) - known):
        raise UserError(f"the state dict has unexpected names: {some(unexpected)}")
