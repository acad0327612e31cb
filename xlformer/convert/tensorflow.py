"""Weights of the TensorFlow original, whose authors released its largest models.

    config, params = from_tf("model.ckpt-0", {"mem_len": 1600, "same_length": True})

The shapes of a checkpoint's variables tell the model but for what it sees. Against the
PyTorch original: cold memory is zeros, which are attended; with same_length a token
sees mem_len + 1 keys; the norms' epsilon is 1e-12; tail bins' entries stand forward in
the softmax's head; an input projection is [width, d_model], as is one of the softmax's
own, which is read transposed.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from xlformer import models
from xlformer.convert import tensor_bundle
from xlformer.convert.tensor_bundle import Bundle
from xlformer.convert.transformer_xl import Entry
from xlformer.errors import Argument, UserError, some
from xlformer.models import TransformerXLConfig
from xlformer.models.parameters import abstract_params

SCOPE = "transformer/"
EPSILON = 1e-12
STEP = "global_step"
# Of n_layer, d_model and n_head: tgt_len, mem_len and clamp_len with which the authors'
# scripts evaluate the model of that size; all of them with same_length.
SCRIPTS = {
    (12, 512, 8): (80, 2100, 820),  # enwik8 and text8, base
    (24, 1024, 8): (128, 3800, 1000),  # enwik8 and text8, large
    (16, 410, 10): (64, 640, 400),  # wt103, base
    (18, 1024, 16): (128, 1600, 1000),  # wt103, large
    (18, 1024, 8): (32, 128, -1),  # lm1b, base
    (24, 1280, 16): (32, 128, -1),  # lm1b, large
}
LAYER = re.compile(SCOPE + r"layer_(\d{1,6})/")
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
    fields = _fields_of(bundle)
    _check_flags(bundle, hparams, fields)
    hparams = _seen(bundle, hparams, fields)
    config, step = _config(fields, hparams), _step(bundle)
    return config, _params(bundle, config), hparams, step


def to_tf(config: TransformerXLConfig, tree) -> dict[str, np.ndarray]:
    """A tree shaped like the parameters, as the original's variables; gradients too.

    What is shared adds up: a tree has it once.
    """
    found = {}
    for entry in _entries(config):
        leaf = tree
        for key in entry.path:
            leaf = leaf[key]
        found[entry.name] = entry.turn_back(np.asarray(leaf)[entry.index])
    return found


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


# What the shapes tell -----------------------------------------------------------------


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


def _seen(bundle: Bundle, hparams: Mapping, fields: Mapping) -> dict[str, Any]:
    """hparams with all that says what a token sees: of a script, if they do not."""
    size = tuple(fields[name] for name in ("n_layer", "d_model", "n_head"))
    found: dict[str, Any] = {"same_length": False, "clamp_len": -1}
    if size in SCRIPTS and "mem_len" not in hparams:
        names = ("tgt_len", "mem_len", "clamp_len")
        found |= dict(zip(names, SCRIPTS[size], strict=True)) | {"same_length": True}
    found |= hparams
    if "mem_len" not in found:
        example = '{"mem_len": 640, "clamp_len": 400, "same_length": true}'
        raise UserError(
            f"{bundle.prefix}: its shapes do not tell what a token sees: pass ",
            Argument("hparams"),
            f" with mem_len, such as a JSON file of {example}",
        )
    for name, kind in (("mem_len", int), ("clamp_len", int), ("same_length", bool)):
        if type(found[name]) is not kind:
            wanted = "a whole number" if kind is int else "true or false"
            raise UserError(f"hparams: {name}={found[name]!r:.50} is not {wanted}")
    return found


def _fields_of(bundle: Bundle) -> dict[str, Any]:
    """Fields of the config."""
    shapes = {name: v.shape for name, v in bundle.variables.items()}

    def of(name: str, *ranks: int) -> tuple[int, ...]:
        found = shapes.get(SCOPE + name)
        if found is None:
            raise UserError(
                f"{bundle.prefix}: no variable {SCOPE}{name}: not of the TensorFlow "
                f"Transformer-XL; it has {some(sorted(shapes)) or 'none'}"
            )
        if len(found) not in ranks or not all(found):
            raise UserError(f"{bundle.prefix}: {SCOPE}{name} has shape {found}")
        return found

    biases, (d_model, _) = of("r_w_bias", 2, 3), of("layer_0/rel_attn/qkv/kernel", 2)
    layers = {int(m[1]) for m in map(LAYER.match, shapes) if m}
    names = list(_tables(shapes))
    sizes, widths = zip(*(of(name, 2) for name in names), strict=True)
    div_val = _div_val(bundle, names, widths)
    bins = [f"adaptive_softmax/cutoff_{b}/" for b in range(_bins(shapes))]
    if div_val == 1 and bins:
        (rows,), sizes = sizes, tuple(of(f"{name}b", 1)[0] for name in bins)
        if sum(sizes) != rows:
            raise UserError(
                f"{bundle.prefix}: {SCOPE}{names[0]} has {rows} rows, "
                f"{SCOPE}{bins[0]}b and what follows {sum(sizes)}"
            )
    fields = {
        "vocab_size": sum(sizes),
        # Those that are missing in between are named where they are looked for.
        "n_layer": len(layers),
        "d_model": d_model,
        "n_head": biases[-2],
        "d_head": biases[-1],
        "d_inner": of("layer_0/ff/layer_1/kernel", 2)[1],
        "d_embed": widths[0],
        "untie_r": len(biases) == 3,
        "cutoffs": tuple(sum(sizes[: b + 1]) for b in range(len(sizes) - 1)),
        "div_val": div_val,
        # Told where a bin is as wide as the model; elsewhere either is the same.
        "proj_same_dim": div_val == 1
        or d_model not in widths
        or f"{SCOPE}{_beside(names[widths.index(d_model)])}" in shapes,
    }
    made = TransformerXLConfig(**fields).bins
    # Without cutoffs the softmax shares the one projection.
    tied = tuple(
        made.projects(b) and f"{SCOPE}adaptive_softmax/cutoff_{b}/proj" not in shapes
        for b in range(len(sizes))
    )
    return fields | {"tie_projections": tied if any(tied) else ()}


def _tables(shapes: Mapping) -> Iterator[str]:
    """Names of the tables of embeddings, without the scope."""
    name = "adaptive_embed/cutoff_{}/lookup_table"
    if SCOPE + name.format(0) not in shapes:
        yield "adaptive_embed/lookup_table"
        return
    b = 0
    while SCOPE + name.format(b) in shapes:
        yield name.format(b)
        b += 1


def _beside(table: str) -> str:
    return f"{table.removesuffix('lookup_table')}proj_W"


def _bins(shapes: Mapping) -> int:
    """How many the softmax has; 0 where it is the plain one."""
    b = 0
    while f"{SCOPE}adaptive_softmax/cutoff_{b}/b" in shapes:
        b += 1
    return b


def _div_val(bundle: Bundle, names: list[str], widths: tuple[int, ...]) -> int:
    if names[0].startswith("adaptive_embed/lookup"):
        return 1
    first, second = widths[0], widths[1] if len(widths) > 1 else widths[0]
    for value in range(max(first // (second + 1) + 1, 2), first // second + 1):
        if all(first // value**b == width for b, width in enumerate(widths)):
            return value
    raise UserError(
        f"{bundle.prefix}: tables {SCOPE}{some(names)} are {some(map(str, widths))} "
        "wide: of no div_val"
    )


# Flags that shapes tell, our fields for them, and the variable that tells.
TOLD = {
    "n_token": ("vocab_size", "adaptive_embed"),
    "n_layer": ("n_layer", "layer_"),
    "d_model": ("d_model", "layer_0/rel_attn/qkv/kernel"),
    "n_head": ("n_head", "r_w_bias"),
    "d_head": ("d_head", "r_w_bias"),
    "d_inner": ("d_inner", "layer_0/ff/layer_1/kernel"),
    "d_embed": ("d_embed", "adaptive_embed"),
    "untie_r": ("untie_r", "r_w_bias"),
    "cutoffs": ("cutoffs", "adaptive_softmax/cutoff_"),
    "div_val": ("div_val", "adaptive_embed"),
    "proj_same_dim": ("proj_same_dim", "adaptive_embed"),
}


def _check_flags(bundle: Bundle, hparams: Mapping, fields: Mapping) -> None:
    """Raises UserError for a flag that the shapes contradict."""
    vocab_size, cutoffs = fields["vocab_size"], fields["cutoffs"]
    untold = set() if cutoffs else {"div_val"}
    widths = [fields["d_embed"] // fields["div_val"] ** b for b in range(len(cutoffs))]
    if fields["div_val"] == 1 or fields["d_model"] not in widths:
        untold.add("proj_same_dim")
    for name, (ours, variable) in TOLD.items():
        value, found = hparams.get(name), fields[ours]
        if name not in hparams or name in untold:
            continue
        if name == "cutoffs" and isinstance(value, list | tuple):
            # The program's corpus-info.json has 0 in front and the size behind.
            value = tuple(c for c in value if c not in (0, vocab_size))
        # Not == alone: true equals 1.
        if (type(value), value) != (type(found), found):
            raise UserError(
                f"hparams: {name}={hparams[name]!r:.60}, and {bundle.prefix} has "
                f"{found!r:.60}: {_shown(bundle, SCOPE + variable)}"
            )
    share, tied = hparams.get("proj_share_all_but_first"), fields["tie_projections"]
    made = TransformerXLConfig(**fields).bins
    wrong = [
        b
        for b in range(len(cutoffs) + 1)
        if made.projects(b) and (b < len(tied) and tied[b]) != (bool(share) and b > 0)
    ]
    if share is not None and cutoffs and wrong:
        found = _shown(bundle, f"{SCOPE}adaptive_softmax/cutoff_", "/proj")
        raise UserError(
            f"hparams: proj_share_all_but_first={share!r:.50}, and {bundle.prefix} has "
            f"{found or 'no proj of the softmax'}"
        )


def _shown(bundle: Bundle, begin: str, end: str = "") -> str:
    """Variables and their shapes, the first ones of those so named."""
    found = [
        f"{name} {variable.shape}"
        for name, variable in sorted(bundle.variables.items())
        if name.startswith(begin) and name.endswith(end) and "/Adam" not in name
    ]
    return some(found)


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
    dtype = np.float64 if is_double else np.float32
    # Scanned, because its layers are traced once; the parameters are the same.
    model = models.build(dataclasses.replace(config, scan_layers=True))
    tree = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, dtype), abstract_params(model)
    )
    for entry in entries:
        leaf = tree
        for key in entry.path:
            leaf = leaf[key]
        leaf[entry.index] = entry.turn(bundle.read(entry.name))
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
        if bins.projects(b) and not (config.tie_projections or (False,) * (b + 1))[b]:
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
