"""Configurations: the table of every option, loading by name, overriding by flag.

A config is an `ml_collections.ConfigDict` with the sections of `default_config`,
locked. `config.model` holds exactly the fields of the model's frozen dataclass, so a
wrong key fails at once. A config file is Python and runs when it is loaded: load only
files that you trust. What is read back from a work directory is JSON and runs nothing.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import pathlib
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from xlformer import models
from xlformer.errors import UserError, did_you_mean


def default_config(model: str = "transformer_xl", **fields) -> ConfigDict:
    """Returns every option with its default; `fields` set options of config.model."""
    return ConfigDict(
        {
            "name": "",
            "seed": 1111,
            "model": models.default_config(model, **fields),
            "data": {
                "corpus": "stdlib",  # a builder's name, or 'text' for `path`
                "path": "",  # your own text: files or globs, separated by ';'
                "unit": "bytes",  # of `path`: bytes, chars or words
                "documents": False,  # of `path`: memory is reset where a file begins
                "tokenizer": "",  # a SentencePiece or Hugging Face tokenizers file
                "newline": "keep",  # enwik8: keep, or drop as the original does
                "directory": "",  # prepared corpora; '' is XLFORMER_DATA or ~/.cache
                "manual_dir": "",  # archives that cannot be downloaded
            },
            "train": {
                "steps": 1000,  # optimizer steps
                "batch_size": 16,  # rows of the stream, over all devices
                "segment_length": 64,  # tokens of a row in one step
                "micro_batches": 1,  # gradient accumulation over groups of rows
                "segments_per_call": 1,  # steps inside one compiled call
                "variable_length": False,  # the original's varlen: see data/stream.py
                "half_loss": False,  # score only the later half of each segment
                "skip_nonfinite": False,  # drop a step whose loss is not finite
                "spike_factor": 0.0,  # a loss so many times its average makes the run
                # go back and leave out that segment; 0 is off
                "spike_after": 100,  # steps before the first that can be a spike
                "ema_decay": 0.0,  # average of the parameters, free of the initial
                # ones: the first step's are its first value; 0 keeps none
                "log_every": 100,
                "eval_every": 1000,  # validation; 0 only at the end
                "save_every": 1000,
                "keep": 2,  # latest checkpoints; the best one is kept besides
                "profile_start": 0,  # first step of a profiler trace
                "profile_steps": 0,  # how many steps it covers; 0 takes none
            },
            "optimizer": {
                "name": "adam",  # adam, adamw, lamb, lamb_sha_rnn or sgd
                "learning_rate": 2.5e-4,
                "schedule": "cosine",  # cosine, cosine_after_warmup, inverse_sqrt,
                # constant or plateau
                "warmup_steps": 0,
                "final_fraction": 0.0,  # of learning_rate, where a cosine ends
                "clip_norm": 0.25,  # of the global gradient norm; 0 does not clip
                "b1": 0.9,
                "b2": 0.999,
                "epsilon": 1e-8,
                "weight_decay": 0.0,  # adamw and lamb; not for biases and norms
                "momentum": 0.0,  # sgd
                "plateau_factor": 0.5,
                "plateau_patience": 0,  # evaluations without improvement
            },
            "mesh": {
                "data": -1,  # copies of the model; -1: what devices and rows allow
                "fsdp": 1,  # devices that share one copy, gathered as it is used
                "tensor": 1,  # devices that share each layer's heads and widths
            },
            "hosts": {
                "start_limit": 300.0,  # seconds until all must have joined
                "heartbeat": 100.0,  # seconds until a host that does nothing is missing
                "phase_limit": 3600.0,  # the same while it compiles, saves, validates
            },
            "eval": {
                "split": "validation",
                "batch_size": 8,
                "segment_length": 64,
                "memory_length": -1,  # -1 is the model's own
                "clamp_length": -1,
                "same_length": False,
                "max_tokens": 0,  # of the validation during training; 0 is all
            },
        }
    )


def directories() -> list[pathlib.Path]:
    """Where named configs live: in the installed package, or beside it."""
    package = pathlib.Path(__file__).parent
    return [p for p in (package / "configs", package.parent / "configs") if p.is_dir()]


def names() -> list[str]:
    """Every named config."""
    found = {f.stem for d in directories() for f in d.glob("*.py")}
    return sorted(found - {"__init__"})


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads 'NAME[:a=1,b]' or 'PATH.py[:...]', applies overrides 'x.y=v', and locks.

    Raises UserError for an unknown name, argument, field or a value of another type.
    """
    name, _, argument = spec.partition(":")
    get_config = module(name).get_config
    known = list(inspect.signature(get_config).parameters.values())
    config = get_config(**parse_argument(argument, {p.name: p.default for p in known}))
    config.name = config.name or pathlib.Path(name).stem
    config.lock()
    for override in overrides:
        field, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--config.{field} needs a value: --config.{field}=VALUE")
        set_field(config, field, text)
    return config


