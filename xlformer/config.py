"""Configurations: loading by name, overriding by flag, checking, storing.

A config is an `ml_collections.ConfigDict` with the sections of `default_config`,
locked. `config.model` holds exactly the fields of the model's frozen dataclass, so a
wrong key fails at once. A config file is Python and runs when it is loaded: load only
files that you trust. What is read back from a work directory is JSON and runs nothing.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from xlformer import fields as fields_lib
from xlformer import models, storage, strangers, together
from xlformer.data import recipes, stream
from xlformer.errors import Argument, UserError, about, did_you_mean
from xlformer.models import checks

# The format of a resolved config as JSON. 1 is that of xlformer 0.1.0, which had no
# number for it.
FORMAT = 2
# What 0.1.0 did where it had no field for it yet.
BEFORE: dict[str, Any] = {"data.min_count": 1}


def default_config(model: str = "transformer_xl", **fields) -> ConfigDict:
    """Returns every option with its default; `fields` set options of config.model."""
    tree = {
        section: {name: field.default for name, field in table.items()}
        for section, table in fields_lib.TABLE.items()
    }
    top = tree.pop("")
    return ConfigDict({**top, "model": models.default_config(model, **fields), **tree})


def rules(config: ConfigDict) -> dict[str, fields_lib.Rule]:
    """'section.field' -> its rule, for every field that a config of this model has."""
    found = {f"model.{n}": r for n, r in models.rules(config.model.name).items()}
    for section, table in fields_lib.TABLE.items():
        prefix = section and f"{section}."
        found |= {f"{prefix}{name}": field.rule for name, field in table.items()}
    return found


def flat(config: Mapping) -> dict[str, Any]:
    """'section.field' -> value, of a config or of its plain dict."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        # A ConfigDict is no Mapping to Python.
        if isinstance(value, Mapping | ConfigDict):
            found |= {f"{key}.{name}": x for name, x in value.items()}
        else:
            found[key] = value
    return found


def check(config: ConfigDict, model: models.Model | None = None) -> None:
    """Raises UserError for what no run can do, whatever the data turn out to be.

    Names, types, ranges and combinations, of whatever becomes a config: `load`,
    `from_dict` and `train` call it, so nothing is downloaded or prepared before. What
    depends on the devices is left to `sharding.check`.

    model: what is trained, where it is known: it may be one's own, in place of what
    config.model describes.
    """
    # First, because the rules below are those of the model that it names.
    models.check(config.model)
    values, known = flat(config), rules(config)
    for name in values:
        # A misspelt one would do nothing, and be sealed in checkpoints.
        if name not in known and name != "model.name":
            near = did_you_mean(name, known)
            raise UserError(f"config.{name}: there is no such field{near}")
    for name, rule in models.rules(config.model.name).items():
        rule.check(f"config.model.{name}", config.model[name])
    for section in fields_lib.TABLE:
        fields_lib.check_section(section, config[section] if section else config)
    recipes.check(config.data)
    together.check(config)
    if model is not None:
        _check_objective(config.train.objective, model)
    if model is not None or config.own_model in ("", fields_lib.UNSAID):
        model = model or outline(config)
        _check_segments(config, model)
        _check_reading(config, model)


def keeps_average(config: ConfigDict) -> bool:
    """Whether a run keeps an average of its parameters, which is then what counts."""
    train, name = config.train, config.optimizer.name
    return bool(train.ema_decay or train.tail_average) or name == "nt_asgd"


def _check_objective(name: str, model: models.Model) -> None:
    objectives = fields_lib.OBJECTIVES
    if objectives[name].causal != model.causal:
        fitting = [n for n, o in objectives.items() if o.causal == model.causal]
        raise UserError(
            f"config.train.objective={name!r} with a model that has "
            f"causal={model.causal}: such a model is trained with {', '.join(fitting)}"
        )


