"""What steps_test.py, train_test.py and bad_input_test.py share: models, configs, runs.

`Bag` is the smallest model with a carried state and everything that the step relies on:
it compiles in a tenth of the time, and its state can be counted by hand.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from xlformer import config as config_lib
from xlformer.data.stream import Stream
from xlformer.errors import UserError
from xlformer.kernels.dropout import bernoulli
from xlformer.layers.memory import expand_resets
from xlformer.models import Aux, Model
from xlformer.runs.checkpoints import Checkpoints
from xlformer.training import optimizers, state, steps

PERIOD = "the cat sat on"  # 14 characters, 9 symbols: learnt in a few steps
SYMBOLS = len(set(PERIOD))


@dataclasses.dataclass(frozen=True)
class BagConfig:
    vocab_size: int = 13
    dropout: float = 0.0
    nan_steps: tuple[int, ...] = ()  # where the loss is not a number
    inf_steps: tuple[int, ...] = ()  # where it is infinite and its gradient is not


@dataclasses.dataclass(frozen=True)
class Bag(Model):
    """logits = table[token] + how often each symbol came since the last reset."""

    @property
    def memory_length(self):
        return None

    def init(self, key):
        V = self.vocab_size
        return {"table_VV": 0.1 * jax.random.normal(key, (V, V)), "gain": jnp.zeros(())}

    def init_state(self, batch_size, dtype=None):
        return {"seen_VB": jnp.zeros((self.vocab_size, batch_size), jnp.float32)}

    def state_axes(self):
        return {"seen_VB": ("vocab", "batch")}

    def apply(self, params, inputs_BT, targets_BT, state, *, resets_BT=None,
              lengths_B=None, step=None, train=False, rngs=None):  # fmt: skip
        B, T = inputs_BT.shape
        resets_BT = jnp.zeros((B, 1), bool) if resets_BT is None else resets_BT
        resets_BT = expand_resets(resets_BT, T)
        lengths_B = T if lengths_B is None else lengths_B
        valid_BT = jnp.arange(T)[None] < jnp.broadcast_to(lengths_B, (B,))[:, None]
        keep = 1.0
        if train and self.config.dropout:
            shape = (B, 1, self.vocab_size)
            keep = bernoulli(rngs["rows"], 1 - self.config.dropout, shape)

        def one(seen_BV, column):
            token_B, reset_B, valid_B = column
            new_BV = jax.nn.one_hot(token_B, self.vocab_size) * valid_B[:, None]
            seen_BV = jnp.where(reset_B[:, None], 0, seen_BV) + new_BV
            return seen_BV, seen_BV

        columns = (inputs_BT.T, resets_BT.T, valid_BT.T)
        seen_BV, seen_TBV = jax.lax.scan(one, state["seen_VB"].T, columns)
        seen_BTV = jnp.swapaxes(jnp.log1p(seen_TBV), 0, 1)
        logits_BTV = params["table_VV"][inputs_BT] * keep + params["gain"] * seen_BTV
        log_p_BTV = jax.nn.log_softmax(logits_BTV)
        nll_BT = -jnp.take_along_axis(log_p_BTV, targets_BT[..., None], -1)[..., 0]
        if self.config.nan_steps and step is not None:
            bad = jnp.isin(step, jnp.array(self.config.nan_steps))
            nll_BT = nll_BT * jnp.where(bad, jnp.nan, 1.0)
        if self.config.inf_steps and step is not None:
            bad = jnp.isin(step, jnp.array(self.config.inf_steps))
            nll_BT = nll_BT + jnp.where(bad, jnp.inf, 0.0)
        return (
            jnp.where(valid_BT, nll_BT, 0),
            {"seen_VB": seen_BV.T},
            Aux(jnp.zeros(()), {"bag/seen": seen_BV.sum()}),
        )

    def log_probs(self, params, inputs_BT, state, **options):
        """Its state is its cache too, which drawing must not use up."""

        def nll(token):
            targets_BT = jnp.full_like(inputs_BT, token)
            return self.apply(params, inputs_BT, targets_BT, state)[0]

        nll_VBT = jax.vmap(nll)(jnp.arange(self.vocab_size))
        after = self.apply(params, inputs_BT, inputs_BT, state)[1]
        return -jnp.moveaxis(nll_VBT, 0, -1), after


def bag(**fields):
    return Bag(BagConfig(**fields))


@dataclasses.dataclass(frozen=True)
class Blanks(Model):
    """logits = a row for the symbol before, and one for the symbol after: no state."""

    causal = False
    memory_length = 0

    def init(self, key):
        shape = (self.vocab_size, self.vocab_size)
        before, after = (
            0.1 * jax.random.normal(k, shape) for k in jax.random.split(key)
        )
        return {"before_VV": before, "after_VV": after}

    def init_state(self, batch_size, dtype=None):
        return ()

    def state_axes(self):
        return ()

    def apply(self, params, inputs_BT, targets_BT, state, *, resets_BT=None,
              lengths_B=None, step=None, train=False, rngs=None):  # fmt: skip
        nothing_BTV = jnp.zeros((inputs_BT.shape[0], 1, self.vocab_size))
        before_BTV = params["before_VV"][inputs_BT[:, :-1]]
        after_BTV = params["after_VV"][inputs_BT[:, 1:]]
        logits_BTV = jnp.concatenate([nothing_BTV, before_BTV], 1)
        logits_BTV += jnp.concatenate([after_BTV, nothing_BTV], 1)
        log_p_BTV = jax.nn.log_softmax(logits_BTV)
        nll_BT = -jnp.take_along_axis(log_p_BTV, targets_BT[..., None], -1)[..., 0]
        return nll_BT, (), Aux(jnp.zeros(()), {})


def blanks(vocab_size):
    return Blanks(BagConfig(vocab_size))


def small_config(**train):
    """For steps: two layers, nothing random, sgd without clipping."""
    config = config_lib.load("quickstart:debug")
    config.train.update(steps=17, **train)
    config.optimizer.update(name="sgd", learning_rate=0.1, schedule="constant")
    config.optimizer.update(warmup_steps=0, clip_norm=0.0)
    return config


TOKENS = np.random.default_rng(3).integers(0, 13, 601).astype(np.uint8)


class StepRun:
    """A config's step, compiled, and the states that it goes through."""

    def __init__(self, config, model=None):
        self.config, self.model = config, model or bag()
        self.optimizer = optimizers.build(config.optimizer, self.model.matrices)
        self.schedule = optimizers.learning_rate(config.optimizer, config.train.steps)
        self.function = steps.make_step(
            config, self.model, self.optimizer, self.schedule
        )
        self.traced = 0
        self.step = jax.jit(self._count)
        self.stream = Stream(
            TOKENS,
            batch_size=config.train.batch_size,
            segment_length=config.train.segment_length,
            variable_length=config.train.variable_length,
            seed=config.seed,
        )

    def _count(self, state, batch):
        self.traced += 1
        return self.function(state, batch)

    def create(self):
        make = functools.partial(state.create, self.config, self.model, self.optimizer)
        return jax.jit(make)(jax.random.key(5))

    def states(self, n, start=None):
        """Fresh or given state, then the one after each of n steps; and the metrics."""
        found, logged = [start or self.create()], []
        for k in range(n):
            after, values = self.step(found[-1], self.stream.at(k))
            found.append(after)
            logged.append(values)
        return found, logged


