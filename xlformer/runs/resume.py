"""What a run that is called again may change, and what it then says.

The config that a checkpoint was sealed with is the truth about its numbers. fields.py
says of each option whether another value is refused, taken from here on, or free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from xlformer import config as config_lib
from xlformer import models
from xlformer.errors import Argument, UserError
from xlformer.fields import FREE, REFUSED, TAKEN, UNSAID, Rule
from xlformer.models import own
from xlformer.runs.checkpoints import Checkpoints

# Fields that the learning rate depends on: where one of them changes, the line says
# which rate comes next. The number of steps is one of them, since a cosine ends there.
RATE = (
    "train.steps",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.decay_at",
    "optimizer.decay_factor",
    "optimizer.final_fraction",
)


def own_name(model: models.Model | None) -> str:
    """config.own_model: the class of a model of one's own, '' for one of models.MODELS.

    The fields of config.model mean nothing for such a model. Raises UserError for what
    is no model.
    """
    if model is None or type(model) in models.MODELS.values():
        return ""
    own.check(model)
    return type(model).__qualname__


def sealed(workdir, checkpoints: Checkpoints) -> ConfigDict | None:
    """The config of the newest checkpoint of a run; None where there is none.

    Raises UserError where the directory holds weights that no run can go on from.
    """
    for step in reversed(checkpoints.steps()):
        try:
            names, found = checkpoints.contents(step), checkpoints.config(step)
        except UserError:  # Damaged: restoring says so, and takes the one before it.
            continue
        if "step" not in names:
            raise UserError(
                Argument("workdir", workdir),
                " holds weights and no training to go on with: train in a new "
                "directory, with ",
                Argument("init_from", workdir),
            )
        return config_lib.from_dict(found, where=f"{workdir}: config of step {step}")
    return None


def check(workdir, old: ConfigDict, new: ConfigDict) -> None:
    """Raises UserError if `new` would make something else of the run `old`."""
    for name, rule, was, wanted in _changes(old, new):
        if not _refused(rule, was, wanted):
            continue
        hint = (
            "what is trained already would mean something else; a new directory with ",
            Argument("init_from", workdir),
            " starts from its weights",
        )
        if old.init_from and not new.init_from and name.startswith("model."):
            began = Argument("init_from", old.init_from)
            hint = ("the run began with ", began, ": pass it again")
        if name == "own_model":
            hint = (
                "train(config, workdir, model=...) needs the model that it began with",
            )
        raise UserError(
            Argument("workdir", workdir),
            f" was trained with config.{name}={was!r}, now it is {wanted!r}: ",
            *hint,
        )


def gone_on(old: ConfigDict, new: ConfigDict) -> ConfigDict:
    """`new` for a run that has begun as `old`: where it began is not changed any more.

    Nor is the least count of a word, where none is given: its default was 1 once.
    """
    config = ConfigDict(new.to_dict())
    config.init_from = old.init_from
    config.data.min_count = new.data.min_count or old.data.min_count
    config.lock()
    return config


def lines(
    old: ConfigDict, new: ConfigDict, step: int, rate: Callable[[ConfigDict], float]
) -> list[str]:
    """What is taken over from `new` at `step`, one line each.

    rate: the next step's learning rate with a config.
    """
    said = []
    for name, rule, was, wanted in _changes(old, new):
        if rule.resume == TAKEN:
            line = f"from step {step} on config.{name}={wanted!r}, before {was!r}"
            if name in RATE:
                rates = [rate(config) for config in (old, new)]
                line += f": the next step's rate is {rates[1]:.4g}"
                line += f", not {rates[0]:.4g}" * (rates[0] != rates[1])
            elif name.startswith("eval."):
                line += (
                    ": validations before and after do not compare, 'best' and the "
                    "plateau begin anew"
                )
            said.append(line)
    return said


def complete(old: ConfigDict, new: ConfigDict, step: int) -> str:
    """The line that says that nothing is left to do, so that nothing has changed."""
    total = new.train.steps
    line = f"the run is complete: it has taken {step} steps"
    line += f", and config.train.steps={total} asks for no more" if total < step else ""
    names = [name for name, rule, *_ in _changes(old, new) if rule.resume == TAKEN]
    names = [f"config.{name}" for name in names if name != "train.steps"]
    return line + (f"; {', '.join(names)} changed nothing" if names else "")


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """'config.a.b=1 (2 there)' for each field that no run may change: `new` is here."""
    return [
        f"config.{name}={wanted!r} ({was!r} there)"
        for name, rule, was, wanted in _changes(old, new)
        if _refused(rule, was, wanted)
    ]


def with_free_fields(old: ConfigDict, new: ConfigDict) -> ConfigDict:
    """`old` with what does not touch its numbers as in `new`: where things lie."""
    found = ConfigDict(old.to_dict())
    for name, rule, _, wanted in _changes(old, new):
        section, _, field = name.rpartition(".")
        if rule.resume == FREE and section != "model":
            with found.ignore_type():
                (found[section] if section else found)[field] = wanted
    found.lock()
    return found


def _changes(old: ConfigDict, new: ConfigDict):
    """(name, rule, old value, new value) of each field that differs."""
    before, after = config_lib.flat(old), config_lib.flat(new)
    # A model of one's own does not read config.model.
    own = new.own_model or old.own_model not in ("", UNSAID)
    if old.model.name != new.model.name and not own:
        yield "model.name", Rule(REFUSED), old.model.name, new.model.name
        return
    rules: Mapping[str, Rule] = config_lib.rules(new)
    for name, rule in rules.items():
        if own and name.startswith("model."):
            continue
        if name == "own_model" and before[name] == UNSAID:
            continue
        if before[name] != after[name]:
            yield name, rule, before[name], after[name]


def _refused(rule: Rule, was, wanted) -> bool:
    # A switch may have another value, but not be turned on or off: something would be
    # missing in the state, or too much (an average of the parameters, for example).
    switched = rule.switch and bool(was) != bool(wanted)
    return rule.resume == REFUSED or switched
