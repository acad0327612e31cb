"""The contract of models.base.Model as one test for any model.

    testing.check_model(models.build(config))

Everything is computed in float64, so that a difference is an error and not rounding,
and with weights large enough that what must not be seen would show.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xlformer.models.base import Model

ROWS, TOKENS, SHORT, SEGMENTS = 5, 7, 2, 4
TOLERANCE = 1e-9


def check_model(
    model: Model,
    *,
    key: jax.Array | None = None,
) -> None:
    """Raises AssertionError, naming the property and the difference, unless all hold:

    - state: init_state, what apply returns and state_axes agree; float64 stays float64;
    - rows: no row depends on another, and their order does not matter;
    - causal: no output depends on a later input, bit for bit;
    - resets: a reset row is a fresh row from there, and other rows do not move; what
      it no longer sees may be NaN;
    - padding: lengths_B, one for each row or one number, changes nothing before it;
    - segments: of any sizes, or one token, they equal one pass, as long as none starts
      later than memory_length (not for a memory of under 2 tokens, nor where the model
      says `segments_equal_one_pass` False);
    - gradient: none crosses from one segment to the one before;
    - loops: jit or not, lax.scan over segments or Python, layers scanned or unrolled;
    - log_probs: at the targets it is -nll;
    - cache: the state of to_cache, for segments and for single tokens, scores the same.

    With `resets_in_segment` False only a reset before the segment is tried. Dropout is
    off throughout.

    Args:
      model: small, or this takes long.
      key: for weights and tokens.
    """
    key = jax.random.key(0) if key is None else key
    _check_shapes(model)
    params = jax.jit(model.init)(key)
    with jax.enable_x64(True):
        case = _Case.make(model, params, key)
        for check in CHECKS:
            check(case)


@dataclasses.dataclass(frozen=True)
class _Case:
    """A model with weights, a stream of tokens, and a state that is not empty."""

    model: Model
    params: Any
    inputs_BN: np.ndarray
    targets_BN: np.ndarray
    plain: Any  # (inputs_BT, targets_BT, state) -> nll_BT, state
    full: Any  # (inputs_BT, targets_BT, state, resets_BT, lengths_B) -> nll_BT, state
    fresh: Any  # the state before the first token
    warm: Any  # the state after the first segment

    @classmethod
    def make(cls, model, params, key):
        random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        # Of a square matrix this is 1/sqrt(width).
        noisy = jax.tree.map(
            lambda x: x + random.normal(size=x.shape) * max(x.size, 1) ** -0.25, params
        )
        shape = ROWS, SEGMENTS * TOKENS + 1
        tokens_BN = random.integers(model.vocab_size, size=shape)
        inputs_BN, targets_BN = tokens_BN[:, :-1], tokens_BN[:, 1:]

        @jax.jit
        def full(inputs_BT, targets_BT, state, resets_BT, lengths_B):
            options = dict(resets_BT=resets_BT, lengths_B=lengths_B)
            return model.apply(noisy, inputs_BT, targets_BT, state, **options)[:2]

        @jax.jit
        def plain(inputs_BT, targets_BT, state):
            return model.apply(noisy, inputs_BT, targets_BT, state)[:2]

        fresh = model.init_state(ROWS, jnp.float64)
        nll_BT, warm = plain(inputs_BN[:, :TOKENS], targets_BN[:, :TOKENS], fresh)
        for leaf in filter(_is_float, (nll_BT, *jax.tree.leaves(warm))):
            _require(leaf.dtype == float, f"state: float64 became {leaf.dtype}")
        return cls(model, noisy, inputs_BN, targets_BN, plain, full, fresh, warm)

    def at(self, k: int):
        """Inputs and targets of segment k; `warm` follows number 0."""
        here = slice(k * TOKENS, (k + 1) * TOKENS)
        return self.inputs_BN[:, here], self.targets_BN[:, here]

    def rows(self, state, rows):
        """Some rows of a state."""
        axes = self.model.state_axes()
        return jax.tree.map(
            lambda x, names: jnp.take(x, np.asarray(rows), names.index("batch")),
            *(state, axes),
        )

    def score(self, inputs_BT, targets_BT, state, resets_BT=None, lengths_B=None):
        """`full` with defaults, so that one compiled program serves them all."""
        if resets_BT is None:
            resets_BT = np.zeros(inputs_BT.shape, bool)
        if not self.model.resets_in_segment:
            resets_BT = resets_BT[:, :1]
        if lengths_B is None:
            lengths_B = np.full(len(inputs_BT), inputs_BT.shape[1])
        return self.full(inputs_BT, targets_BT, state, resets_BT, lengths_B)


def _require(holds, message: str):
    if not holds:
        raise AssertionError(message)


def _lost(state):
    """The same with NaN for all numbers: what a reset hides may be that too."""
    return jax.tree.map(lambda x: x * jnp.nan if _is_float(x) else x, state)


def _is_float(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _close(name: str, actual, expected, tolerance: float = TOLERANCE) -> None:
    """Trees of equal shapes and, to the tolerance, values; 0 is bit for bit."""
    trees = jax.tree.structure(actual), jax.tree.structure(expected)
    _require(trees[0] == trees[1], f"{name}: structures {trees[0]} and {trees[1]}")
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for x, y in pairs:
        x, y = np.asarray(x), np.asarray(y)
        _require(x.shape == y.shape, f"{name}: shapes {x.shape} and {y.shape}")
        difference = np.abs(x.astype(float) - y).max(initial=0)
        message = f"{name}: differs by {difference:.3g}, allowed {tolerance:.3g}"
        _require(difference <= tolerance, message)  # A nan is not <= anything.


_same = functools.partial(_close, tolerance=0)


def _check_shapes(model: Model) -> None:
    """By eval_shape, in the model's own dtype."""
    ids_BT = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(lambda: model.init_state(ROWS))
    nll_BT, after, aux = jax.eval_shape(model.apply, params, ids_BT, ids_BT, state)
    _require(nll_BT.shape == ids_BT.shape, f"state: nll_BT is {nll_BT}")
    for leaf in (aux.loss, *aux.metrics.values()):
        _require(leaf.shape == (), f"state: aux must hold scalars, found {leaf}")

    def check_leaf(old, new, axes):
        same = old.shape == new.shape and old.dtype == new.dtype
        _require(same, f"state: {old} became {new}")
        fits = len(axes) == old.ndim and "batch" in axes
        fits = fits and old.shape[axes.index("batch")] == ROWS
        _require(fits, f"state: state_axes gives {axes} for {old}")

    try:
        jax.tree.map(check_leaf, state, after, model.state_axes())
    except ValueError as error:
        raise AssertionError(f"state: structures differ: {error}") from error


