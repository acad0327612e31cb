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

ROWS, TOKENS, SHORT = 5, 7, 2
SEGMENTS = 4
TOLERANCE = 1e-9


def check_model(
    model: Model,
    *,
    key: jax.Array | None = None,
    compiler_options: dict | None = None,
) -> None:
    """Raises AssertionError, naming the property and the difference, unless all hold:

    - state: init_state, what apply returns and state_axes agree; float64 stays float64;
    - causal: no output depends on a later input, bit for bit;
    - rows: no row depends on another, and their order does not matter;
    - resets: a reset row is a fresh row from there, and other rows do not move;
    - padding: lengths_B, one for each row or one number, changes nothing before it;
    - segments: of any sizes, or one token, they equal one pass, as long as none starts
      later than memory_length (not for a memory of under 2 tokens, nor where the model
      says `segments_equal_one_pass` False);
    - gradient: none crosses from one segment to the one before;
    - loops: jit or not, lax.scan over segments or Python, layers scanned or unrolled;
    - log_probs: at the targets it is -nll.

    With `resets_in_segment` False only a reset before the segment is tried. Dropout is
    off throughout.

    Args:
      model: small, or this takes long.
      key: for weights and tokens.
      compiler_options: of jax.jit; a dozen programs are compiled.
    """
    key = jax.random.key(0) if key is None else key
    jit = functools.partial(jax.jit, compiler_options=compiler_options)
    _check_shapes(model)
    params = jit(model.init)(key)
    with jax.enable_x64(True):
        case = _Case.make(model, params, key, jit)
        for check in CHECKS:
            check(case)


@dataclasses.dataclass(frozen=True)
class _Case:
    """A model with weights, a stream of tokens, and a state that is not empty."""

    model: Model
    params: Any
    inputs_BN: np.ndarray
    targets_BN: np.ndarray
    jit: Any
    plain: Any  # (inputs_BT, targets_BT, state) -> nll_BT, state
    full: Any  # (inputs_BT, targets_BT, state, resets_BT, lengths_B) -> nll_BT, state
    fresh: Any  # the state before the first token
    warm: Any  # the state after the first segment

    @classmethod
    def make(cls, model, params, key, jit):
        random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        # Of a square matrix this is 1/sqrt(width).
        noisy = jax.tree.map(
            lambda x: x + random.normal(size=x.shape) * max(x.size, 1) ** -0.25, params
        )
        shape = ROWS, SEGMENTS * TOKENS + 1
        tokens_BN = random.integers(model.vocab_size, size=shape)
        inputs_BN, targets_BN = tokens_BN[:, :-1], tokens_BN[:, 1:]

        @jit
        def full(inputs_BT, targets_BT, state, resets_BT, lengths_B):
            options = dict(resets_BT=resets_BT, lengths_B=lengths_B)
            return model.apply(noisy, inputs_BT, targets_BT, state, **options)[:2]

        @jit
        def plain(inputs_BT, targets_BT, state):
            return model.apply(noisy, inputs_BT, targets_BT, state)[:2]

        fresh = model.init_state(ROWS, jnp.float64)
        nll_BT, warm = plain(inputs_BN[:, :TOKENS], targets_BN[:, :TOKENS], fresh)
        for leaf in (nll_BT, *jax.tree.leaves(warm)):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                _require(leaf.dtype == jnp.float64, "state: float64 became", leaf.dtype)
        return cls(model, noisy, inputs_BN, targets_BN, jit, plain, full, fresh, warm)

    @property
    def segment(self):
        """Inputs and targets of the segment that follows `warm`."""
        here = slice(TOKENS, 2 * TOKENS)
        return self.inputs_BN[:, here], self.targets_BN[:, here]

    def score(self, inputs_BT, targets_BT, state, resets_BT=None, lengths_B=None):
        """`full` with defaults, so that one compiled program serves them all."""
        if resets_BT is None:
            resets_BT = np.zeros(inputs_BT.shape, bool)
        if not self.model.resets_in_segment:
            resets_BT = resets_BT[:, :1]
        if lengths_B is None:
            lengths_B = np.full(len(inputs_BT), inputs_BT.shape[1])
        return self.full(inputs_BT, targets_BT, state, resets_BT, lengths_B)


