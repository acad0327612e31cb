"""check_model passes models of other kinds and fails every broken one, by name."""

import dataclasses
import re

import broken_in_training
import broken_models
import jax
import jax.numpy as jnp
import pytest
from broken_models import GATED
from own_model import Gated
from own_trunk import Recurrent, RecurrentConfig

from xlformer import testing
from xlformer.errors import UserError
from xlformer.models import Aux

BROKEN = broken_models.BROKEN | broken_in_training.BROKEN


def check(model):
    testing.check_model(model)


def test_any_trunk_of_layers_passes():
    check(Recurrent(RecurrentConfig()))


class Bidirectional(Gated):
    """Scores each token by the mean of all of its segment: no state, not causal."""

    causal = False
    memory_length = 0
    resets_in_segment = False

    def init_state(self, batch_size, dtype=None):
        return ()

    def state_axes(self):
        return ()

    def apply(self, params, inputs_BT, targets_BT, state, *, lengths_B=None, **options):
        del options
        B, T = inputs_BT.shape
        lengths_B = jnp.broadcast_to(T if lengths_B is None else lengths_B, (B,))
        valid_BT = jnp.arange(T)[None] < lengths_B[:, None]
        x_BTD = jnp.where(valid_BT[..., None], params["table_VD"][inputs_BT], 0)
        mean_BD = x_BTD.sum(1) / jnp.maximum(lengths_B, 1)[:, None]
        log_p_BV = jax.nn.log_softmax(mean_BD @ params["table_VD"].T)
        nll_BT = -jnp.take_along_axis(log_p_BV, targets_BT, axis=1)
        return jnp.where(valid_BT, nll_BT, 0), state, Aux(0.0, {})


def test_a_model_without_a_state_that_reads_both_ways_passes():
    model = Bidirectional(dataclasses.replace(GATED, dropout=0.0))
    check(model)
    with pytest.raises(UserError, match="Bidirectional sees what comes after"):
        model.for_generation()


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_model_fails_by_the_property_it_breaks(kind, monkeypatch):
    """The other properties are left out: each compiles programs of its own."""
    (name,) = re.findall(r"^\w+", BROKEN[kind])
    names = {"segments": ("segments", "single_tokens")}.get(name, (name,))
    mine = [c for c in testing.CHECKS if c.__name__.removeprefix("_check_") in names]
    assert mine or name in ("state", "step")
    monkeypatch.setattr(testing, "CHECKS", mine)
    with pytest.raises(AssertionError, match=f"^{BROKEN[kind]}"):
        check(kind(kind.CONFIG))
