"""Any trunk as a language model: what reaches it, and what comes back."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlformer.models import Aux
from xlformer.models.tokens import TokenModel

V, D, B, T = 11, 3, 2, 5
SEEN = []  # what the trunk was called with


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int = V
    d_model: int = D
    dropout: float = 0.0


class Clock(nn.Module):
    """Adds the step to every vector, and counts calls of training."""

    @nn.compact
    def __call__(self, x_BTD, state, *, resets_BT, lengths, step, train, keys):
        SEEN.append({"resets": resets_BT, "lengths": lengths, "keys": keys})
        weight_D = self.param("weight", nn.initializers.ones, (D,))
        y_BTD = x_BTD + weight_D[None, None] * (0 if step is None else step)
        loss = 0.25 * jnp.square(y_BTD).mean() if train else 0.0
        return y_BTD, state + train, Aux(loss, {"clock/mean": y_BTD.mean()})


class Clocked(TokenModel):
    def trunk_module(self, dtype):
        return Clock()

    def init_state(self, batch_size, dtype=None):
        return jnp.zeros((batch_size, 1), jnp.int32)

    def state_axes(self):
        return ("batch", None)


MODEL, IDS_BT = Clocked(Config()), np.arange(B * T).reshape(B, T)
PARAMS = MODEL.init(jax.random.key(0))


def score(model=MODEL, **options):
    arrays = PARAMS, IDS_BT, IDS_BT, model.init_state(B)
    return model.apply(*arrays, **options)


def test_one_plain_table_is_tied_by_default():
    assert jax.tree.map(jnp.shape, PARAMS) == {
        "embedding": {"table": (V, D)},
        "softmax": {"bias": (V,)},
        "trunk": {"weight": (D,)},
    }


def test_step_and_train_reach_the_trunk_and_its_aux_comes_back():
    x_BTD = np.asarray(PARAMS["embedding"]["table"])[IDS_BT]
    for step, train in ((None, False), (3, False), (jnp.int32(3), True)):
        y_BTD = x_BTD + (0 if step is None else 3)
        _, state, aux = score(step=step, train=train)
        loss = 0.25 * np.square(y_BTD).mean() if train else 0
        np.testing.assert_allclose(aux.loss, loss, rtol=1e-6)
        np.testing.assert_allclose(aux.metrics["clock/mean"], y_BTD.mean(), rtol=1e-5)
        assert state.tolist() == [[int(train)]] * B
        trunk = MODEL.trunk.apply(PARAMS, x_BTD, state, step=step, train=train)
        np.testing.assert_allclose(trunk[0], y_BTD, rtol=1e-6)
        np.testing.assert_allclose(trunk[2].loss, loss, rtol=1e-6)
        assert aux.loss.shape == () and aux.loss.dtype == trunk[2].loss.dtype
    log_p_BTV, _ = MODEL.log_probs(PARAMS, IDS_BT, MODEL.init_state(B), step=3)
    nll_BT, *_ = score(step=3)
    found_BT = np.take_along_axis(np.asarray(log_p_BTV), IDS_BT[..., None], 2)[..., 0]
    np.testing.assert_allclose(-found_BT, nll_BT, rtol=1e-5)
    assert np.abs(nll_BT - score()[0]).max() > 1e-3


def test_keys_come_in_training_only_and_one_for_each_row():
    dropping = Clocked(Config(dropout=0.5))
    rngs = {"dropout": jax.random.key(7)}
    score(dropping, rngs=rngs)
    assert SEEN[-1]["keys"] is None
    score(train=True, rngs=rngs)  # draws nothing
    assert SEEN[-1]["keys"] is None
    score(dropping, train=True, rngs=rngs)
    shared, rows_B = SEEN[-1]["keys"]
    assert shared == rngs["dropout"]
    assert [*rows_B] == [jax.random.fold_in(shared, b) for b in range(B)]
    rngs["rows"] = jax.random.split(jax.random.key(8), B)
    score(dropping, train=True, rngs=rngs)
    assert (SEEN[-1]["keys"].rows_B == rngs["rows"]).all()
    with pytest.raises(ValueError, match="needs rngs="):
        score(dropping, train=True)


def test_resets_come_whole_and_lengths_as_they_are():
    nll_BT, *_ = score(resets_BT=np.array([[True], [False]]), lengths_B=[2, 5])
    assert SEEN[-1]["resets"].tolist() == [[True] + [False] * 4, [False] * 5]
    assert SEEN[-1]["lengths"].tolist() == [2, 5]
    assert (nll_BT[0, 2:] == 0).all() and (nll_BT[0, :2] > 0).all()
    assert (nll_BT[1] > 0).all()
    score(lengths_B=3)
    assert SEEN[-1]["lengths"].shape == () and SEEN[-1]["resets"] is None
    with pytest.raises(ValueError, match=r"lengths_B has shape \(2, 1\), expected"):
        score(lengths_B=[[1], [2]])
