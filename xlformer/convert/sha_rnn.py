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
from typing import Any, NamedTuple

import jax
import numpy as np

from xlformer import models
from xlformer.errors import Argument, UserError, some
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


class Entry(NamedTuple):
    """An array of the original: its name, where it lies in our tree, and its shape.

    Attributes:
      name: in the original's state dict.
      path: in our tree.
      shape: there.
      groups: of a matrix or a bias whose rows are so many groups of units, [G N, ...],
        and our last axes [..., G, N]; 0 where nothing is turned.
      tied: whether another entry holds the same numbers.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    groups: int = 0
    tied: bool = False

    def to_ours(self, x: np.ndarray, shape) -> np.ndarray:
        if self.groups:
            x = x.T.reshape(*x.shape[1:], self.groups, x.shape[0] // self.groups)
        return x.reshape(shape)

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        if self.groups:
            x = x.reshape(*x.shape[: len(self.shape) - 1], -1).T
        return x.reshape(self.shape)


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
    entries = list(_entries(config))
    _check(state, entries)
    dtype = np.result_type(*state.values())
    shapes = jax.eval_shape(models.build(config).init, jax.random.key(0))
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, dtype), shapes)
    for entry in entries:
        if not entry.tied:
            leaf = _leaf(tree, entry.path)
            leaf[...] = entry.to_ours(state[entry.name], leaf.shape)
    return config, tree


def to_sha_rnn(config: SHARNNConfig, tree) -> dict[str, np.ndarray]:
    """The inverse of from_sha_rnn, for any tree shaped like params, gradients too.

    The original loads it strictly, once its model has the attention of the config and,
    where that is collapsed, its vq_collapse() has been called. Tied arrays appear under
    both names.
    """
    return {
        entry.name: entry.to_theirs(np.asarray(_leaf(tree, entry.path)))
        for entry in _entries(config)
    }


def collapsed(config, params) -> tuple[SHARNNConfig, dict]:
    """models.sha_rnn.collapse for any model; UserError where nothing collapses."""
    if not isinstance(config, SHARNNConfig):
        name = models.name_of(config)
        raise UserError(Argument("collapse"), f": {name!r} has nothing to collapse")
    return sha_rnn.collapse(config, params)


def _leaf(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def _entries(config: SHARNNConfig) -> Iterator[Entry]:
    V, D, F = config.vocab_size, config.d_model, config.d_inner
    yield Entry("encoder.weight", ("embedding", "table"), (V, D))
    yield Entry("decoder.weight", ("embedding", "table"), (V, D), tied=True)
    yield Entry("decoder.bias", ("softmax", "bias"), (V,))
    for k in range(config.n_layer):
        for name, where, shape, groups in _block(D, F, config.chunks):
            path = ("trunk", f"block_{k}", *where)
            yield Entry(f"blocks.{k}.{name}", path, shape, groups)
        for name, ours, shape, groups in (
            _attention(D, config.collapsed) if k in config.attending else ()
        ):
            path = ("trunk", f"block_{k}", "attention", ours)
            yield Entry(f"blocks.{k}.attn.{name}", path, shape, groups)


def _block(D: int, F: int, chunks: int):
    yield "rnn.weight_ih_l0", ("lstm", "input_kernel"), (4 * D, D), 4
    yield "rnn.weight_hh_l0", ("lstm", "hidden_kernel"), (4 * D, D), 4
    yield "rnn.bias_ih_l0", ("lstm", "input_bias"), (4 * D,), 4
    yield "rnn.bias_hh_l0", ("lstm", "hidden_bias"), (4 * D,), 4
    yield "ff.linear1.weight", ("boom", "kernel"), (F, D), chunks
    yield "ff.linear1.bias", ("boom", "bias"), (F,), chunks
    for theirs, ours in NORMS.items():
        yield f"{theirs}.weight", (f"{ours}_scale",), (D,), 0
        yield f"{theirs}.bias", (f"{ours}_bias",), (D,), 0


def _attention(D: int, collapsed: bool):
    yield "q.weight", "query_kernel", (D, D), 1
    yield "q.bias", "query_bias", (D,), 0
    yield "qln.weight", "norm_scale", (D,), 0
    yield "qln.bias", "norm_bias", (D,), 0
    yield "qs", "query_gate", (1, 1, D), 0
    yield "ks", "key_gate", (1, 1, D), 0
    yield "vs", "value_gate", (1, 1, D), 0
    yield "qkvs", "other_gates", (1, 3, D), 0
    yield "r_gate", "residual_gate", (1, 1, D), 0
    if not collapsed:
        yield "vq.l1.weight", "value_kernel", (2 * D, D), 2
        yield "vq.l1.bias", "value_bias", (2 * D,), 2


def _config(state: dict, hparams: dict) -> SHARNNConfig:
    """What names and shapes say, and of the hparams what they cannot say."""
    vocab_size, d_model = _matrix(state, "encoder.weight")
    d_inner, _ = _matrix(state, "blocks.0.ff.linear1.weight")
    found = [m for m in map(BLOCK.fullmatch, state) if m]
    # Not the largest number, of which a file may have any: `_check` says what lacks.
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
    said = {"n_token": "vocab_size", "emsize": "d_model", "d_model": "d_model"}
    said |= {"nhid": "d_inner", "nlayers": "n_layer", "n_layer": "n_layer"}
    for name, ours in said.items():
        value = getattr(config, ours)
        if hparams.get(name, value) != value:
            raise UserError(
                f"hparams: {name}={hparams[name]!r:.50}, the state has {value}"
            )
    return config


def _named(attending: tuple[int, ...], n_layer: int) -> str:
    known = {(): "none", (n_layer - 2,): "second_last", tuple(range(n_layer)): "all"}
    if attending not in known:
        raise UserError(
            f"blocks {', '.join(map(str, attending))} of {n_layer} have attention: "
            "known are all, none and the second last"
        )
    return known[attending]


def _matrix(state: dict, name: str) -> tuple[int, int]:
    x = _required(state, name)
    if x.ndim != 2:
        raise UserError(f"{name} has shape {x.shape}, expected a matrix")
    return x.shape


def _required(state: dict, name: str) -> np.ndarray:
    if name not in state:
        raise UserError(f"the state dict lacks {name!r}")
    return state[name]


def _check(state: dict, entries: list[Entry]) -> None:
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
    if unexpected := sorted(set(state) - {entry.name for entry in entries}):
        raise UserError(f"the state dict has unexpected names: {some(unexpected)}")
    encoder, decoder = state["encoder.weight"], state.get("decoder.weight")
    if decoder is not None and not np.array_equal(decoder, encoder):
        raise UserError(
            "decoder.weight differs from encoder.weight: they are tied here"
        )
