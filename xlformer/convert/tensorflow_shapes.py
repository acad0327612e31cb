"""What the shapes of the TensorFlow original's variables tell of its model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from xlformer.convert.hparams import MOST_TOKENS
from xlformer.convert.tensor_bundle import Bundle
from xlformer.errors import Argument, UserError, some
from xlformer.layers.adaptive import is_tied
from xlformer.models import TransformerXLConfig

SCOPE = "transformer/"
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


def seen(bundle: Bundle, hparams: Mapping, fields: Mapping) -> dict[str, Any]:
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
    if found["mem_len"] > MOST_TOKENS:
        line = f"{found['mem_len']!r:.50} is more than the {MOST_TOKENS} that are taken"
        raise UserError(f"hparams: mem_len={line}")
    return found


def fields_of(bundle: Bundle) -> dict[str, Any]:
    """Fields of the config that the shapes tell; UserError for another program's."""
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


def check_flags(bundle: Bundle, hparams: Mapping, fields: Mapping) -> None:
    """Raises UserError for a flag that the shapes contradict."""
    vocab_size, cutoffs = fields["vocab_size"], fields["cutoffs"]
    untold = set() if cutoffs else {"div_val"}
    d_embed, bins = fields["d_embed"], range(len(cutoffs) + 1)
    widths = [d_embed // fields["div_val"] ** b for b in bins]
    # Of narrow tables several give the same widths: 6 and 1 are of 4, 5 and 6.
    value = hparams.get("div_val")
    if type(value) is int and value > 1 < fields["div_val"]:
        if [d_embed // value**b for b in bins] == widths:
            untold.add("div_val")
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
        if made.projects(b) and is_tied(tied, b) != (bool(share) and b > 0)
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