def _check_causal(case: _Case) -> None:
    """Row b has another token at places[b]."""
    inputs_BT, targets_BT = case.at(1)
    other_BT, places = inputs_BT.copy(), (0, 2, 3, 5, 6)
    for b, t in enumerate(places):
        other_BT[b, t] = (other_BT[b, t] + 1) % case.model.vocab_size
    before_BT, _ = case.score(inputs_BT, targets_BT, case.warm)
    after_BT, _ = case.score(other_BT, targets_BT, case.warm)
    for b, t in enumerate(places):
        name = f"causal: outputs before a changed token {t}"
        _same(name, after_BT[b, :t], before_BT[b, :t])
        changed = (after_BT[b, t:] != before_BT[b, t:]).any()
        _require(changed, f"causal: no output from token {t} on depends on it")


def _check_rows(case: _Case) -> None:
    inputs_BT, targets_BT = case.at(1)
    nll_BT, state = case.score(inputs_BT, targets_BT, case.warm)
    other_BT, others = inputs_BT.copy(), range(1, ROWS)
    other_BT[0] = (other_BT[0] + 1) % case.model.vocab_size
    other = case.score(other_BT, targets_BT, case.warm)
    name, kept = "rows: others, when row 0 changes", case.rows(state, others)
    _same(name, (other[0][1:], case.rows(other[1], others)), (nll_BT[1:], kept))
    order = np.array([3, 0, 4, 2, 1])
    warm = case.rows(case.warm, order)
    permuted = case.score(inputs_BT[order], targets_BT[order], warm)
    _close("rows: in another order", permuted, (nll_BT[order], case.rows(state, order)))


def _two_segments(case: _Case, state, start_B, resets_BN=None):
    """nll of rows from start_B on, at its place in the stream; 0 before.

    The first segment ends at 2 TOKENS in every row, the next repeats what an extended
    length repeats, with its resets.
    """
    end = 2 * TOKENS
    again_B = np.maximum(start_B, end - case.model.extended_length)
    nll_BN, rows_B1 = np.zeros(case.inputs_BN.shape), np.arange(ROWS)[:, None]
    for begin_B, length_B in ((start_B, end - start_B), (again_B, None)):
        index_BT = begin_B[:, None] + np.arange(TOKENS)[None]
        resets_BT = None if resets_BN is None else resets_BN[rows_B1, index_BT]
        inputs_BT = case.inputs_BN[rows_B1, index_BT]
        targets_BT = case.targets_BN[rows_B1, index_BT]
        nll_BT, state = case.score(inputs_BT, targets_BT, state, resets_BT, length_B)
        nll_BN[rows_B1, index_BT] = nll_BT
    return nll_BN[:, : again_B.min() + TOKENS]


