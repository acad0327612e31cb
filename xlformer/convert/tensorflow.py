"""Weights of the TensorFlow original, whose authors released its largest models.

    config, params = from_tf("model.ckpt-0", {"mem_len": 1600, "same_length": True})

The shapes of a checkpoint's variables tell the model but for what it sees. Against the
PyTorch original: cold memory is zeros, which are attended; with same_length a token
sees mem_len + 1 keys; the norms' epsilon is 1e-12; tail bins' entries stand forward in
the softmax's head; an input projection is [width, d_model], as is one of the softmax's
own, which is read transposed.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from xlformer.convert import tensor_bundle
from xlformer.convert.entries import Entry, zeros
from xlformer.convert.tensor_bundle import Bundle
from xlformer.convert.tensorflow_shapes import SCOPE, check_flags, fields_of, seen
from xlformer.errors import UserError, some
from xlformer.layers.adaptive import is_tied
from xlformer.models import TransformerXLConfig

EPSILON = 1e-12
STEP = "global_step"
FLOATS = (1, 2, tensor_bundle.BFLOAT16, 19)  # of TensorFlow's dtypes


def from_tf(
    source: str | pathlib.Path, hparams: Mapping[str, Any] | None = None
) -> tuple[TransformerXLConfig, dict]:
    """Reads a checkpoint of the TensorFlow original (format V2).

    Args:
      source: its prefix (model.ckpt-4000), or the directory in which it lies: then the
        file `checkpoint` says which one is the latest.
      hparams: flags of the original, for what shapes do not tell: mem_len, same_length
        and clamp_len. Without mem_len those of the script for a model of this size. A
        flag that disagrees with the shapes is refused.

    Returns:
      The configuration and the parameters, for models.build(config).

    Raises:
      UserError: a file is missing, damaged or of another program.
    """
    config, params, _, _ = read(source, hparams or {})
    return config, params


def read(source: str | pathlib.Path, hparams: Mapping[str, Any]) -> tuple:
    """What from_tf returns, then hparams with what they left out, and the step."""
    bundle = tensor_bundle.open_bundle(prefix_of(source))
    fields = fields_of(bundle)
    check_flags(bundle, hparams, fields)
    hparams = seen(bundle, hparams, fields)
    config, step = _config(fields, hparams), _step(bundle)
    return config, _params(bundle, config), hparams, step


def to_tf(config: TransformerXLConfig, tree) -> dict[str, np.ndarray]:
    """A tree shaped like the parameters, as the original's variables; gradients too.

    What is shared adds up: a tree has it once.
    """
    return {entry.name: entry.of(tree) for entry in _entries(config)}


def prefix_of(source: str | pathlib.Path) -> pathlib.Path:
    """The prefix of a checkpoint's files that a source names."""
    path = pathlib.Path(source)
    if not path.is_dir():
        # A person may name one of the files.
        name = re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path.name)
        return path.with_name(name) if name else path
    found = sorted(p.name.removesuffix(".index") for p in path.glob("*.index"))
    latest = _latest(path / "checkpoint")
    if latest is not None:
        if latest not in found:
            raise UserError(
                f"{path}/checkpoint names {latest}, of which there is no .index; "
                f"there: {some(found) or 'none'}"
            )
        return path / latest
    if len(found) != 1:
        line = "no checkpoint of TensorFlow (no file .index)"
        if found:
            line = f"several checkpoints, and no file that says which: {some(found)}"
        raise UserError(f"{path}: {line}")
    return path / found[0]


