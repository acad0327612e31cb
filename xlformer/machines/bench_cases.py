"""What xlformer.bench times: a training step, scoring, generation, matrix products.

Random tokens with the frequencies of words (Zipf's law), so no data is needed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from xlformer import models, runs, scoring, sharding
from xlformer.generation import continuation as generation
from xlformer.layers.adaptive import frequencies
from xlformer.machines import rehearsal
from xlformer.models.base import compute_dtype

MOST_SEGMENTS = 16  # of one timed evaluation
TOKENS = 64  # of one timed generation
PROMPT = 17


@dataclasses.dataclass
class Case:
    """One thing to time.

    Attributes:
      run: does it so many times, with two calls of the device in flight at most;
        returns a difference of clocks().
      steps: of one run: batches of training, segments of evaluation, tokens a row of
        generation. All that is counted and measured is of a step.
      tokens, flops: of all rows.
      at_once: tokens that go through a layer together.
      memory: bytes that the compiled program takes on a device, None if not known.
      accessed: bytes by the compiler's count, which sees only operands of kernels.
      seconds, host_seconds: measured.
      out_of_memory: what the device said, if it was too small.
    """

    name: str
    run: Callable[[int], np.ndarray] | None = None
    steps: int = 1
    tokens: int = 0
    at_once: int = 0
    flops: float = 0.0
    compile_seconds: float = 0.0
    memory: int | None = None
    accessed: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    host_seconds: list[float] = dataclasses.field(default_factory=list)
    out_of_memory: str = ""

    def account(self, compiled) -> None:
        """Reads memory and traffic from the compiled program of a step."""
        if compiled is None:
            return
        stats, cost = compiled.memory_analysis(), compiled.cost_analysis()
        new = stats.output_size_in_bytes - stats.alias_size_in_bytes
        self.memory = stats.argument_size_in_bytes + stats.temp_size_in_bytes
        self.memory += max(0, new)
        if cost and "bytes accessed" in cost:
            self.accessed = cost["bytes accessed"]


def clocks() -> np.ndarray:
    """Seconds, and those that this thread worked: it feeds the device."""
    return np.array([time.perf_counter(), time.thread_time()])


def train_case(name, config, vocab_size, mesh) -> Case:
    """The training step as `xlformer.train` compiles it."""
    train = config.train
    sharding.check(config, mesh)
    model = models.build(config.model, vocab_size=vocab_size)
    step = rehearsal.step(config, model, mesh)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = step.function.lower(step.abstract, step.batch).compile()
    compile_seconds = time.perf_counter() - start
    state = step.create(_key(config))
    batch = dict(step.batch)
    for key in ("inputs_BT", "targets_BT"):
        batch[key] = tokens(vocab_size, batch[key].shape)

    def run(times: int):
        nonlocal state
        pending, start = None, clocks()
        for _ in range(times):
            state, found = compiled(state, batch)
            if pending is not None:
                pending.block_until_ready()
            pending = found["train/loss_nats"]
        pending.block_until_ready()
        return clocks() - start

    counted = model.flops(
        batch_size=train.batch_size, segment_length=train.segment_length
    )
    case = Case(
        name,
        run,
        tokens=train.batch_size * train.segment_length,
        at_once=train.batch_size * train.segment_length // train.micro_batches,
        flops=counted.training,
        compile_seconds=compile_seconds,
    )
    case.account(compiled)
    return case


def eval_case(name, config, vocab_size, mesh) -> Case:
    """Scoring with the settings of config.eval and the cached form of the memory."""
    settings = config.eval
    visible = {
        "memory_length": settings.memory_length,
        "clamp_length": settings.clamp_length,
        "same_length": settings.same_length or None,
    }
    model = runs.for_reading(models.build(config.model, vocab_size=vocab_size), visible)
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
    text = tokens(vocab_size, (rows * (segments * T + 1),))
    plan_ = scoring.plan_for(
        model,
        len(text),
        batch_size=rows,
        segment_length=T,
        warmup="none",
    )

    def run(times: int):
        start = clocks()
        for _ in range(times):
            evaluator.score(params, text, plan_)
        return clocks() - start

    counted = model.flops(batch_size=rows, segment_length=T, cached=True)
    case = Case(
        name,
        run,
        steps=segments,
        tokens=rows * T,
        at_once=rows * T,
        flops=counted.forward,
        compile_seconds=compile_seconds,
    )
    # What is in a loop the compiler counts once, whatever its rounds: of a segment.
    case.account(compiled)
    return case


def generate_case(name, config, vocab_size, mesh) -> Case:
    """config.eval.batch_size rows after a short prompt.

    The first block is not timed: before it the prompt is read and the cache filled.
    """
    model = models.build(config.model, vocab_size=vocab_size)
    model = generation.for_generation(model)
    params = _parameters(model, mesh, _key(config))
    rows = config.eval.batch_size
    prompts = list(tokens(vocab_size, (rows, PROMPT)))

    def run(times: int):
        total = np.zeros(2)
        for _ in range(times):
            ends = []
            generation.generate(
                model,
                params,
                prompts,
                num_tokens=TOKENS,
                mesh=mesh,
                on_tokens=lambda _, ends=ends: ends.append(clocks()),
            )
            total += ends[-1] - ends[0]
        return total

    start = time.perf_counter()
    run(1)
    counted = model.flops(batch_size=rows, segment_length=1, cached=True)
    case = Case(
        name,
        run,
        steps=TOKENS - generation.BLOCK,
        tokens=rows,
        at_once=rows,
        flops=counted.forward,
        compile_seconds=time.perf_counter() - start,
    )
    # Of a token, as the compiler counts a loop once.
    case.account(generation.compiled_block(model, params, rows=rows, mesh=mesh))
    return case


CASES = {"train": train_case, "eval": eval_case, "generate": generate_case}


def matmul_case(config, at_once: int, mesh) -> Case:
    """Products of the shapes of the feed-forward layers, on each device its rows."""
    fields = config.model
    dtype = compute_dtype(fields.dtype)
    rows = max(1, at_once // mesh.size)
    x_ND = jnp.ones((rows, fields.d_model), dtype)
    up_DF = jnp.full((fields.d_model, fields.d_inner), 1e-3, dtype)
    each = 4.0 * rows * fields.d_model * fields.d_inner
    rounds = int(min(64, max(2, 2e10 // each)))

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
    # One device is timed; all do the same at once in a step.
    return Case("matrix products", run, tokens=rows, flops=each * rounds * mesh.size)


def tokens(vocab_size: int, shape) -> np.ndarray:
    """Random ids, as frequent as words are."""
    rng = np.random.default_rng(0)
    ids = rng.choice(vocab_size, size=shape, p=frequencies(vocab_size))
    return ids.astype(np.int32)


def _key(config) -> jax.Array:
    """Of a generator that compiles in a tenth of the usual one's time."""
    return jax.random.key(config.seed, impl="rbg")


def _parameters(model, mesh, key: jax.Array):
    abstract = jax.eval_shape(model.init, key)
    placed = sharding.parameters(mesh, abstract, model.param_axes(abstract))
    return jax.jit(model.init, out_shardings=placed)(key)
