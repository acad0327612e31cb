"""What is checked of every model: its config, its segments, its place on a mesh."""

from __future__ import annotations

import typing

from xlformer.errors import UserError


def fields(config) -> None:
    """Raises UserError for a field of a wrong type or out of the range of its Rule.

    config is a frozen dataclass with RULES. A list becomes a tuple, and 1 where a float
    belongs becomes 1.0.
    """
    # Fields also come from JSON and from flags: a string where a number belongs would
    # otherwise fail in the middle of tracing.
    for field, expected in typing.get_type_hints(type(config)).items():
        value = _normal(getattr(config, field), expected)
        if not _matches(value, expected):
            name = getattr(expected, "__name__", expected)
            raise UserError(f"config.model.{field}={value!r} is not of type {name}")
        # The way into a frozen dataclass. A list would make the config unhashable, and
        # compiled functions are kept by it.
        object.__setattr__(config, field, value)
    for field, rule in config.RULES.items():
        rule.check(f"config.model.{field}", getattr(config, field))


def segment(model, named, length: int, *, more: int = 0) -> None:
    """Raises UserError where a segment is longer than the model takes at once.

    named: who asks for it, as the error begins; more: tokens that it may be longer.
    """
    longest = model.longest_segment
    if longest is not None and length > longest + more:
        who = f"{longest + more} tokens that {type(model).__name__} takes at once"
        raise UserError(named, f" is more than the {who}")


def cutoffs(config) -> None:
    """Raises UserError where config.cutoffs are no bins of the vocabulary."""
    edges = (0, *config.cutoffs)
    if any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
        raise UserError(
            f"config.model.cutoffs={config.cutoffs} must ascend from above 0"
        )
    if config.vocab_size is not None and edges[-1] >= config.vocab_size:
        raise UserError(
            f"config.model.cutoffs={config.cutoffs} reach beyond the vocabulary: "
            f"vocab_size={config.vocab_size}"
        )


def heads(config, mesh) -> None:
    """Raises UserError where the tensor axis of the mesh cannot share the heads."""
    n_head, tensor = config.n_head, mesh.shape["tensor"]
    if n_head % tensor:
        raise UserError(
            f"config.model.n_head={n_head} is not divisible by config.mesh.tensor="
            f"{tensor}"
        )


def _normal(value, expected):
    # People write 1 for 1.0, and JSON has lists where a config has tuples.
    if expected is float and type(value) is int:
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _matches(value, expected) -> bool:
    arguments = typing.get_args(expected)
    if typing.get_origin(expected) is tuple:
        return isinstance(value, tuple) and all(type(v) is arguments[0] for v in value)
    # `type(...) is`: True must not pass for an int.
    return type(value) in (arguments or (expected,))