def _latest(path: pathlib.Path) -> str | None:
    """The name of the latest checkpoint, wherever its directory was then."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            text = file.read(1 << 16).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    found = re.search(r'^\s*model_checkpoint_path:\s*"([^"\n]+)"', text, re.MULTILINE)
    name = re.split(r"[/\\]", found[1])[-1] if found else ""
    if name in ("", ".", ".."):
        raise UserError(f"{path}: no model_checkpoint_path: a stranger to TensorFlow")
    return name


def _config(fields: Mapping, hparams: Mapping) -> TransformerXLConfig:
    M = hparams["mem_len"]
    return TransformerXLConfig(
        **fields,
        memory_length=M,
        # The token itself, and so many before it: not what our same_length shows.
        window=M if hparams["same_length"] else None,
        clamp_length=max(hparams["clamp_len"], 0),
        attend_zero_memory=True,
        norm_epsilon=EPSILON,
        dropout=hparams.get("dropout", 0.0),
        attention_dropout=hparams.get("dropatt", 0.0),
    )


# Its numbers --------------------------------------------------------------------------


def _step(bundle: Bundle) -> int:
    """The step that it was saved at; 0 where it does not say, or is an average."""
    if STEP not in bundle.variables:
        return 0
    found = bundle.read(STEP) if bundle.variables[STEP].dtype in (3, 9) else None
    # Of the directory of a checkpoint of ours, too.
    if found is None or found.shape != () or not 0 <= int(found) < 1 << 31:
        raise UserError(f"{bundle.prefix}: {STEP} is no step: {found!r:.60}")
    return int(found)


def _params(bundle: Bundle, config: TransformerXLConfig) -> dict:
    """The parameters, one variable after another; float64 stays float64."""
    entries = list(_entries(config))
    _check(bundle, entries)
    is_double = any(bundle.variables[entry.name].dtype == 2 for entry in entries)
    tree = zeros(config, np.float64 if is_double else np.float32)
    for entry in entries:
        entry.leaf(tree)[entry.index] = entry.turn(bundle.read(entry.name))
    return tree


def _check(bundle: Bundle, entries: list[Entry]) -> None:
    """Raises UserError where a variable is missing, too many, or of another shape.

    It comes before anything as large as the shapes say is made.
    """
    known = {entry.name for entry in entries}
    for entry in entries:
        found = bundle.variables.get(entry.name)
        if found is None:
            raise UserError(f"{bundle.prefix}: no variable {entry.name}")
        if found.shape != entry.shape:
            raise UserError(
                f"{bundle.prefix}: {entry.name} has shape {found.shape}, the other "
                f"variables say {entry.shape}"
            )
        if found.dtype not in FLOATS:
            raise UserError(f"{bundle.prefix}: {entry.name} holds no floats")
    others = {n for n in bundle.variables if n.startswith(SCOPE)} - known
    # An optimizer's slots are named after the variable.
    if unknown := sorted(n for n in others if n.rpartition("/")[0] not in known):
        raise UserError(f"{bundle.prefix}: unexpected variables: {some(unknown)}")


def _entries(config: TransformerXLConfig) -> Iterator[Entry]:
    bins, untied = config.bins, config.untie_r
    H, K, L = config.n_head, config.head_width, config.n_layer
    biases = ("trunk", "layers", "attention") if untied else ("trunk",)
    for name, ours in (("r_w_bias", "u"), ("r_r_bias", "v")):
        shape = (L, H, K) if untied else (H, K)
        yield Entry(SCOPE + name, (*biases, ours), ..., shape)
    for b, (name, shape) in enumerate(bins.tables.items()):
        of_bin = "" if config.div_val == 1 else f"cutoff_{b}/"
        scope, path = f"{SCOPE}adaptive_embed/{of_bin}", "embedding"
        yield Entry(f"{scope}lookup_table", (path, name), ..., shape)
        if projection := bins.embedding_projection(b):
            shape = (bins.width(b), config.d_model)
            yield Entry(f"{scope}proj_W", (path, projection), ..., shape)
    yield from _softmax_entries(config)
    for i in range(L):
        yield from _layer_entries(config, i)


def _softmax_entries(config: TransformerXLConfig) -> Iterator[Entry]:
    bins, scope = config.bins, f"{SCOPE}adaptive_softmax/"
    if not bins.n_tail:
        yield Entry(f"{scope}bias", ("softmax", "bias"), ..., (config.vocab_size,))
        return
    for b, (start, stop) in enumerate(zip(bins.edges, bins.edges[1:], strict=False)):
        rows, path = slice(start, stop), ("softmax", "bias")
        yield Entry(f"{scope}cutoff_{b}/b", path, rows, (stop - start,))
        if bins.projects(b) and not is_tied(config.tie_projections, b):
            name, path = f"{scope}cutoff_{b}/proj", ("softmax", f"projection_{b}")
            shape = (bins.width(b), config.d_model)
            yield Entry(name, path, ..., shape, np.transpose, np.transpose)
    for name, ours, shape in (
        ("cluster_W", "cluster_kernel", (bins.n_tail, bins.d_embed)),
        ("cluster_b", "cluster_bias", (bins.n_tail,)),
    ):
        yield Entry(f"{scope}cutoff_0/{name}", ("softmax", ours), ..., shape)


def _layer_entries(config: TransformerXLConfig, i: int) -> Iterator[Entry]:
    D, F = config.d_model, config.d_inner
    H, K = config.n_head, config.head_width
    # The kernel's columns are queries, keys and values, of each all heads.
    shapes = {
        "rel_attn/qkv/kernel": ("attention/qkv", (D, 3 * H * K), (D, 3, H, K)),
        "rel_attn/r/kernel": ("attention/position", (D, H * K), (D, H, K)),
        "rel_attn/o/kernel": ("attention/output", (H * K, D), (H, K, D)),
        "rel_attn/LayerNorm/gamma": ("attention_norm/scale", (D,), (D,)),
        "rel_attn/LayerNorm/beta": ("attention_norm/bias", (D,), (D,)),
        "ff/layer_1/kernel": ("feed_forward/in_kernel", (D, F), (D, F)),
        "ff/layer_1/bias": ("feed_forward/in_bias", (F,), (F,)),
        "ff/layer_2/kernel": ("feed_forward/out_kernel", (F, D), (F, D)),
        "ff/layer_2/bias": ("feed_forward/out_bias", (D,), (D,)),
        "ff/LayerNorm/gamma": ("norm/scale", (D,), (D,)),
        "ff/LayerNorm/beta": ("norm/bias", (D,), (D,)),
    }
    for name, (path, theirs, ours) in shapes.items():
        yield Entry(
            f"{SCOPE}layer_{i}/{name}",
            ("trunk", "layers", *path.split("/")),
            i,
            theirs,
            # The shapes as defaults: a closure would see the last ones of the loop.
            lambda x, ours=ours: x.reshape(ours),
            lambda x, theirs=theirs: x.reshape(theirs),
        )
