"""Checks of scoring: what one call gives, and how calls follow each other."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xlformer.models.base import Model
from xlformer.testing.case import (
    ROWS,
    SEGMENTS,
    SHORT,
    STEP,
    TOKENS,
    Case,
    close,
    is_float,
    lost,
    make_rngs,
    require,
    same,
)


def check_shapes(model: Model, params) -> None:
    """State, nll and aux have the promised shapes; by eval_shape, in the own dtype.

    params: the shapes of what `init` gives.
    """
    # Nothing is compiled, so what cannot work is said before seconds have gone by.
    ids_BT = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32)
    for leaf in jax.tree.leaves(params):
        require(leaf.dtype == jnp.float32, f"state: init gives {leaf}, not float32")
    state = jax.eval_shape(lambda: model.init_state(ROWS))
    arrays = params, ids_BT, ids_BT, state
    nll_BT, after, aux = jax.eval_shape(model.apply, *arrays)
    require(nll_BT.shape == ids_BT.shape, f"state: nll_BT is {nll_BT}")
    for leaf in (aux.loss, *aux.metrics.values()):
        require(leaf.shape == (), f"state: aux must hold scalars, found {leaf}")

    def check_leaf(old, new, axes):
        same = old.shape == new.shape and old.dtype == new.dtype
        require(same, f"state: {old} became {new}")
        fits = len(axes) == old.ndim and "batch" in axes
        fits = fits and old.shape[axes.index("batch")] == ROWS
        require(fits, f"state: state_axes gives {axes} for {old}")

    try:
        jax.tree.map(check_leaf, state, after, model.state_axes())
    except ValueError as error:
        raise AssertionError(f"state: structures differ: {error}") from error
    step = jax.ShapeDtypeStruct((), jnp.int32)
    try:
        jax.eval_shape(lambda step, *a: model.apply(*a, step=step), step, *arrays)
    except TypeError as error:  # No such argument, or a number wanted.
        raise AssertionError(
            f"step: apply takes none that is traced: {error}"
        ) from None


def _check_causal(case: Case) -> None:
    """Outputs before a changed token stay; row b has another one at places[b]."""
    # One call tries five places, since rows do not depend on each other (_check_rows).
    inputs_BT, targets_BT = case.at(1)
    other_BT, places = inputs_BT.copy(), (0, 2, 3, 5, 6)
    for b, t in enumerate(places):
        other_BT[b, t] = (other_BT[b, t] + 1) % case.model.vocab_size
    before_BT, _ = case.score(inputs_BT, targets_BT, case.warm)
    after_BT, _ = case.score(other_BT, targets_BT, case.warm)
    if not case.model.causal:
        seen = [
            (after_BT[b, :t] != before_BT[b, :t]).any() for b, t in enumerate(places)
        ]
        require(any(seen), "causal: False, but no output depends on a later input")
        return
    for b, t in enumerate(places):
        name = f"causal: outputs before a changed token {t}"
        # Bit for bit: a hidden key has the weight 0, and not one near 0.
        same(name, after_BT[b, :t], before_BT[b, :t])
        # Else a model that reads nothing would pass.
        changed = (after_BT[b, t:] != before_BT[b, t:]).any()
        require(changed, f"causal: no output from token {t} on depends on it")


def _check_rows(case: Case) -> None:
    """No row depends on another one, nor on its place among them."""
    inputs_BT, targets_BT = case.at(1)
    nll_BT, state = case.score(inputs_BT, targets_BT, case.warm)
    other_BT, others = inputs_BT.copy(), range(1, ROWS)
    other_BT[0] = (other_BT[0] + 1) % case.model.vocab_size
    other = case.score(other_BT, targets_BT, case.warm)
    name, kept = "rows: others, when row 0 changes", case.rows(state, others)
    same(name, (other[0][1:], case.rows(other[1], others)), (nll_BT[1:], kept))
    order = np.array([3, 0, 4, 2, 1])
    warm = case.rows(case.warm, order)
    permuted = case.score(inputs_BT[order], targets_BT[order], warm)
    close("rows: in another order", permuted, (nll_BT[order], case.rows(state, order)))


def _two_segments(case: Case, state, start_B, resets_BN=None):
    """nll of rows from start_B on, at its place in the stream; 0 before.

    The first segment ends at 2 TOKENS in every row, the next repeats what an extended
    length repeats, with its resets.
    """
    end = 2 * TOKENS
    again_B = np.maximum(start_B, end - case.model.extended_length)
    nll_BN, rows_B1 = np.zeros(case.inputs_BN.shape), np.arange(ROWS)[:, None]
    # Each row begins where start_B says, so segments are of one shape and unequal
    # lengths: with padding the program of `full` serves for all of them.
    for begin_B, length_B in ((start_B, end - start_B), (again_B, None)):
        index_BT = begin_B[:, None] + np.arange(TOKENS)[None]
        resets_BT = None if resets_BN is None else resets_BN[rows_B1, index_BT]
        inputs_BT = case.inputs_BN[rows_B1, index_BT]
        targets_BT = case.targets_BN[rows_B1, index_BT]
        nll_BT, state = case.score(inputs_BT, targets_BT, state, resets_BT, length_B)
        nll_BN[rows_B1, index_BT] = nll_BT
    return nll_BN[:, : again_B.min() + TOKENS]


def _check_resets(case: Case) -> None:
    """From a reset on a row is a fresh row, and the other rows do not move.

    Resets lie at the beginning, inside, at the last token, two in one segment.
    """
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
            same("resets: a row without one", reset_BN[b], still_BN[b])
        first, last, name = first_B[b], last_B[b], f"resets at {row}: nll"
        for where, expected_BN, here in (
            ("before them", still_BN, slice(None, first)),
            ("between them", one_BN, slice(first, last)),
            ("from there on", two_BN, slice(last, 2 * TOKENS)),
            ("of the next segment", two_BN, slice(max(last, 2 * TOKENS), None)),
        ):
            close(f"{name} {where}", reset_BN[b, here], expected_BN[b, here])
    # Weights of 0 do not hide NaN: a state of it shows what is read and only masked.
    nan_BN = _two_segments(case, lost(case.warm), start_B, resets_BN)
    for b, row in enumerate(places):
        if row:
            name, here = f"resets at {row}: nll after a state of NaN", slice(first_B[b])
            close(name, np.delete(nan_BN[b], here), np.delete(reset_BN[b], here))


def _check_padding(case: Case) -> None:
    """lengths_B changes nothing before it, and what follows has no effect at all."""
    inputs_BT, targets_BT = case.at(1)
    # A row may be whole, or have nothing at all: its state then stays what it was.
    lengths_B = np.array([SHORT, TOKENS, SHORT, 0, SHORT])
    padded = case.score(inputs_BT, targets_BT, case.warm, None, lengths_B)
    whole = case.score(inputs_BT, targets_BT, case.warm)
    short = case.plain(inputs_BT[:, :SHORT], targets_BT[:, :SHORT], case.warm)
    nothing = np.zeros((ROWS, 0)), case.warm
    for rows, expected in (([0, 2, 4], short), ([1], whole), ([3], nothing)):
        nll_BT = np.pad(expected[0], ((0, 0), (0, TOKENS - expected[0].shape[1])))
        close("padding: nll, 0 where padded", padded[0][rows,], nll_BT[rows])
        states = (case.rows(state, rows) for state in (padded[1], expected[1]))
        close("padding: state", *states)
    valid_BT = np.arange(TOKENS)[None] < lengths_B[:, None]
    other_BT = np.where(valid_BT, inputs_BT, 0)
    other = case.score(other_BT, targets_BT, case.warm, None, lengths_B)
    same("padding: what is written there", other, padded)
    # Training gives one number for all rows, evaluation the short form of a reset: they
    # must mean what the arrays mean.
    resets_BT = np.zeros((ROWS, TOKENS), bool)
    resets_BT[::2, 0] = True
    lengths_B = np.full(ROWS, SHORT)
    arrays = case.score(inputs_BT, targets_BT, case.warm, resets_BT, lengths_B)
    numbers = case.full(inputs_BT, targets_BT, case.warm, resets_BT[:, :1], SHORT)
    close("padding: one number and resets [B, 1]", numbers, arrays)


def _segments(case: Case, sizes, apply):
    """Outputs of segments one after the other, and of one pass over all of them.

    apply(first, start, end, state) -> (y of [start, end), state) reads from `first` on,
    where extended context begins. Only as many of the sizes are taken as start within
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


