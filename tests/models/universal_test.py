"""The Universal Transformer: the contract of two forms, and what its paper claims."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import check

from xlformer import models, testing
from xlformer.errors import UserError
from xlformer.models import UniversalConfig

TINY, V, D = 1e-9, 19, 8
FIELDS = dict(vocab_size=V, n_step=2, d_model=D, n_head=2, d_inner=11, dropout=0.0)
GOLDEN = pathlib.Path(check.__file__).parent


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def build(**fields):
    return models.build(UniversalConfig(**FIELDS | fields))


CONTRACT = {
    "memory": dict(
        n_layer=2,
        memory_length=3,
        positions="relative",
        transition="sepconv",
        dropout=0.3,
    ),
    "act": dict(act="accumulate", act_max_steps=3, positions="learned", table_length=30),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_keeps_the_contract(name):
    testing.check_model(build(**CONTRACT[name]))