def _check_segments(config: ConfigDict, model: models.Model) -> None:
    length = most = config.train.segment_length
    shown = f"config.train.segment_length={length}"
    if config.train.variable_length:  # Every segment is padded to the longest.
        most += stream.LONGEST_EXTRA
        shown += f" with variable_length=True, up to {most},"
    checks.segment(model, shown, most)
    extended, documents = model.extended_length, config.data.documents
    if config.train.variable_length and extended:
        raise UserError(
            f"config.train.variable_length with extended_length={extended} of the "
            "model: padding on the right and context on the left do not go together"
        )
    if not model.resets_in_segment and (extended or documents):
        raise UserError(
            f"config.data.documents={documents} with extended_length={extended} of a "
            "model with resets_in_segment=False: what such a model sees where a text "
            "begins can be put back only before a segment, not within it"
        )


def _check_reading(config: ConfigDict, model: models.Model) -> None:
    """Raises UserError where the model cannot be read as the section eval says."""
    asked = {name: config.eval[name] for name in fields_lib.VISIBLE}
    # False of same_length is the model's own, as -1 is of the others.
    asked = {name: x for name, x in asked.items() if x is not False}
    try:
        model = model.for_reading(**asked)
    except UserError as error:
        raise UserError(f"config.eval: {error}") from error
    # With another memory it may take others than in training.
    length = config.eval.segment_length
    checks.segment(model, f"config.eval.segment_length={length}", length)


def vocab_size(config: ConfigDict, symbols: int) -> int:
    """The vocabulary of a model for data of so many symbols.

    The objective may need more of them: a masked one needs the mask.
    """
    return symbols + fields_lib.OBJECTIVES[config.train.objective].symbols


def outline(config: ConfigDict) -> models.Model:
    """The model that config.model describes, before the data say how many symbols."""
    return models.build(config.model, config.model.vocab_size or fields_lib.LARGEST)


def directories() -> list[pathlib.Path]:
    """Where named configs live: in the installed package, or beside it."""
    package = pathlib.Path(__file__).parent
    return [p for p in (package / "configs", package.parent / "configs") if p.is_dir()]


def names() -> list[str]:
    """The names of all configs that `load` finds by name."""
    found = {f.stem for d in directories() for f in d.glob("*.py")}
    return sorted(found - {"__init__"})


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads 'NAME[:a=1,b]' or 'PATH.py[:...]', applies overrides 'x.y=v', and locks.

    Raises UserError for an unknown name, argument, field or a value of another type.
    """
    name, _, argument = spec.partition(":")
    get_config = module(name).get_config
    known = list(inspect.signature(get_config).parameters.values())
    defaults = {parameter.name: parameter.default for parameter in known}
    found = fields_lib.parse_pairs(argument, defaults, Argument("config"))
    config = get_config(**found)
    if not isinstance(config, ConfigDict):
        raise UserError(
            Argument("config", name),
            ": get_config returns no ConfigDict, as default_config makes it, but "
            f"{type(config).__name__}",
        )
    config.name = config.name or pathlib.Path(name).stem
    config.lock()
    set_fields(config, overrides)
    check(config)
    return config


def module(name: str):
    """The Python module of a config: a named one, or a file's. Raises UserError."""
    path = pathlib.Path(storage.path(name))
    if path.suffix != ".py":
        candidates = [d / f"{name}.py" for d in directories()]
        installed = [c for c in candidates if c.is_file()]
        # A name with a '/' in it may be a file, but is no named config.
        if not installed or name not in names():
            near = did_you_mean(name, names())
            raise UserError(Argument("config", name), f": no such config{near}")
        path = installed[0]
    elif not path.is_file():
        raise UserError(Argument("config", name), ": no such file")
    spec = importlib.util.spec_from_file_location(f"xlformer_config_{path.stem}", path)
    # Every name that ends in .py has both.
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    # This runs the file: the one place where a config is code.
    spec.loader.exec_module(found)
    if not hasattr(found, "get_config"):
        line = ": the file defines no get_config function"
        raise UserError(Argument("config", name), line)
    return found


