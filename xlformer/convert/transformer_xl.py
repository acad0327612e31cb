"""Weights of the PyTorch original, to and fro; others have the same arrays.

    config, params = from_original(state, hparams)
    state = to_original(config, params)

`python -m xlformer.convert` makes a work directory that evaluates and generates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from xlformer.convert import hparams as hparams_lib
from xlformer.convert.entries import Entry, check, fill
from xlformer.errors import UserError
from xlformer.layers.adaptive import is_tied
from xlformer.layers.attention import LEARNED_ABSOLUTE, LEARNED_RELATIVE, RELATIVE
from xlformer.models import TransformerXLConfig

# What is in the originals' files and needs no counterpart: the frequencies of the
# sinusoids are constants.
BUFFERS = ("pos_emb.inv_freq",)


def from_original(
    state: Mapping[str, np.ndarray], hparams: Mapping[str, Any]
) -> tuple[TransformerXLConfig, dict]:
    """Reads a state dict of the PyTorch original.

    Args:
      state: original names to numpy arrays; their dtype is kept.
      hparams: the original's argument names to values; unknown ones are ignored.

    Returns:
      The configuration and the parameters, for models.build(config).

    Raises:
      UserError: a name is missing or too many, or a shape does not fit.
    """
    config = hparams_lib.to_config(hparams)
    return config, read(config, state, reverse_clusters=True)


def to_original(config: TransformerXLConfig, tree) -> dict[str, np.ndarray]:
    """The inverse of from_original, for any tree shaped like params, gradients too.

    Tied arrays appear under every name of theirs. With untie_r the names are Hugging
    Face's, because the original has one u and one v for all layers.
    """
    found = entries(config, reverse_clusters=True)
    return {entry.name: entry.of(tree) for entry in found}


def entries(config: TransformerXLConfig, *, reverse_clusters: bool) -> Iterator[Entry]:
    """All arrays of the original, tied ones too; UserError for a model it lacks.

    reverse_clusters: whether the softmax reads the tail bins from its head backwards.
    """
    only = {"positions": "original", "gate": "none", "final_norm": False}
    hparams_lib.require(config, "the original", **only)
    plain = config.pre_norm and config.attn_type in hparams_lib.ABSOLUTE
    if config.norm_queries == plain:
        raise UserError(
            f"config.model.norm_queries={config.norm_queries} with pre_norm="
            f"{config.pre_norm} and attn_type={config.attn_type}: the original has "
            "none such"
        )
    yield from _embedding_entries(config)
    yield from _softmax_entries(config, reverse_clusters)
    for i in range(config.n_layer):
        yield from _layer_entries(config, i)
    H, K, L = config.n_head, config.head_width, config.n_layer
    attention = ("trunk", "layers", "attention")
    table = (L, config.table_length, H, K)
    if config.attn_type == RELATIVE and not config.untie_r:
        yield Entry("r_w_bias", ("trunk", "u"), ..., (H, K))
        yield Entry("r_r_bias", ("trunk", "v"), ..., (H, K))
    if config.attn_type == LEARNED_RELATIVE:
        yield Entry("r_emb", (*attention, "distance"), ..., table)
        yield Entry("r_w_bias", (*attention, "u"), ..., (L, H, K))
        yield Entry("r_bias", (*attention, "distance_bias"), ..., table[:3])
    if config.attn_type == LEARNED_ABSOLUTE:
        flat = (L, config.table_length, H * K)
        yield Entry(
            "r_emb",
            ("trunk", "position"),
            ...,
            table,
            lambda x: x.reshape(flat),
            lambda x: x.reshape(table),
        )


def frequencies(d_model: int, dtype) -> np.ndarray:
    """The constants that the originals keep among their arrays, as pos_emb.inv_freq.

    At least in float32: rounded ones would turn positions far away by whole circles.
    """
    number: Any = np.result_type(dtype, np.float32).type
    exponents = np.arange(0, d_model, 2).astype(number) / number(d_model)
    return 1 / number(10000) ** exponents


def _embedding_entries(config):
    bins = config.bins
    for b, (name, shape) in enumerate(bins.tables.items()):
        yield Entry(f"word_emb.emb_layers.{b}.weight", ("embedding", name), ..., shape)
    for b in range(len(bins.tables)):
        projection = bins.embedding_projection(b)
        if projection is not None:
            shape = (config.d_model, bins.width(b))
            path = ("embedding", projection)
            yield Entry(
                f"word_emb.emb_projs.{b}", path, ..., shape, np.transpose, np.transpose
            )


def _softmax_entries(config, reverse_clusters):
    bins = config.bins
    tied = config.tie_weights
    # With div_val 1 the original has one output layer of all words, else one a bin.
    starts = [0] if config.div_val == 1 else bins.edges[:-1]
    for b, (name, shape) in enumerate(bins.tables.items()):
        path = ("embedding" if tied else "softmax", name)
        yield Entry(f"crit.out_layers.{b}.weight", path, ..., shape, tied=tied)
        rows = slice(starts[b], starts[b] + shape[0])
        path = ("softmax", "bias")
        yield Entry(f"crit.out_layers.{b}.bias", path, rows, (shape[0],))
    for b in range(bins.n_tail + 1):
        if not bins.projects(b):
            continue
        name, shape = f"crit.out_projs.{b}", (config.d_model, bins.width(b))
        if is_tied(config.tie_projections, b):
            path = ("embedding", bins.embedding_projection(b))
            yield Entry(name, path, ..., shape, np.transpose, np.transpose, tied=True)
        else:
            yield Entry(name, ("softmax", f"projection_{b}"), ..., shape)
    if bins.n_tail:
        # The PyTorch original reads bin b's cluster from column -b of the head, so its
        # rows stand in reverse; Hugging Face reads them forward.
        order = slice(None, None, -1 if reverse_clusters else 1)
        for name, part, shape in (
            ("crit.cluster_weight", "cluster_kernel", (bins.n_tail, bins.d_embed)),
            ("crit.cluster_bias", "cluster_bias", (bins.n_tail,)),
        ):
            yield Entry(name, ("softmax", part), order, shape)


def _layer_entries(config, i):
    D, F = config.d_model, config.d_inner
    H, K = config.n_head, config.head_width
    attention, feed_forward = f"layers.{i}.dec_attn", f"layers.{i}.pos_ff"

    def entry(name, path, shape, turn=lambda x: x, turn_back=lambda x: x):
        return Entry(name, ("trunk", "layers", *path), i, shape, turn, turn_back)

    def linear(name, path, ours, *, inputs):
        """torch's [out, in] against our [in..., out...]; `inputs` is the in."""
        outputs = int(np.prod(ours)) // inputs
        return entry(
            f"{name}.weight",
            path,
            (outputs, inputs),
            lambda x: x.T.reshape(ours),
            lambda x: x.reshape(inputs, outputs).T,
        )

    if config.attn_type in (RELATIVE, LEARNED_RELATIVE):
        yield linear(
            f"{attention}.qkv_net", ("attention", "qkv"), (D, 3, H, K), inputs=D
        )
    else:
        # The original's attention with absolute positions has two nets where that with
        # relative ones has one; the rows of kv_net are the keys, then the values.
        path, width = ("trunk", "layers", "attention", "qkv"), H * K
        for name, columns in (("q_net", slice(0, 1)), ("kv_net", slice(1, 3))):
            n = columns.stop - columns.start
            yield Entry(
                f"{attention}.{name}.weight",
                path,
                (i, slice(None), columns),
                (n * width, D),
                # n as a default: a closure would see the last value of the loop.
                lambda x, n=n: x.T.reshape(D, n, H, K),
                lambda x, n=n: x.reshape(D, n * width).T,
            )
    output = ("attention", "output")
    yield linear(f"{attention}.o_net", output, (H, K, D), inputs=H * K)
    if config.attn_type == RELATIVE:
        yield linear(
            f"{attention}.r_net", ("attention", "position"), (D, H, K), inputs=D
        )
        if config.untie_r:
            yield entry(f"{attention}.r_w_bias", ("attention", "u"), (H, K))
            yield entry(f"{attention}.r_r_bias", ("attention", "v"), (H, K))
    for ours, theirs in (("attention_norm", attention), ("norm", feed_forward)):
        yield entry(f"{theirs}.layer_norm.weight", (ours, "scale"), (D,))
        yield entry(f"{theirs}.layer_norm.bias", (ours, "bias"), (D,))
    core = f"{feed_forward}.CoreNet"
    # The original's Sequential is linear, ReLU, dropout, linear, dropout: 0 and 3.
    for j, part, inputs, outputs in ((0, "in", D, F), (3, "out", F, D)):
        path = ("feed_forward", f"{part}_kernel")
        yield linear(f"{core}.{j}", path, (inputs, outputs), inputs=inputs)
        yield entry(f"{core}.{j}.bias", ("feed_forward", f"{part}_bias"), (outputs,))


def read(config, state, *, reverse_clusters):
    """Fills a tree of the model's shapes from the state's arrays."""
    state = {name: np.asarray(x) for name, x in state.items() if name not in BUFFERS}
    found = entries(config, reverse_clusters=reverse_clusters)
    return fill(config, state, check(state, found, "the hparams say"))