def _check_resets(case: _Case) -> None:
    """Resets at the beginning, inside, at the last token, two in one segment."""
    places = [[], [0], [3], [TOKENS - 1], [2, 5]]
    if not case.model.resets_in_segment:
        places = [[], [0], [], [0], [0]]
    resets_BN = np.zeros(case.inputs_BN.shape, bool)
    for b, row in enumerate(places):
        resets_BN[b, TOKENS + np.array(row, int)] = True
    start_B = np.full(ROWS, TOKENS)
    still_BN = _two_segments(case, case.warm, start_B)
    reset_BN = _two_segments(case, case.warm, start_B, resets_BN)
    first_B = np.array([TOKENS + min(row, default=0) for row in places])
    last_B = np.array([TOKENS + max(row, default=0) for row in places])
    one_BN = _two_segments(case, case.fresh, first_B)
    two_BN = _two_segments(case, case.fresh, last_B)
    for b, row in enumerate(places):
        if not row:
            first_B[b] = last_B[b] = reset_BN.shape[1]
            _same("resets: a row without one", reset_BN[b], still_BN[b])
        first, last, name = first_B[b], last_B[b], f"resets at {row}: nll"
        for where, expected_BN, here in (
            ("before them", still_BN, slice(None, first)),
            ("between them", one_BN, slice(first, last)),
            ("from there on", two_BN, slice(last, 2 * TOKENS)),
            ("of the next segment", two_BN, slice(max(last, 2 * TOKENS), None)),
        ):
            _close(f"{name} {where}", reset_BN[b, here], expected_BN[b, here])
    lost_BN = _two_segments(case, _lost(case.warm), start_B, resets_BN)
    for b, row in enumerate(places):
        if row:
            name, here = f"resets at {row}: nll after a state of NaN", slice(first_B[b])
            _close(name, *(np.delete(x[b], here) for x in (lost_BN, reset_BN)))


def _check_padding(case: _Case) -> None:
    inputs_BT, targets_BT = case.at(1)
    lengths_B = np.array([SHORT, TOKENS, SHORT, 0, SHORT])
    padded = case.score(inputs_BT, targets_BT, case.warm, None, lengths_B)
    whole = case.score(inputs_BT, targets_BT, case.warm)
    short = case.plain(inputs_BT[:, :SHORT], targets_BT[:, :SHORT], case.warm)
    nothing = np.zeros((ROWS, 0)), case.warm
    for rows, expected in (([0, 2, 4], short), ([1], whole), ([3], nothing)):
        nll_BT = np.pad(expected[0], ((0, 0), (0, TOKENS - expected[0].shape[1])))
        _close("padding: nll, 0 where padded", padded[0][rows,], nll_BT[rows])
        states = (case.rows(state, rows) for state in (padded[1], expected[1]))
        _close("padding: state", *states)
    valid_BT = np.arange(TOKENS)[None] < lengths_B[:, None]
    other_BT = np.where(valid_BT, inputs_BT, 0)
    other = case.score(other_BT, targets_BT, case.warm, None, lengths_B)
    _same("padding: what is written there", other, padded)
    # One number for all rows, and the short form of a reset.
    resets_BT = np.zeros((ROWS, TOKENS), bool)
    resets_BT[::2, 0] = True
    lengths_B = np.full(ROWS, SHORT)
    arrays = case.score(inputs_BT, targets_BT, case.warm, resets_BT, lengths_B)
    numbers = case.full(inputs_BT, targets_BT, case.warm, resets_BT[:, :1], SHORT)
    _close("padding: one number and resets [B, 1]", numbers, arrays)


def _segments(case: _Case, sizes, apply):
    """What `apply(first, start, end, state) -> y, state` gives for each segment.

    One after the other, and for all at once. Only as many of the sizes as start within
    the memory; None where nothing is promised.
    """
    model = case.model
    limit = sum(sizes) if model.memory_length is None else model.memory_length
    if limit < 2 or not model.segments_equal_one_pass:
        return None
    state, parts, start = case.fresh, [], 0
    for size in sizes:
        if start <= limit:
            first, end = max(0, start - model.extended_length), start + size
            part, state = apply(first, start, end, state)
            parts.append(part)
            start = end
    return np.concatenate(parts, axis=1), apply(0, 0, start, case.fresh)[0]


def _check_segments(case: _Case) -> None:
    def apply(first, start, end, state):
        targets_BT = case.targets_BN[:, start:end]
        return case.plain(case.inputs_BN[:, first:end], targets_BT, state)

    sizes = SHORT, TOKENS, SHORT
    if found := _segments(case, sizes, apply):
        _close(f"segments: of {sizes} and one pass, nll", *found)