def set_fields(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets the fields that 'a.b=v' items name."""
    for override in overrides:
        field, equals, text = override.partition("=")
        if not equals:
            needed = Argument(f"config.{field}", "VALUE")
            raise UserError(Argument(f"config.{field}"), " needs a value: ", needed)
        set_field(config, field, text)


def set_field(config: ConfigDict, field: str, text: str) -> None:
    """Sets 'a.b' from text, converted to the type of the present value."""
    node, parts = config, field.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, ConfigDict) or part not in node:
            where = ".".join(["config", *parts[:depth]])
            near = did_you_mean(part, node) if isinstance(node, ConfigDict) else ""
            line = f": {where} has no field {part!r}{near}"
            raise UserError(Argument(f"config.{field}"), line)
        if depth < len(parts) - 1:
            node = node[part]
    if isinstance(node[parts[-1]], ConfigDict):
        line = " is a section; name one of its fields"
        raise UserError(Argument(f"config.{field}"), line)
    named = Argument(f"config.{field}", text)
    if field == "model.name" and text != config.model.name and text in models.MODELS:
        line = ": another model has other fields; a config file says which, with "
        raise UserError(named, f"{line}default_config({text!r})")
    value = fields_lib.parse(text, node[parts[-1]], named)
    # ml_collections would refuse None for a number that has a default, and the reverse.
    with node.ignore_type():
        node[parts[-1]] = value


def to_dict(config: ConfigDict) -> dict:
    """The resolved config as plain values, with the format that they are in."""
    return {"format": FORMAT, **config.to_dict()}


def to_json(config: ConfigDict) -> str:
    """The resolved config as JSON, one field a line."""
    return json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"


def from_json(text: str, where: str = "config.json") -> ConfigDict:
    """Reads what to_json wrote, which may come from anywhere; see from_dict."""
    try:
        found = json.loads(text)
    # Braces nested a thousand deep end in a RecursionError.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not a resolved config: {error!r}") from error
    return from_dict(found, where=where)


def from_dict(found: Mapping, *, where: str = "config.json") -> ConfigDict:
    """Reads what to_dict gave, in this release or in an earlier one.

    A field that an earlier release did not have gets what that release did. Raises
    UserError for a newer format, for unknown fields and for wrong types.
    """
    try:
        found = dict(found)
        strangers.check_depth(found)
        written = found.pop("format", 1)
        config = default_config(found["model"]["name"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is not a resolved config: {error!r}") from error
    if type(written) is not int or not 1 <= written <= FORMAT:
        raise UserError(
            f"{where} has format {written!r:.20}, this xlformer reads 1 to {FORMAT}: "
            "use the release that wrote it, or a newer one"
        )
    for field, value in BEFORE.items() if written == 1 else ():
        section, _, name = field.rpartition(".")
        config[section][name] = value
    config.own_model = fields_lib.UNSAID
    with config.ignore_type():  # Once: it goes through all that is in there.
        _update(config, found, "config", where)
    config.lock()
    with about(where):
        check(config)
    return config


def _update(node: ConfigDict, found: Mapping, at: str, where: str) -> None:
    if not isinstance(found, Mapping):
        raise UserError(f"{where}: {at}={found!r:.50} is not a section")
    for key, value in found.items():
        if key not in node:
            near = did_you_mean(key, node)
            raise UserError(f"{where}: {at} has no field {key!r:.50}{near}")
        like = node[key]
        if isinstance(like, ConfigDict):
            _update(like, value, f"{at}.{key}", where)
        else:
            # JSON has lists only, a frozen dataclass needs what can be hashed.
            node[key] = tuple(value) if isinstance(value, list) else value


def shrink(config: ConfigDict) -> ConfigDict:
    """Makes a run tiny, in place, and returns it: what ':debug' of every config does.

    The character stays (schedule, optimizer, and what the model's own tiny() keeps);
    every size is set, so that runs of one family have equal shapes.
    """
    train, evaluation = config.train, config.eval
    config.model.update(models.tiny(config.model))
    # A batch of two rows cannot be split further.
    config.mesh.update(dict.fromkeys(config.mesh, 1))
    # Different primes, so that lengths that are mixed up do not fit each other; the
    # same for all models of a family, so that tests compile them once.
    train.update(steps=2, batch_size=2, segment_length=7)
    train.update(log_every=1, eval_every=2, save_every=2)
    train.micro_batches = min(train.micro_batches, 2)
    train.segments_per_call = min(train.segments_per_call, 2)
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 1)
    evaluation.update(batch_size=2, segment_length=5, max_tokens=200)
    if evaluation.memory_length > 0:
        evaluation.memory_length = 11
    if evaluation.clamp_length > 0:
        evaluation.clamp_length = 13
    return config
