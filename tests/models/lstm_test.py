"""LSTM models: the contract with everything on, what is drawn, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlformer import models, testing
from xlformer.models import LSTMConfig

EVERYTHING = LSTMConfig(
    vocab_size=23,
    n_layer=2,
    d_model=8,
    d_hidden=11,
    cutoffs=(7, 13),
    dropout=0.3,
    hidden_dropout=0.2,
    input_dropout=0.2,
    word_dropout=0.3,
    weight_dropout=0.4,
    activation_penalty=2.0,
    temporal_penalty=1.0,
)


def test_it_keeps_the_contract_with_everything_on():
    testing.check_model(models.build(EVERYTHING))
