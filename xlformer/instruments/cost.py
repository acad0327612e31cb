"""Time per token of a memory, of a window with a cache, and of recomputing the window.

Three ways of reading a text with one model, the same weights and the same attention
length L (Dai et al. 2019, table 9, which has the first against the third):

- recurrent: segments of --segment tokens with the keys and values of L before them;
- window: one token at a time with the keys and values of the L before it, which is
  what an honest sliding window costs;
- recomputed: for each token the L before it are read afresh, without a memory.

The window gives the same numbers as the memory: with relative positions a window whose
keys and values are kept is a memory, and its upper layers know of tokens that have left
it. Absolute positions change as a window slides, so that nothing of it can be kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlformer import config as config_lib
from xlformer import errors, models, progress
from xlformer.errors import Argument, UserError
from xlformer.instruments import cost_tables as tables
from xlformer.instruments import members as members_lib
from xlformer.instruments.cost_tables import PUBLISHED, WAYS
from xlformer.instruments.instrument import Request, Result
from xlformer.machines import bench_timing, bench_workloads, rehearsal
from xlformer.machines.bench_timing import Timing, clocks
from xlformer.models import Model
from xlformer.models.parameters import abstract_params, count

RUNS, SEEDS = True, {}
LENGTHS = {"small": "800,1800,2800,3800", "tiny": "8,16,24"}
CONFIGS = {"small": "enwik8_base", "tiny": "quickstart:debug"}
SEGMENTS = {"small": 128, "tiny": 4}
# Turns, and how long each thing that is timed is repeated in one.
TURNS = {"small": (11, 0.3), "tiny": (2, 0.001)}
MOST = 1 << 20  # tokens of a segment, and of a length
WINDOWED_TOKENS = 32  # read one by one in a timed call


def add_flags(parser) -> None:
    parser.add_argument("--config", help="with random weights; enwik8_base")
    parser.add_argument("--lengths", help=f"of attention; {LENGTHS['small']}")
    parser.add_argument("--segment", type=int, help="tokens that are read at once; 128")


class Subject(NamedTuple):
    """A model to read with, how its weights are made, and what tells it from others."""

    model: Model
    params: Callable[[], Any]
    facts: Mapping[str, Any]
    about: Any  # under which errors name what a person gave


def measure(request: Request) -> Result:
    """Times the three ways at all lengths, in turns."""
    request = request.with_flags(add_flags)
    args = request.args
    size = "small" if request.members else request.size
    lengths = _lengths(LENGTHS[size] if args.lengths is None else args.lengths)
    segment = SEGMENTS[size] if args.segment is None else args.segment
    if not 1 <= segment <= MOST:
        line = f" must be at least 1 and at most {MOST}"
        raise UserError(Argument("segment", segment), line)
    subjects = _subjects(request, size)
    # Before any weights are made: can all of them be read so?
    readers = {}
    for name, subject in subjects.items():
        with subject.about:
            readers |= {
                (name, length, way): reader(subject.model, way, length)
                for length in lengths
                for way in WAYS
            }
    params = {name: subject.params() for name, subject in subjects.items()}
    timings = {
        key: _timing(model, params[key[0]], key[2], segment)
        for key, model in readers.items()
    }
    repeats, seconds = TURNS[size]
    bench_timing.measure(
        [*timings.values()],
        repeats=repeats,
        seconds=seconds,
        progress=progress.Progress("timing"),
    )
    rows = [
        _row(name, length, [timings[name, length, way] for way in WAYS])
        for name in subjects
        for length in lengths
    ]
    fits = tables.fits(rows)
    facts = {
        "models": [subject.facts for subject in subjects.values()],
        "lengths": lengths,
        "segment": segment,
        "rows_read": 1,
        "turns": repeats,
        "measured": rows,
        "lines": fits,
    }
    notes = tables.notes(segment, fits)
    table = tables.table(rows, len(subjects) > 1)
    return Result([table], facts, tables.picture(rows, fits), notes)


def _subjects(request: Request, size: str) -> dict[str, Subject]:
    """The models to read with, by name."""
    spec = request.args.config
    if request.members:
        if spec is not None:
            given = Argument("config", spec), " with ", Argument("workdir")
            raise UserError(*given, ": a run has a model of its own")
        return {
            member.name: Subject(
                member.model,
                lambda x=member: x.params,
                member.facts(),
                members_lib.about(member),
            )
            for member in request.members
        }
    spec = CONFIGS[size] if spec is None else spec
    config = config_lib.load(spec)
    model = models.build(config.model, rehearsal.vocab_size(spec, config))

    def params():  # Random ones, which change no time.
        return jax.jit(model.init)(jax.random.key(config.seed))

    facts = {"config": spec, "parameters": count(abstract_params(model))}
    about = errors.about(Argument("config", spec))
    return {spec: Subject(model, params, facts, about)}


def reader(model: Model, way: str, length: int) -> Model:
    """The model as one of WAYS reads, with this attention length.

    Raises UserError where it has no memory of a length that can be chosen, or cannot do
    without it, or sees less of it.
    """
    fields = {"memory_length": length, "extended_length": 0}
    if way == "recomputed":
        fields = {"memory_length": 0, "extended_length": length - 1}
    line = f"{type(model).__name__} cannot be read in the three ways"
    with errors.about(line):
        model = model.for_reading(**fields)
    # Shorter ones would be timed under the name of this length.
    window = model.card().get("window")
    if window is not None and window < length - 1:
        line += f": its window shows distances up to {window}, which is less than "
        raise UserError(line, Argument("lengths", length))
    return model


def program(model: Model, params, *, segment: int, segments: int):
    """(ids of one row) -> nats of its targets, one compiled call, from an empty state.

    Each of the segments has so many targets, and before them what the model reads
    again.
    """
    before = model.extended_length
    inputs = segment + before

    @jax.jit
    def empty(params):
        state = model.init_state(1, model.dtype(params))
        return model.to_cache(params, state, segment_length=inputs)

    @jax.jit
    def scan(params, state, ids_N):
        index_KI = np.arange(segments)[:, None] * segment + np.arange(inputs)

        def one(state, ids_I):
            nll_1S, state, _ = model.apply(
                params, ids_I[None, :-1], ids_I[None, before + 1 :], state
            )
            return state, nll_1S[0]

        # The inputs of each segment, and one target more.
        index_KI = np.concatenate([index_KI, index_KI[:, -1:] + 1], 1)
        return jax.lax.scan(one, state, jnp.asarray(ids_N)[index_KI])[1].reshape(-1)

    state = jax.block_until_ready(empty(params))
    return lambda ids_N: scan(params, state, ids_N)


def _timing(model: Model, params, way: str, segment: int) -> Timing:
    segment = segment if way == "recurrent" else 1
    segments = WINDOWED_TOKENS if way == "window" else 1
    call = program(model, params, segment=segment, segments=segments)
    needed = segments * segment + model.extended_length + 1
    ids_N = bench_workloads.tokens(model.vocab_size, (needed,))

    def run(times: int):
        start = clocks()
        for _ in range(times):
            jax.block_until_ready(call(ids_N))
        return clocks() - start

    return Timing(way, run, steps=segments * segment)


def _lengths(text: str) -> list[int]:
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        lengths = []
    # A straight line goes through any two points.
    if len(lengths) < 3 or not 1 <= lengths[0] <= lengths[-1] <= MOST:
        line = f": at least three lengths of 1 to {MOST}, such as {LENGTHS['small']}"
        raise UserError(Argument("lengths", text), line)
    return lengths


def _row(name: str, length: int, timings: Sequence[Timing]) -> dict:
    """What one length took; a way for which there is no room has none."""
    row: dict[str, Any] = {"model": name, "length": length}
    row["published"] = PUBLISHED.get(length)
    for timing in timings:
        found = timing.seconds if not timing.out_of_memory else []
        row[timing.name] = statistics.median(found) if found else None
        row[f"{timing.name}_seconds"] = found
    return row