def _check_segments(case: Case) -> None:
    def apply(first, start, end, state):
        targets_BT = case.targets_BN[:, start:end]
        return case.plain(case.inputs_BN[:, first:end], targets_BT, state)

    sizes = SHORT, TOKENS, SHORT
    if found := _segments(case, sizes, apply):
        close(f"segments: of {sizes} and one pass, nll", *found)


def _check_replay(case: Case) -> None:
    """Extended context leads the first segment too, as in the middle of a text."""
    E = case.model.extended_length
    # With extended context short segments would be one more program to compile.
    for T in (TOKENS,) if E else (TOKENS, SHORT):
        n = case.model.replay(T)
        # A wrong rule shows in few segments; more of them would only take time.
        if n is None or n * T > 12 * TOKENS:
            continue
        shape = ROWS, E + (n + 2) * T + 1
        tokens_BN = np.random.default_rng(1).integers(case.model.vocab_size, size=shape)

        def after(start, T=T, n=n, tokens_BN=tokens_BN):
            """nll of the last segment, and the state before it, from start on."""
            state = case.fresh
            for k in range(start, n + 2):
                before, here = state, tokens_BN[:, k * T :][:, : E + T + 1]
                nll_BT, state = case.plain(here[:, :-1], here[:, E + 1 :], state)
            return nll_BT, before

        close(f"replay: of {n} segments of {T}", after(1), after(0))


