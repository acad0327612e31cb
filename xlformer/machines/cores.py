"""How many devices JAX makes of this machine's CPU: decided before its first use.

XLA runs much of a program on one core of a CPU: batched products, and most of what lies
between products. Two devices that share the rows keep two cores busy with it. What it
gains and where it loses stands in docs/performance.md.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping

import jax

from xlformer import models, sharding
from xlformer.errors import Argument, UserError

# Either of them in the environment decides; JAX reads the first, XLA the second.
VARIABLE, XLA_FLAG = "JAX_NUM_CPU_DEVICES", "xla_force_host_platform_device_count"
# FLOPs of a step below which devices wait for each other longer than they compute; in
# training they have the gradients to sum.
LEAST_TRAINING, LEAST_FORWARD = 2e9, 5e7
SMALLEST_VOCABULARY = 256


def add_flag(parser) -> None:
    parser.add_argument(
        "--cpu_devices",
        type=int,
        help="how many share the rows on a CPU; default: one a core, where that gains",
    )


def prepare(
    config,
    *,
    asked: int | None,
    rows: int,
    segment_length: int,
    sizes: Mapping[str, int],
    training: bool = False,
) -> None:
    """Tells JAX how many devices to make of the CPU, for steps of this size.

    Before the first use of a device, and after hosts have joined: processes of a job
    keep what they have. So does who set VARIABLE or XLA_FLAG, and a Python that has
    used devices already.

    Args:
      config: whose model it is; its vocabulary need not be known yet.
      asked: what --cpu_devices says; it goes before all.
      rows, segment_length: of a step.
      sizes: of the mesh, as it will be made.
      training: whether a step has a backward pass.

    Raises UserError for a number that cannot be.
    """
    given = VARIABLE in os.environ or XLA_FLAG in os.environ.get("XLA_FLAGS", "")
    if asked is None and (given or jax.distributed.is_initialized()):
        return
    many = asked
    if many is None:
        flops = _flops(config, rows, segment_length, training=training)
        least = LEAST_TRAINING if training else LEAST_FORWARD
        many = count(available(), rows=rows, large=flops >= least, sizes=sizes)
    if many < 1:
        raise UserError(Argument("cpu_devices", many), " must be at least 1")
    try:
        jax.config.update("jax_num_cpu_devices", many)
    # JAX has started, for what was done before in this Python.
    except RuntimeError:
        if asked is None or asked == jax.device_count():
            return
        line = f": JAX has started in this process, with {jax.device_count()} devices"
        raise UserError(Argument("cpu_devices", asked), line) from None
    if many > 1 and jax.default_backend() == "cpu":
        line = f"{many} CPU devices share {rows} rows (--cpu_devices)"
        print(line, file=sys.stderr, flush=True)


def count(cores: int, *, rows: int, large: bool, sizes: Mapping[str, int]) -> int:
    """The devices for a step: one a core, unless its rows or its size forbid it.

    A mesh without a free axis says itself how many. With one they are as many as the
    rows can be split into, and no more than the other axes need where a step is not
    large.
    """
    fixed = math.prod(size for size in sizes.values() if size != -1)
    fitting = cores // fixed * fixed if fixed > 0 else 0
    if -1 not in sizes.values() or not large or not fitting:
        return max(1, min(fixed, cores))
    found = sharding.fit_mesh(sizes, fitting, rows=rows, where=Argument("mesh"))
    return math.prod(found.values())


def available() -> int:
    """Cores that this process may use."""
    # macOS has no affinity.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _flops(config, rows: int, segment_length: int, *, training: bool) -> float:
    """Useful FLOPs of a step; of a vocabulary that is not known yet the least."""
    fields = config.model
    size = max((SMALLEST_VOCABULARY, *(n + 1 for n in fields.get("cutoffs", ()))))
    model = models.build(fields, None if fields.vocab_size else size)
    found = model.flops(
        batch_size=rows, segment_length=segment_length, cached=not training
    )
    # All of our models count; what does not is taken for large.
    if found is None:
        return math.inf
    return found.training if training else found.forward