def _require(holds, *message):
    if not holds:
        raise AssertionError(" ".join(map(str, message)))


def _close(name: str, actual, expected, tolerance: float = TOLERANCE) -> None:
    """Trees of equal shapes and, to the tolerance, values; 0 is bit for bit."""
    if jax.tree.structure(actual) != jax.tree.structure(expected):
        raise AssertionError(f"{name}: the structures differ")
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for x, y in pairs:
        x, y = np.asarray(x), np.asarray(y)
        _require(x.shape == y.shape, f"{name}: shapes {x.shape} and {y.shape}")
        if not x.size or np.array_equal(x, y):
            continue
        difference = np.abs(x.astype(float) - y).max()
        _require(  # A nan is not <= anything.
            difference <= tolerance,
            f"{name}: differs by {difference:.3g}, allowed {tolerance:.3g}",
        )


_same = functools.partial(_close, tolerance=0)


def _check_shapes(model: Model) -> None:
    """By eval_shape, in the model's own dtype."""
    ids_BT = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(lambda: model.init_state(ROWS))
    nll_BT, after, aux = jax.eval_shape(model.apply, params, ids_BT, ids_BT, state)
    _require(nll_BT.shape == ids_BT.shape, "state: nll_BT has shape", nll_BT.shape)
    for leaf in (aux.loss, *aux.metrics.values()):
        _require(leaf.shape == (), "state: aux must hold scalars, found", leaf.shape)
    names = [jax.tree.structure(state), jax.tree.structure(after)]
    _require(names[0] == names[1], f"state: {names[0]} became {names[1]}")
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True)
    for before, leaf in pairs:
        same = before.shape == leaf.shape and before.dtype == leaf.dtype
        _require(same, f"state: {before} became {leaf}")

    def check_axes(leaf, axes):
        fits = len(axes) == leaf.ndim and "batch" in axes
        fits = fits and leaf.shape[axes.index("batch")] == ROWS
        _require(fits, f"state: state_axes gives {axes} for {leaf}")

    try:
        jax.tree.map(check_axes, state, model.state_axes())
    except ValueError as error:
        raise AssertionError(f"state: state_axes does not fit: {error}") from error


def _check_causal(case: _Case) -> None:
    """Row b has another token at places[b]."""
    inputs_BT, targets_BT = case.segment
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
    inputs_BT, targets_BT = case.segment
    nll_BT, state = case.score(inputs_BT, targets_BT, case.warm)

    def take(state, rows):
        axes = case.model.state_axes()
        return jax.tree.map(
            lambda x, names: jnp.take(x, rows, names.index("batch")), state, axes
        )

    other_BT, others = inputs_BT.copy(), np.arange(1, ROWS)
    other_BT[0] = (other_BT[0] + 1) % case.model.vocab_size
    other = case.score(other_BT, targets_BT, case.warm)
    _same("rows: other rows, when row 0 changes", other[0][1:], nll_BT[1:])
    _same(
        "rows: other rows' state, when row 0 changes",
        take(other[1], others),
        take(state, others),
    )
    order = np.array([3, 0, 4, 2, 1])
    permuted = case.score(inputs_BT[order], targets_BT[order], take(case.warm, order))
    _close("rows: nll in another order", permuted[0], nll_BT[order])
    _close("rows: state in another order", permuted[1], take(state, order))