def write_text(path, repeats=61):
    path.write_text(PERIOD * repeats, encoding="utf-8")
    return path


def text_config(text, **train):
    """For runs: the same on a file of characters; 24 steps, all kinds of events."""
    config = config_lib.load(f"text:path={text},unit=chars,debug")
    config.train.update(steps=24, save_every=6, eval_every=8, log_every=2)
    config.train.update(**train)
    config.optimizer.update(learning_rate=0.02, schedule="constant")
    return config


def everything(config):
    """Whatever has a state that a resumed run must find again."""
    config.model.scan_layers = True
    config.model.dropout = 0.1
    config.train.update(variable_length=True, ema_decay=0.75, segments_per_call=2)
    config.optimizer.update(schedule="plateau", plateau_factor=0.75)
    return config


def final_state(workdir, config, model):
    """(step, state, config) of the latest checkpoint of a run."""
    optimizer = optimizers.build(config.optimizer, model.matrices)
    create = functools.partial(state.create, config, model, optimizer)
    abstract = jax.eval_shape(create, jax.random.key(0))
    return Checkpoints(workdir / "checkpoints", read_only=True).restore(abstract)


def assert_same(a, b):
    """Bit for bit, whatever the tree."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert x.dtype == y.dtype
        where = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=where)


def assert_close(a, b, atol=1e-6, rtol=0.0):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=where)


def refusal(call, *args, **kwargs) -> str:
    """The line of the UserError that a call must raise."""
    try:
        call(*args, **kwargs)
    except UserError as error:
        return str(error)
    raise AssertionError("no UserError")