def _check_single_tokens(case: Case) -> None:
    """Single tokens give what one pass gives.

    The trunk is compared where there is one: no softmax has made its outputs alike.
    """
    model, shape = case.model, (ROWS, TOKENS, case.model.width or 0)
    x_BND = np.random.default_rng(0).normal(size=shape)

    @jax.jit
    def by_trunk(x_BTD, state):
        return model.trunk.apply(case.params, x_BTD, state, step=STEP)[:2]

    def apply(first, start, end, state):
        if model.trunk is None:
            inputs_BT = case.inputs_BN[:, first:end]
            return case.plain(inputs_BT, case.targets_BN[:, start:end], state)
        y_BTD, state = by_trunk(x_BND[:, first:end], state)
        return y_BTD[:, start - first :], state

    if found := _segments(case, [1] * TOKENS, apply):
        what = "nll" if model.trunk is None else "the trunk"
        close(f"segments: {what} by single tokens and in one pass", *found)


def _check_gradient(case: Case) -> None:
    """No gradient enters a segment through its state, and none leaves it that way."""
    apply = functools.partial(
        case.model.apply, step=STEP, train=True, rngs=make_rngs(1)
    )

    def both(state, params):
        """A sum that depends on the state given, and on the state returned."""
        nll_BT, _, aux = apply(case.params, *case.at(1), state)
        _, after, _ = apply(params, *case.at(1), case.warm)
        carried = sum(x.sum() for x in jax.tree.leaves(after) if is_float(x))
        return nll_BT.sum() + aux.loss + carried

    grad = jax.jit(jax.grad(both, argnums=(0, 1), allow_int=True))
    names = "to the state given", "from the state returned to the weights"
    for name, tree in zip(names, grad(case.warm, case.params), strict=True):
        leaves = [x for x in jax.tree.leaves(tree) if is_float(x)]
        same(f"gradient: {name}", leaves, [np.zeros(x.shape) for x in leaves])