def _two_segments(case: _Case, state, start_B, resets_BN=None):
    """nll of rows from start_B on, at its place in the stream.

    The first segment ends at 2 TOKENS in every row, the next repeats what an extended
    length repeats, with its resets.
    """
    end = 2 * TOKENS
    again_B = np.maximum(start_B, end - case.model.extended_length)
    nll_BN, rows_B1 = np.full(case.inputs_BN.shape, np.nan), np.arange(ROWS)[:, None]
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
            _same(
                "resets: a row without one", reset_BN[b, TOKENS:], still_BN[b, TOKENS:]
            )
            continue
        first, last, name = first_B[b], last_B[b], f"resets at {row}: nll"
        before = slice(TOKENS, first)
        _close(f"{name} before them", reset_BN[b, before], still_BN[b, before])
        between = slice(first, last)
        _close(f"{name} between them", reset_BN[b, between], one_BN[b, between])
        here, later = slice(last, 2 * TOKENS), slice(2 * TOKENS, None)
        _close(f"{name} from there on", reset_BN[b, here], two_BN[b, here])
        _close(f"{name} of the next segment", reset_BN[b, later], two_BN[b, later])


def _check_padding(case: _Case) -> None:
    inputs_BT, targets_BT = case.segment
    lengths_B = np.array([SHORT, TOKENS, SHORT, 0, SHORT])
    padded = case.score(inputs_BT, targets_BT, case.warm, None, lengths_B)
    whole = case.score(inputs_BT, targets_BT, case.warm)
    short = case.plain(inputs_BT[:, :SHORT], targets_BT[:, :SHORT], case.warm)
    expected_BT = np.zeros((ROWS, TOKENS))
    expected_BT[:, :SHORT], expected_BT[1], expected_BT[3] = short[0], whole[0][1], 0
    _close("padding: nll, 0 where padded", padded[0], expected_BT)
    state = jax.tree.map(
        lambda s, w, old, axes: _place(s, axes, {1: w, 3: old}),
        *(short[1], whole[1], case.warm, case.model.state_axes()),
    )
    _close("padding: state", padded[1], state)
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


def _place(leaf, axes, rows):
    """The leaf with some rows of others."""
    for b, other in rows.items():
        index = (slice(None),) * axes.index("batch") + (b,)
        leaf = leaf.at[index].set(other[index])
    return leaf


def _sizes(model: Model, sizes) -> list[int]:
    """As many of the sizes as start within the memory; [] where none is promised."""
    memory_length = model.memory_length
    limit = sum(sizes) if memory_length is None else memory_length
    if limit < 2 or not model.segments_equal_one_pass:
        return []
    starts = np.cumsum([0, *sizes[:-1]])
    return [size for start, size in zip(starts, sizes, strict=True) if start <= limit]


def _windows(model: Model, sizes):
    """(first input, first target, end) of each segment."""
    for start, end in zip(np.cumsum([0, *sizes[:-1]]), np.cumsum(sizes), strict=True):
        yield max(0, start - model.extended_length), start, end


def _check_segments(case: _Case) -> None:
    sizes, state, parts = _sizes(case.model, [SHORT, TOKENS, SHORT]), case.fresh, []
    if not sizes:
        return
    N = sum(sizes)
    for first, start, end in _windows(case.model, sizes):
        inputs_BT = case.inputs_BN[:, first:end]
        nll_BT, state = case.plain(inputs_BT, case.targets_BN[:, start:end], state)
        parts.append(nll_BT)
    one_BN, _ = case.plain(case.inputs_BN[:, :N], case.targets_BN[:, :N], case.fresh)
    name = f"segments: sizes {sizes} and one pass, nll"
    _close(name, np.concatenate(parts, axis=1), one_BN)


def _check_single_tokens(case: _Case) -> None:
    """The trunk, one vector at a time."""
    sizes, state, parts = _sizes(case.model, [1] * TOKENS), case.fresh, []
    if not sizes:
        return
    apply = case.jit(functools.partial(case.model.trunk.apply, case.params))
    shape = ROWS, len(sizes), case.model.config.d_model
    x_BND = np.random.default_rng(0).normal(size=shape)
    for first, _, end in _windows(case.model, sizes):
        y_BTD, state = apply(x_BND[:, first:end], state)
        parts.append(y_BTD[:, -1:])
    one_BND, _ = apply(x_BND, case.fresh)
    name = "segments: the trunk by single tokens and in one pass"
    _close(name, np.concatenate(parts, axis=1), one_BND)


