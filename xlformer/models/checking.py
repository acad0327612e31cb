"""What every model's configuration is held to: the types of its fields, and its RULES."""

from __future__ import annotations

import typing

from xlformer.errors import UserError


def check_fields(config) -> None:
    """Raises UserError for a field of another type, or out of its range.

    An int where a float belongs, and a list for a tuple, become what they stand for.
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
