"""What the checks share: a model with weights and tokens, and how to compare."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlformer.models.base import Model

# Rows and tokens are different primes, so that swapped axes have no shape that fits. A
# stream is four segments long: far enough for a small memory to forget its first slots.
ROWS, TOKENS, SHORT, SEGMENTS = 5, 7, 2, 4
# Of int32 as in training, and not 0: a step that is lost on its way shall show.
STEP = np.int32(11)
# Absolute, in nats and for states: float64 leaves room for other orders of summation,
# and with the weights of `Case.make` one key too many moves results by more.
TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with weights, a stream of tokens, and a state that is not empty.

    Its functions are compiled once for all checks: the arrays of most are [ROWS,
    TOKENS], and compiling is nearly all that a check costs.
    """

    model: Model
    params: Any
    inputs_BN: np.ndarray
    targets_BN: np.ndarray
    plain: Any  # (inputs_BT, targets_BT, state) -> nll_BT, state
    plain_of: Any  # the same of other weights, which come first
    full: Any  # (inputs_BT, targets_BT, state, resets_BT, lengths_B) -> nll_BT, state
    train: Any  # the same and rngs -> nll_BT, state, aux
    fresh: Any  # the state before the first token
    warm: Any  # the state after the first segment

    @classmethod
    def make(cls, model: Model, params, key: jax.Array) -> Case:
        """Makes the case of a model; params are what `init` gives.

        float64 must be enabled while this runs, and while the case is used.
        """
        random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        # Fresh weights are small and biases 0: what must not be seen would hardly move
        # anything. The noise of a square matrix is 1/sqrt(width), which keeps vectors
        # about as long as they are.
        noisy = jax.tree.map(
            lambda x: x + random.normal(size=x.shape) * max(x.size, 1) ** -0.25, params
        )
        shape = ROWS, SEGMENTS * TOKENS + 1
        tokens_BN = random.integers(model.vocab_size, size=shape)
        inputs_BN, targets_BN = tokens_BN[:, :-1], tokens_BN[:, 1:]
        apply = functools.partial(model.apply, noisy)

        # Weights are constants of the three programs, which are compiled once each; the
        # step is an argument, so that a model must take one that is traced.
        @jax.jit
        def full(step, inputs_BT, targets_BT, state, resets_BT, lengths_B):
            options = dict(resets_BT=resets_BT, lengths_B=lengths_B, step=step)
            return apply(inputs_BT, targets_BT, state, **options)[:2]

        @jax.jit
        def plain_of(step, params, inputs_BT, targets_BT, state):
            return model.apply(params, inputs_BT, targets_BT, state, step=step)[:2]

        @jax.jit
        def train(step, inputs_BT, targets_BT, state, resets_BT, lengths_B, rngs):
            options = dict(resets_BT=resets_BT, lengths_B=lengths_B, rngs=rngs)
            options |= dict(step=step, train=True)
            return apply(inputs_BT, targets_BT, state, **options)

        full, plain_of, train = map(_on_host, (full, plain_of, train))
        plain = functools.partial(plain_of, noisy)
        fresh = model.init_state(ROWS, jnp.float64)
        nll_BT, warm = plain(inputs_BN[:, :TOKENS], targets_BN[:, :TOKENS], fresh)
        for leaf in filter(is_float, (nll_BT, *jax.tree.leaves(warm))):
            require(leaf.dtype == float, f"state: float64 became {leaf.dtype}")
        functions = plain, plain_of, full, train
        return cls(model, noisy, inputs_BN, targets_BN, *functions, fresh, warm)

    def at(self, k: int):
        """Inputs and targets of segment k; `warm` follows number 0."""
        here = slice(k * TOKENS, (k + 1) * TOKENS)
        return self.inputs_BN[:, here], self.targets_BN[:, here]

    def rows(self, state, rows):
        """Some rows of a state, along the axis that the model calls 'batch'."""
        axes = self.model.state_axes()
        return jax.tree.map(
            lambda x, names: np.take(np.asarray(x), rows, names.index("batch")),
            state,
            axes,
        )

    def score(self, inputs_BT, targets_BT, state, resets_BT=None, lengths_B=None):
        """`full` with defaults, so that one compiled program serves them all."""
        options = self.options(inputs_BT, resets_BT, lengths_B)
        return self.full(inputs_BT, targets_BT, state, *options)

    def options(self, inputs_BT, resets_BT=None, lengths_B=None):
        """Resets and lengths that change nothing, where none are given."""
        # No reset and whole rows, said by arrays: None would be another program.
        if resets_BT is None:
            resets_BT = np.zeros(inputs_BT.shape, bool)
        if not self.model.resets_in_segment:
            resets_BT = resets_BT[:, :1]
        if lengths_B is None:
            lengths_B = np.full(len(inputs_BT), inputs_BT.shape[1])
        return resets_BT, lengths_B


def _on_host(compiled):
    """Calls `compiled` with STEP and returns the nll in numpy.

    JAX would compile each slice of it that a check looks at.
    """

    def call(*arguments):
        nll_BT, *rest = compiled(STEP, *arguments)
        return np.asarray(nll_BT), *rest

    return call


def make_rngs(seed: int, rows=slice(None)) -> dict:
    """Keys of training, for some of the rows."""
    rows_B = jax.random.split(jax.random.key(seed + 1), ROWS)[rows]
    return {"dropout": jax.random.key(seed), "rows": rows_B}


def require(holds, message: str) -> None:
    """An assertion that holds under `python -O` too, which leaves out `assert`."""
    if not holds:
        raise AssertionError(message)


def lost(state):
    """The same state with NaN for all its floats: a reset has to hide that too."""
    return jax.tree.map(lambda x: x * jnp.nan if is_float(x) else x, state)


def is_float(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def close(name: str, actual, expected, tolerance: float = TOLERANCE) -> None:
    """Trees of equal shapes and, to the tolerance, values; 0 is bit for bit."""
    trees = jax.tree.structure(actual), jax.tree.structure(expected)
    require(trees[0] == trees[1], f"{name}: structures {trees[0]} and {trees[1]}")
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for x, y in pairs:
        x, y = np.asarray(x), np.asarray(y)
        # Before the subtraction, which would broadcast [B, 1] against [B, T].
        require(x.shape == y.shape, f"{name}: shapes {x.shape} and {y.shape}")
        difference = np.abs(x.astype(float) - y).max(initial=0)
        message = f"{name}: differs by {difference:.3g}, allowed {tolerance:.3g}"
        require(difference <= tolerance, message)  # A nan is not <= anything.


same = functools.partial(close, tolerance=0)