def _check_gradient(case: _Case) -> None:
    inputs_BT, targets_BT = case.segment

    def later(params, nudges):
        """All that a later segment can make of the first: its state, and that nudged.

        Differentiated by the weights of the first segment and by the state.
        """
        _, state, _ = case.model.apply(params, inputs_BT, targets_BT, case.warm)
        leaves, tree = jax.tree.flatten(state)
        floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
        carried = sum(x.sum() for x, f in zip(leaves, floating, strict=True) if f)
        nudges = iter(nudges)
        leaves = [
            x + next(nudges) if f else x for x, f in zip(leaves, floating, strict=True)
        ]
        state = jax.tree.unflatten(tree, leaves)
        nll_BT, _, aux = case.model.apply(case.params, inputs_BT, targets_BT, state)
        return nll_BT.sum() + aux.loss + carried

    floats = [x for x in jax.tree.leaves(case.warm) if jnp.issubdtype(x.dtype, float)]
    nudges = [jnp.zeros_like(x) for x in floats]
    weights, states = case.jit(jax.grad(later, argnums=(0, 1)))(case.params, nudges)
    zeros = functools.partial(jax.tree.map, np.zeros_like)
    _same("gradient: through the state to the weights", weights, zeros(weights))
    _same("gradient: to the state", states, zeros(states))


def _check_loops(case: _Case) -> None:
    model, (inputs_BT, targets_BT) = case.model, case.segment
    nll_BT, state = case.plain(inputs_BT, targets_BT, case.warm)
    eager = model.apply(case.params, inputs_BT, targets_BT, case.warm)[:2]
    _close("loops: without jit", eager, (nll_BT, state))
    later = slice(2 * TOKENS, 3 * TOKENS)
    pairs = (
        (inputs_BT, case.inputs_BN[:, later]),
        (
            targets_BT,
            case.targets_BN[:, later],
        ),
    )
    next_BT, last = case.plain(pairs[0][1], pairs[1][1], state)

    @case.jit
    def scan(state, inputs_NBT, targets_NBT):
        def body(state, segment):
            nll_BT, state, _ = model.apply(case.params, *segment, state)
            return state, nll_BT

        return lax.scan(body, state, (inputs_NBT, targets_NBT))

    scanned = scan(case.warm, np.stack(pairs[0]), np.stack(pairs[1]))
    _close(
        "loops: lax.scan over segments", scanned, (last, np.stack([nll_BT, next_BT]))
    )
    if hasattr(model.config, "scan_layers"):
        flipped = not model.config.scan_layers
        config = dataclasses.replace(model.config, scan_layers=flipped)
        other = dataclasses.replace(model, config=config)
        apply = case.jit(functools.partial(other.apply, case.params))
        found = apply(inputs_BT, targets_BT, case.warm)[:2]
        _close(f"loops: scan_layers={flipped}", found, (nll_BT, state))


def _check_log_probs(case: _Case) -> None:
    inputs_BT, targets_BT = case.segment
    nll_BT, state = case.plain(inputs_BT, targets_BT, case.warm)
    log_probs = case.jit(functools.partial(case.model.log_probs, case.params))
    log_probs_BTV, after = log_probs(inputs_BT, case.warm)
    at_BT = np.take_along_axis(np.asarray(log_probs_BTV), targets_BT[..., None], 2)
    _close("log_probs: at the targets, and -nll", at_BT[..., 0], -nll_BT)
    _close("log_probs: state", after, state)


CHECKS = (
    _check_causal,
    _check_rows,
    _check_padding,
    _check_resets,
    _check_segments,
    _check_single_tokens,
    _check_gradient,
    _check_loops,
    _check_log_probs,
)