def module(name: str):
    """The Python module of a config: a named one, or a file's. Raises UserError."""
    path = pathlib.Path(name)
    if path.suffix != ".py":
        candidates = [d / f"{name}.py" for d in directories()]
        path = next((c for c in candidates if c.is_file()), None)
        if path is None or name not in names():
            raise UserError(
                f"--config={name}: no such config{did_you_mean(name, names())}"
            )
    elif not path.is_file():
        raise UserError(f"--config={name}: no such file")
    spec = importlib.util.spec_from_file_location(f"xlformer_config_{path.stem}", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    if not hasattr(found, "get_config"):
        raise UserError(f"--config={name}: the file defines no get_config function")
    return found


def parse_argument(argument: str, defaults: Mapping) -> dict:
    """Parses 'batch=8,debug' against the defaults, whose types it takes."""
    values = {}
    for item in filter(None, argument.split(",")):
        key, equals, text = item.partition("=")
        if key not in defaults:
            near = did_you_mean(key, defaults)
            raise UserError(f"--config: unknown argument {key!r}{near}")
        text = text if equals else "True"
        values[key] = _convert(text, defaults[key], f"--config argument {key!r}")
    return values


def set_field(config: ConfigDict, field: str, text: str) -> None:
    """Sets 'a.b' from text, converted to the type of the present value."""
    node, parts = config, field.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, ConfigDict) or part not in node:
            where = ".".join(["config", *parts[:depth]])
            known = list(node) if isinstance(node, ConfigDict) else []
            near = did_you_mean(part, known)
            raise UserError(f"--config.{field}: {where} has no field {part!r}{near}")
        if depth < len(parts) - 1:
            node = node[part]
    if isinstance(node[parts[-1]], ConfigDict):
        raise UserError(f"--config.{field} is a section; name one of its fields")
    value = _convert(text, node[parts[-1]], f"--config.{field}")
    with node.ignore_type():
        node[parts[-1]] = value


def _convert(text: str, like, what: str):
    if isinstance(like, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if isinstance(like, float) and type(value) is int:
        value = float(value)
    if isinstance(like, tuple) and isinstance(value, list):
        value = tuple(value)
    if like is not None and type(value) is not type(like):
        expected = type(like).__name__
        raise UserError(f"{what}={text}: expected {expected}, as in {like!r}")
    return value


def to_json(config: ConfigDict) -> str:
    """The resolved config as JSON, one field a line."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """Reads what to_json wrote, which may come from anywhere.

    Raises UserError for unknown fields, of another version say, and for wrong types.
    """
    try:
        found = json.loads(text)
        config = default_config(found["model"]["name"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"config.json is not a resolved config: {error!r}") from error
    _update(config, found, "config")
    config.lock()
    return config


def _update(node: ConfigDict, found: Mapping, where: str) -> None:
    if not isinstance(found, Mapping):
        raise UserError(f"config.json: {where}={found!r:.50} is not a section")
    for key, value in found.items():
        if key not in node:
            near = did_you_mean(key, node)
            raise UserError(f"config.json: {where} has no field {key!r:.50}{near}")
        like = node[key]
        if isinstance(like, ConfigDict):
            _update(like, value, f"{where}.{key}")
            continue
        value = tuple(value) if isinstance(value, list) else value
        allowed = (int, float) if isinstance(like, float) else (type(like),)
        # The fields of config.model are checked where it is built.
        if where != "config.model" and type(value) not in allowed:
            raise UserError(
                f"config.json: {where}.{key}={value!r:.50} is not of type "
                f"{type(like).__name__}"
            )
        with node.ignore_type():
            node[key] = value


def shrink(config: ConfigDict) -> ConfigDict:
    """Makes a run tiny, in place, and returns it: what ':debug' of every config does.

    The character stays (attention, adaptive softmax, schedule, optimizer); every size
    is set here, so that runs of one family have equal shapes. Sizes are primes where
    they may be: mixed-up axes then show.
    """
    model, train, evaluation = config.model, config.train, config.eval
    sizes = {"n_layer": 2, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32}
    optional = {"d_embed": 16, "clamp_length": 3, "extended_length": 3, "window": 4}
    optional |= {"table_length": 12, "cutoffs": (11, 19)}  # 12 is segment and memory
    model.update({k: v for k, v in sizes.items() if k in model})
    model.update({k: v for k, v in optional.items() if model.get(k)})
    if model.get("memory_length"):
        model.memory_length = 5
    if model.get("cutoffs"):
        model.div_val = min(model.div_val, 2)
        model.tie_projections = model.tie_projections[: len(model.cutoffs) + 1]
    config.mesh.update(data=1, fsdp=1, tensor=1)  # a batch of two has no more
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
