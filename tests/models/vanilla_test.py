"""The vanilla Transformer: the contract, its auxiliary losses, its sliding window."""

import jax
import pytest

from xlformer import models, testing
from xlformer.models import VanillaConfig

SIZES = dict(n_layer=3, d_model=8, n_head=2, d_inner=11, context_length=30)
RATES = dict(dropout=0.3, attention_dropout=0.2)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def build(**fields):
    return models.build(VanillaConfig(**{**SIZES, "vocab_size": 19, **fields}))


def test_keeps_the_contract_with_all_auxiliary_losses():
    testing.check_model(build(**RATES, loss_steps=23))
