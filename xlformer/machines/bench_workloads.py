"""What xlformer.bench times: a training step, scoring, generation, matrix products.

The tokens are random, with the frequencies of words (Zipf's law): an adaptive softmax
then works as much as it does on a text, and no data is needed.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from xlformer import scoring, sharding
from xlformer.generation import continuation
from xlformer.layers.adaptive import frequencies
from xlformer.machines import rehearsal
from xlformer.machines.bench_timing import Timing, clocks
from xlformer.models import Model
from xlformer.training.compiling import TrainingStep

# Segments of one timed evaluation: the cost of a call is spread over them, as it is
# when a text is scored.
MOST_SEGMENTS = 16
TOKENS = 64  # of each row of one timed generation
PROMPT = 17
# The matrix products of one call have so many FLOPs that starting the call costs
# nothing beside them, in at least 2 and at most 64 rounds.
PRODUCT_FLOPS, LEAST_ROUNDS, MOST_ROUNDS = 2e10, 2, 64


def train(name: str, config, model: Model, mesh) -> Timing:
    """The training step as `xlformer.train` compiles it."""
    rows, T = config.train.batch_size, config.train.segment_length
    sharding.check(config, mesh)
    model.check_mesh(mesh)
    batch = rehearsal.batch(config, model)
    # Tracing counts as compiling: a start waits for both.
    start = time.perf_counter()
    step = TrainingStep(config, model, mesh)
    compiled = step.compile(batch)
    compile_seconds = time.perf_counter() - start
    # Made where it will lie: a state that is put there may share buffers with what it
    # was made of, and donating it deletes both.
    state = jax.jit(step.create, out_shardings=step.placed)(_key(config))
    for field in ("inputs_BT", "targets_BT"):
        batch[field] = tokens(model.vocab_size, batch[field].shape)

    def run(times: int):
        nonlocal state
        pending, start = None, clocks()
        for _ in range(times):
            state, found = compiled(state, batch)
            # Two steps in flight at most. 60 steps of 8 virtual CPU devices on 2 cores,
            # none of them awaited, stood still in 5 of 5 runs (jax 0.10.2).
            if pending is not None:
                pending.block_until_ready()
            pending = found["train/loss_nats"]
        pending.block_until_ready()
        return clocks() - start

    counted = model.flops(batch_size=rows, segment_length=T)
    timing = Timing(
        name,
        run,
        tokens=rows * T,
        at_once=rows * T // config.train.micro_batches,
        flops=counted and counted.training,
        compile_seconds=compile_seconds,
    )
    timing.account(compiled)
    return timing


def evaluate(name: str, config, model: Model, mesh) -> Timing:
    """Scoring with the settings of config.eval and the cached form of the state."""
    settings = config.eval
    model = scoring.EvalSettings().filled(settings).model(model)
    params = _parameters(model, mesh, _key(config))
    rows, T = settings.batch_size, settings.segment_length
    # One call, of as many segments as `xlformer.evaluate` puts into one.
    segments = min(MOST_SEGMENTS, max(1, scoring.TOKENS_PER_CALL // (rows * T)))
    evaluator = scoring.Evaluator(
        model, batch_size=rows, segment_length=T, steps=segments, mesh=mesh
    )
    start = time.perf_counter()
    compiled = evaluator.compile(params)
    compile_seconds = time.perf_counter() - start
    text = tokens(model.vocab_size, (rows * (segments * T + 1),))
    # Rows start cold, so that no token goes through the model unscored.
    plan = scoring.cut_rows_for(
        model, len(text), batch_size=rows, segment_length=T, warmup="none"
    )

    def run(times: int):
        start = clocks()
        for _ in range(times):
            evaluator.score(params, text, plan)
        return clocks() - start

    counted = model.flops(batch_size=rows, segment_length=T, cached=True)
    timing = Timing(
        name,
        run,
        steps=segments,
        tokens=rows * T,
        at_once=rows * T,
        flops=counted and counted.forward,
        compile_seconds=compile_seconds,
    )
    # Of a segment: what is in a loop the compiler counts once, whatever its rounds.
    timing.account(compiled)
    return timing


def generate(name: str, config, model: Model, mesh) -> Timing:
    """Generation of config.eval.batch_size rows after a short prompt.

    The first block is not timed: before it the prompt is read and the cache filled.
    """
    model = model.for_generation()
    params = _parameters(model, mesh, _key(config))
    rows = config.eval.batch_size
    prompts = list(tokens(model.vocab_size, (rows, PROMPT)))

    def run(times: int):
        total = np.zeros(2)
        for _ in range(times):
            ends = []
            continuation.generate(
                model,
                params,
                prompts,
                num_tokens=TOKENS,
                mesh=mesh,
                on_tokens=lambda _, ends=ends: ends.append(clocks()),
            )
            # From the end of the first block to the end of the last.
            total += ends[-1] - ends[0]
        return total

    start = time.perf_counter()
    run(1)
    counted = model.flops(batch_size=rows, segment_length=1, cached=True)
    timing = Timing(
        name,
        run,
        steps=TOKENS - continuation.BLOCK,
        tokens=rows,
        at_once=rows,
        flops=counted and counted.forward,
        compile_seconds=time.perf_counter() - start,
    )
    # Of a token, as the compiler counts a loop once.
    timing.account(continuation.compiled_block(model, params, rows=rows, mesh=mesh))
    return timing


WORKLOADS = {"train": train, "eval": evaluate, "generate": generate}


def matrix_products(width: int, dtype, at_once: int, mesh) -> Timing:
    """Products with matrices of [width, 4 * width], on each device with its rows.

    What a device reaches with nothing else to do, at the width of the model: a fairer
    bound than the datasheet, which small or odd sizes do not come near.
    """
    rows, inner = max(1, at_once // mesh.size), 4 * width
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    x_ND = jnp.ones((rows * mesh.size, width), dtype, device=split)
    up_DF = jnp.full((width, inner), 1e-3, dtype, device=sharding.replicated(mesh))
    each = 4.0 * rows * width * inner
    rounds = int(min(MOST_ROUNDS, max(LEAST_ROUNDS, PRODUCT_FLOPS // each)))

    @jax.jit
    def products(x_ND, up_DF):
        def one(x_ND, _):
            return (x_ND @ up_DF) @ up_DF.T, None

        return jax.lax.scan(one, x_ND, length=rounds)[0]

    def run(times: int):
        start = clocks()
        for _ in range(times):
            products(x_ND, up_DF).block_until_ready()
        return clocks() - start

    run(1)
    # All of them at once, as in a step: devices of one CPU share its cores.
    flops = each * rounds * mesh.size
    return Timing("matrix products", run, tokens=rows, flops=flops)


def tokens(vocab_size: int, shape) -> np.ndarray:
    """Random ids, as frequent as words are."""
    rng = np.random.default_rng(0)
    ids = rng.choice(vocab_size, size=shape, p=frequencies(vocab_size))
    return ids.astype(np.int32)


def _key(config) -> jax.Array:
    """A key of the generator that compiles in a tenth of the usual one's time."""
    return jax.random.key(config.seed, impl="rbg")


def _parameters(model: Model, mesh, key: jax.Array):
    abstract = jax.eval_shape(model.init, key)
    placed = sharding.parameters(mesh, abstract, model.param_axes(abstract))
    return jax.jit(model.init, out_shardings=placed)(key)
