"""Which options of a config do not go together, whatever the model."""

from __future__ import annotations

from ml_collections import ConfigDict

from xlformer import fields
from xlformer.errors import UserError

# The schedule and the optimizer that do nothing without validations in training.
VALIDATED = ("plateau", "nt_asgd")


def check(config: ConfigDict) -> None:
    """Raises UserError for a combination that no run can have; models are not asked."""
    train, optimizer = config.train, config.optimizer
    if train.batch_size % train.micro_batches:
        raise UserError(
            f"config.train.batch_size={train.batch_size} is not divisible by "
            f"config.train.micro_batches={train.micro_batches}"
        )
    defaults = fields.TABLE["optimizer"]
    for field, users in fields.ONLY_OF.items():
        if optimizer[field] != defaults[field].default and optimizer.name not in users:
            raise UserError(
                f"config.optimizer.{field}={optimizer[field]} has no effect with "
                f"{optimizer.name!r}; it belongs to {' and '.join(users)}"
            )
    _check_average(config)
    goes_by = [x for x in (optimizer.schedule, optimizer.name) if x in VALIDATED]
    if goes_by and not train.eval_every:
        raise UserError(
            f"config.train.eval_every=0 with {goes_by[0]!r} in config.optimizer, which "
            "goes by the losses of validations: set eval_every"
        )
    if optimizer.length_scaled and not train.variable_length:
        raise UserError(
            "config.optimizer.length_scaled=True with config.train.variable_length="
            "False: all segments have one length"
        )
    _check_decays(optimizer)


def _check_average(config: ConfigDict) -> None:
    train = config.train
    asked = [x for x in ("ema_decay", "tail_average") if train[x]]
    shown = " and ".join(f"config.train.{name}={train[name]}" for name in asked)
    if config.optimizer.name == "nt_asgd" and asked:
        raise UserError(
            f"{shown} with config.optimizer.name='nt_asgd', which keeps an average of "
            "its own"
        )
    if len(asked) > 1:
        raise UserError(f"{shown}: a run keeps one average of its parameters")


def _check_decays(optimizer) -> None:
    at, steps = optimizer.decay_at, optimizer.schedule == "steps"
    if not all(type(x) in (int, float) and 0 < x < 1 for x in at) or list(at) != sorted(
        set(at)
    ):
        raise UserError(
            f"config.optimizer.decay_at={at!r:.80}: shares of the run, above 0, below "
            "1, each above the one before"
        )
    if bool(at) != steps:
        raise UserError(
            f"config.optimizer.decay_at={at} with config.optimizer.schedule="
            f"{optimizer.schedule!r}: only 'steps' has one, and it needs one"
        )
    factor = fields.TABLE["optimizer"]["decay_factor"].default
    if optimizer.decay_factor != factor and not steps:
        raise UserError(
            f"config.optimizer.decay_factor={optimizer.decay_factor} has no effect "
            f"with schedule={optimizer.schedule!r}; it belongs to 'steps'"
        )
