"""Weights of SHA-RNN's PyTorch program, to and fro.

    config, params = from_sha_rnn(state, hparams)
    state = to_sha_rnn(config, params)

Names are those of its state dict; every one of them has its place in our tree:

    encoder.weight, decoder.weight (tied), decoder.bias
    blocks.K.rnn.weight_ih_l0, .weight_hh_l0, .bias_ih_l0, .bias_hh_l0
    blocks.K.lnstart, lnmid, lnmem, lnout, lnff, lnxff, each with .weight and .bias
    blocks.K.ff.linear1.weight, .bias
    blocks.K.attn.q.weight, .bias, attn.qln.weight, .bias, attn.qs, .ks, .vs
    blocks.K.attn.vq.l1.weight, .bias     until it is collapsed
    blocks.K.attn.qkvs, attn.r_gate       read by nobody

The program saves whole pickled modules, which nobody should load from elsewhere: save
its state_dict(), as .npz, .safetensors or with torch.save.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from xlformer import models
from xlformer.convert.entries import Entry, check, fill, grouped, lstm, matrix, said
from xlformer.errors import Argument, UserError
from xlformer.models import SHARNNConfig, sha_rnn

# What a run of the original is given, and our name for it.
FIELDS = {
    "dropout": "dropout",
    "dropouth": "hidden_dropout",
    "dropouti": "input_dropout",
}
# The program's constant, which a run cannot set.
MAX_POSITIONS = 5000
BLOCK = re.compile(r"blocks\.(\d{1,9})\.(\w+)\..*")
NORMS = {
    "lnstart": "start",
    "lnmid": "middle",
    "lnmem": "memory",
    "lnout": "output",
    "lnff": "residual",
    "lnxff": "inner",
}


def from_sha_rnn(
    state: Mapping[str, np.ndarray], hparams: Mapping[str, Any] | None = None
) -> tuple[SHARNNConfig, dict]:
    """Reads a state dict of SHA-RNN.

    Args:
      state: names to numpy arrays; their dtype is kept. Without attn.vq it is of a
        collapsed model.
      hparams: the original's argument names to values, and `max_positions`, which is a
        constant there. Shapes and names say n_token, emsize, nhid, nlayers and which
        blocks attend, so that these need not be given. Rates of dropout are taken
        over, else 0. Others are ignored.

    Returns:
      The configuration and the parameters, for models.build(config).

    Raises:
      UserError: a name is missing or too many, or a shape does not fit.
    """
    state = {name: np.asarray(x) for name, x in state.items()}
    config = _config(state, {k: x for k, x in (hparams or {}).items() if x is not None})
    entries = check(state, _entries(config), "expected")
    encoder, decoder = state["encoder.weight"], state.get("decoder.weight")
    if decoder is not None and not np.array_equal(decoder, encoder):
        raise UserError(
            "decoder.weight differs from encoder.weight: they are tied here"
        )
    return config, fill(config, state, entries)


def to_sha_rnn(config: SHARNNConfig, tree) -> dict[str, np.ndarray]:
    """The inverse of from_sha_rnn, for any tree shaped like params, gradients too.

    The original loads it strictly, once its model has the attention of the config and,
    where that is collapsed, its vq_collapse() has been called. Tied arrays appear under
    both names.
    """
    return {entry.name: entry.of(tree) for entry in _entries(config)}


def collapsed(config, params) -> tuple[SHARNNConfig, dict]:
    """models.sha_rnn.collapse for any model; UserError where nothing collapses."""
    if not isinstance(config, SHARNNConfig):
        name = models.name_of(config)
        raise UserError(Argument("collapse"), f": {name!r} has nothing to collapse")
    return sha_rnn.collapse(config, params)


def _entries(config: SHARNNConfig) -> Iterator[Entry]:
    V, D, F = config.vocab_size, config.d_model, config.d_inner
    table, turns = ("embedding", "table"), grouped(config.chunks)
    yield Entry("encoder.weight", table, ..., (V, D))
    yield Entry("decoder.weight", table, ..., (V, D), tied=True)
    yield Entry("decoder.bias", ("softmax", "bias"), ..., (V,))
    for k in range(config.n_layer):
        name, path = f"blocks.{k}", ("trunk", f"block_{k}")
        yield from lstm(f"{name}.rnn", (*path, "lstm"), D, D)
        boom, own = f"{name}.ff.linear1", (*path, "boom")
        yield Entry(f"{boom}.weight", (*own, "kernel"), ..., (F, D), *turns)
        yield Entry(f"{boom}.bias", (*own, "bias"), ..., (F,), *turns)
        for theirs, ours in NORMS.items():
            yield Entry(f"{name}.{theirs}.weight", (*path, f"{ours}_scale"), ..., (D,))
            yield Entry(f"{name}.{theirs}.bias", (*path, f"{ours}_bias"), ..., (D,))
        if k in config.attending:
            for theirs, ours, *how in _attention(D, config.collapsed):
                own = (*path, "attention", ours)
                yield Entry(f"{name}.attn.{theirs}", own, *how)


def _attention(D: int, collapsed: bool):
    row = (None, None)  # The axes of one that it has in front of a vector.
    yield "q.weight", "query_kernel", ..., (D, D), np.transpose, np.transpose
    yield "q.bias", "query_bias", ..., (D,)
    yield "qln.weight", "norm_scale", ..., (D,)
    yield "qln.bias", "norm_bias", ..., (D,)
    yield "qs", "query_gate", row, (1, 1, D)
    yield "ks", "key_gate", row, (1, 1, D)
    yield "vs", "value_gate", row, (1, 1, D)
    yield "qkvs", "other_gates", None, (1, 3, D)
    yield "r_gate", "residual_gate", row, (1, 1, D)
    if not collapsed:
        yield "vq.l1.weight", "value_kernel", ..., (2 * D, D), *grouped(2)
        yield "vq.l1.bias", "value_bias", ..., (2 * D,), *grouped(2)


def _config(state: dict, hparams: dict) -> SHARNNConfig:
    """What names and shapes say, and of the hparams what they cannot say."""
    vocab_size, d_model = matrix(state, "encoder.weight")
    d_inner, _ = matrix(state, "blocks.0.ff.linear1.weight")
    found = [m for m in map(BLOCK.fullmatch, state) if m]
    # Not the largest number, of which a file may have any: `check` says what lacks.
    n_layer = len({int(m[1]) for m in found})
    attending = tuple(sorted({int(m[1]) for m in found if m[2] == "attn"}))
    attention = _named(attending, n_layer)
    config = SHARNNConfig(
        vocab_size=vocab_size,
        n_layer=n_layer,
        d_model=d_model,
        d_inner=d_inner,
        attention=attention,
        memory_length=(hparams.get("max_positions", MAX_POSITIONS) if attending else 0),
        collapsed=bool(attending)
        and not any(re.fullmatch(r"blocks\.\d+\.attn\.vq\..*", name) for name in state),
        **{ours: hparams.get(name, 0.0) for name, ours in FIELDS.items()},
    )
    names = {"n_token": "vocab_size", "emsize": "d_model", "d_model": "d_model"}
    names |= {"nhid": "d_inner", "nlayers": "n_layer", "n_layer": "n_layer"}
    said(config, hparams, names)
    return config


def _named(attending: tuple[int, ...], n_layer: int) -> str:
    known = {(): "none", (n_layer - 2,): "second_last", tuple(range(n_layer)): "all"}
    if attending not in known:
        raise UserError(
            f"blocks {', '.join(map(str, attending))} of {n_layer} have attention: "
            "known are all, none and the second last"
        )
    return known[attending]
