"""What a model logs beside its nll, and what a step can use of what it returns."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from training_runs import (
    Bag,
    BagConfig,
    StepRun,
    refusal,
    small_config,
)

from xlformer.models import Aux
from xlformer.training import state


@dataclasses.dataclass(frozen=True)
class Talkative(Bag):
    """A bag that logs what it is told to."""

    metrics: tuple = ()

    def apply(self, *args, **kwargs):
        nll_BT, carried, aux = super().apply(*args, **kwargs)
        return nll_BT, carried, Aux(aux.loss, dict(self.metrics))


@pytest.mark.parametrize(
    ("name", "value", "fragment"),
    [
        ("train/loss_nats", 0.0, "of the loop's own"),
        ("norm/grad", 0.0, "of the loop's own"),
        ("spike/ratio", 0.0, "of the loop's own"),
        ("step", 0.0, "of the loop's own"),
        ("my/rows", np.zeros(2), "of shape (2,)"),
        ("my/list", [1.0, 2.0], "of type list: each is one number"),
        ("my/part", {"a": 1.0}, "of type dict: each is one number"),
    ],
)
def test_a_model_overwrites_nothing_that_the_loop_logs(name, value, fragment):
    run = StepRun(small_config(), Talkative(BagConfig(), metrics=((name, value),)))
    make = functools.partial(state.create, run.config, run.model, run.optimizer)
    fresh = jax.eval_shape(make, jax.random.key(0))
    line = refusal(jax.eval_shape, run.function, fresh, run.stream.at(0))
    assert f"Talkative returns aux.metrics['{name}']" in line and fragment in line


@pytest.mark.parametrize(
    ("given", "fragment"),
    [
        (lambda nll_BT: (nll_BT.mean(1), Aux(0.0, {})), "an nll of shape (2,)"),
        (lambda nll_BT: (nll_BT, {}), "{} where Aux(loss, metrics) has its place"),
        (lambda nll_BT: (nll_BT, Aux(0.0, None)), "where Aux(loss, metrics)"),
        (lambda nll_BT: (nll_BT, Aux(nll_BT[0], {})), "aux.loss of shape (7,)"),
    ],
)
def test_what_apply_returns_is_what_a_step_can_use(given, fragment):
    class Odd(Bag):
        def apply(self, *args, **kwargs):
            nll_BT, carried, _ = super().apply(*args, **kwargs)
            nll_BT, aux = given(nll_BT)
            return nll_BT, carried, aux

    run = StepRun(small_config(), Odd(BagConfig()))
    make = functools.partial(state.create, run.config, run.model, run.optimizer)
    fresh = jax.eval_shape(make, jax.random.key(0))
    line = refusal(jax.eval_shape, run.function, fresh, run.stream.at(0))
    assert line.startswith("Odd returns ") and fragment in line


def test_a_model_logs_float32_whatever_its_numbers_are():
    """As their means over micro-batches and devices are."""
    metrics = {"my/flag": True, "my/count": np.int8(100), "my/half": np.float16(2)}
    run = StepRun(
        small_config(), Talkative(BagConfig(), metrics=tuple(metrics.items()))
    )
    make = functools.partial(state.create, run.config, run.model, run.optimizer)
    fresh = jax.eval_shape(make, jax.random.key(0))
    _, found = jax.eval_shape(run.function, fresh, run.stream.at(0))
    assert [found[name].dtype for name in metrics] == [np.float32] * 3