def _check_single_tokens(case: _Case) -> None:
    trunk = jax.jit(functools.partial(case.model.trunk.apply, case.params))
    shape = ROWS, TOKENS, case.model.width
    x_BND = np.random.default_rng(0).normal(size=shape)

    def apply(first, start, end, state):
        y_BTD, state, _ = trunk(x_BND[:, first:end], state)
        return y_BTD[:, start - first :], state

    if found := _segments(case, [1] * TOKENS, apply):
        _close("segments: the trunk by single tokens and in one pass", *found)


def _check_gradient(case: _Case) -> None:
    def both(state, params):
        """Of a gradient to the state given, and one out of the state returned."""
        nll_BT, _, aux = case.model.apply(case.params, *case.at(1), state)
        _, after, _ = case.model.apply(params, *case.at(1), case.warm)
        carried = sum(x.sum() for x in jax.tree.leaves(after) if _is_float(x))
        return nll_BT.sum() + aux.loss + carried

    grad = jax.jit(jax.grad(both, argnums=(0, 1), allow_int=True))
    names = "to the state given", "from the state returned to the weights"
    for name, tree in zip(names, grad(case.warm, case.params), strict=True):
        leaves = [x for x in jax.tree.leaves(tree) if _is_float(x)]
        _same(f"gradient: {name}", leaves, [np.zeros(x.shape) for x in leaves])


def _check_loops(case: _Case) -> None:
    model, apply = case.model, functools.partial(case.model.apply, case.params)
    nll_BT, state = case.plain(*case.at(1), case.warm)
    eager = apply(*case.at(1), case.warm)[:2]
    _close("loops: without jit", eager, (nll_BT, state))
    next_BT, last = case.plain(*case.at(2), state)

    def body(state, segment):
        nll_BT, state, _ = apply(*segment, state)
        return state, nll_BT

    segments = jax.tree.map(lambda *x: np.stack(x), case.at(1), case.at(2))
    scanned = jax.jit(functools.partial(lax.scan, body))(case.warm, segments)
    looped = last, np.stack([nll_BT, next_BT])
    _close("loops: lax.scan over segments", scanned, looped)
    if hasattr(model.config, "scan_layers"):
        flipped = not model.config.scan_layers
        config = dataclasses.replace(model.config, scan_layers=flipped)
        other = dataclasses.replace(model, config=config)
        found = jax.jit(other.apply)(case.params, *case.at(1), case.warm)[:2]
        _close(f"loops: scan_layers={flipped}", found, (nll_BT, state))


def _check_log_probs(case: _Case) -> None:
    inputs_BT, targets_BT = case.at(1)
    nll_BT, state = case.plain(inputs_BT, targets_BT, case.warm)
    log_probs = jax.jit(functools.partial(case.model.log_probs, case.params))
    log_probs_BTV, after = log_probs(inputs_BT, case.warm)
    at_BT = np.take_along_axis(np.asarray(log_probs_BTV), targets_BT[..., None], 2)
    _close("log_probs: at the targets, and -nll", at_BT[..., 0], -nll_BT)
    _close("log_probs: state", after, state)


def _check_cache(case: _Case) -> None:
    """Far enough for every slot to be written and to be forgotten."""
    resets_BT, lengths_B = np.zeros((ROWS, TOKENS), bool), [SHORT, TOKENS, 0, SHORT, 1]
    resets_BT[np.arange(ROWS - 1), [0, 3, TOKENS - 1, 0]] = True
    options = (resets_BT, None), (None, np.array(lengths_B)), ()
    segments = [(case.score, case.at(k), x) for k, x in enumerate(options, 1)]
    tokens, rows_B1 = [], np.arange(ROWS)[:, None]
    for t in range(TOKENS, SEGMENTS * TOKENS):
        token = case.inputs_BN[:, [t]], case.targets_BN[:, [t]]
        tokens.append((case.full, token, (rows_B1 == t - TOKENS, None)))
    for longest, calls in ((TOKENS, segments), (1, tokens)):
        cache = case.model.to_cache(case.params, case.warm, segment_length=longest)
        states = case.warm, cache
        for i, (score, arrays, options) in enumerate(calls):
            found = [score(*arrays, state, *options) for state in states]
            _close(f"cache of {longest}: nll of call {i}", found[1][0], found[0][0])
            states = [state for _, state in found]
        score, (inputs_BT, targets_BT), _ = calls[0]
        resets_BT = np.zeros(inputs_BT.shape, bool)
        resets_BT[:, 0] = True
        lost = case.model.to_cache(
            case.params, _lost(case.warm), segment_length=longest
        )
        nll = [
            score(inputs_BT, targets_BT, state, resets_BT, None)[0]
            for state in (lost, case.fresh)
        ]
        _close(f"cache of {longest}: nll after a reset of NaN", *nll)


CHECKS = (
    _check_rows,
    _check_causal,
    _check_padding,
    _check_resets,
    _check_segments,
    _check_single_tokens,
    _check_gradient,
    _check_loops,
    _check_log_probs,
    _check_cache,
)