def _check_loops(case: Case) -> None:
    """Python or lax.scan, jit or not, layers scanned or not: the same numbers."""
    model, apply = case.model, functools.partial(case.model.apply, case.params)
    inputs_BT, targets_BT = case.at(1)
    nll_BT, state = case.plain(inputs_BT, targets_BT, case.warm)
    eager = apply(inputs_BT, targets_BT, case.warm, step=int(STEP))[:2]
    close("loops: without jit", eager, (nll_BT, state))
    next_BT, last = case.plain(*case.at(2), state)
    # Two loops in one program, because compiling is what a check costs: layers the
    # other way inside of segments by lax.scan.
    name, other = "loops: lax.scan over segments", model
    if hasattr(model.config, "scan_layers"):
        flipped = not model.config.scan_layers
        config = dataclasses.replace(model.config, scan_layers=flipped)
        other = dataclasses.replace(model, config=config)
        name += f", layers with scan_layers={flipped}"

    def body(state, segment):
        nll_BT, state, _ = other.apply(case.params, *segment, state, step=STEP)
        return state, nll_BT

    segments = jax.tree.map(lambda *x: np.stack(x), case.at(1), case.at(2))
    scanned = jax.jit(functools.partial(lax.scan, body))(case.warm, segments)
    close(name, scanned, (last, np.stack([nll_BT, next_BT])))


def _check_log_probs(case: Case) -> None:
    """log_probs at the targets are -nll, and leave the same state behind."""
    if not case.model.causal or type(case.model).log_probs is Model.log_probs:
        return
    inputs_BT, targets_BT = case.at(1)
    nll_BT, state = case.plain(inputs_BT, targets_BT, case.warm)
    log_probs = functools.partial(case.model.log_probs, case.params, step=STEP)
    log_probs = jax.jit(log_probs)
    log_probs_BTV, after = log_probs(inputs_BT, case.warm)
    at_BT = np.take_along_axis(np.asarray(log_probs_BTV), targets_BT[..., None], 2)
    close("log_probs: at the targets, and -nll", at_BT[..., 0], -nll_BT)
    close("log_probs: state", after, state)


def _check_cache(case: Case) -> None:
    """The cached state scores as the plain one, in segments and in single tokens.

    Both go on for three segments, so that slots are written and forgotten again.
    """
    if type(case.model).to_cache is Model.to_cache:  # the state itself
        return
    to_cache = jax.jit(
        functools.partial(case.model.to_cache, case.params),
        static_argnames="segment_length",
    )
    resets_BT, lengths_B = np.zeros((ROWS, TOKENS), bool), [SHORT, TOKENS, 0, SHORT, 1]
    resets_BT[np.arange(ROWS - 1), [0, 3, TOKENS - 1, 0]] = True
    given = (resets_BT, None), (None, np.array(lengths_B)), ()
    segments = [(case.score, case.at(k), x) for k, x in enumerate(given, 1)]
    tokens, rows_B1 = [], np.arange(ROWS)[:, None]
    for t in range(TOKENS, SEGMENTS * TOKENS):
        token = case.inputs_BN[:, [t]], case.targets_BN[:, [t]]
        tokens.append((case.full, token, (rows_B1 == t - TOKENS, None)))
    for longest, calls in ((TOKENS, segments), (1, tokens)):
        states = [case.warm, to_cache(case.warm, segment_length=longest)]
        for i, (score, arrays, options) in enumerate(calls):
            found = [score(*arrays, state, *options) for state in states]
            close(f"cache of {longest}: nll of call {i}", found[1][0], found[0][0])
            states = [state for _, state in found]
        score, (inputs_BT, targets_BT), _ = calls[0]
        resets_BT = np.zeros(inputs_BT.shape, bool)
        resets_BT[:, 0] = True
        cache = to_cache(lost(case.warm), segment_length=longest)
        nll = [
            score(inputs_BT, targets_BT, state, resets_BT, None)[0]
            for state in (cache, case.fresh)
        ]
        close(f"cache of {longest}: nll after a reset of NaN", *nll)


CHECKS = (
    _check_rows,
    _check_causal,
    _check_padding,
    _check_resets,
    _check_segments,
    _check_single_tokens,
    _check_replay,
    _check_gradient,
    _check_loops,
    _check_log_probs,
    _check_cache,
)
