"""How many devices JAX makes of this machine's CPU: decided before its first use.

XLA runs much of a program on one core of a CPU: batched products, and most of what lies
between products. Two devices that share the rows keep two cores busy with it. What it
gains and where it loses stands in docs/performance.md.
"""

from __future__ import annotations

import math
import os
import pathlib
import platform
import re
import sys
from collections.abc import Mapping

import jax

from xlformer import models, sharding
from xlformer.data import workers
from xlformer.errors import Argument, UserError

# Either of them in the environment decides; JAX reads the first, XLA the second.
VARIABLE, XLA_FLAG = "JAX_NUM_CPU_DEVICES", "xla_force_host_platform_device_count"
# Useful FLOPs that a device must have to do in a step. With less, devices wait for each
# other longer than they compute; in training they have the gradients to sum.
LEAST_TRAINING, LEAST_FORWARD = 2.5e8, 1e7
# Bytes of a parameter, which every device has for itself: in training with its gradient
# and two moments. All of them together may take half of the machine's memory.
BYTES_TRAINING, BYTES_FORWARD = 16, 4
SMALLEST_VOCABULARY = 256
# JAX takes minutes to start with a hundred thousand devices.
MOST = 1024
COUNTED = 1024  # tokens of a segment


def processor() -> str:
    """What this machine's processor is called, of which JAX knows no more than 'cpu'.

    Numbers differ from one to the next, and so do the best ways of computing.
    """
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    except (OSError, ValueError):
        name = None
    name = name[1] if name else platform.processor() or platform.machine()
    return f"{name}, {workers.cores()} cores"


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
        if os.environ.get(VARIABLE) == "0":  # of which JAX makes a trace
            raise UserError(f"{VARIABLE}=0 must be at least 1")
        return
    many = asked
    if many is None:
        # What no step can have is refused by who uses it, in its own words.
        if min(rows, segment_length) < 1:
            return
        most = worth(config, rows, segment_length, training=training)
        many = count(workers.cores(), rows=rows, most=most, sizes=sizes)
    if not 1 <= many <= MOST:
        line = f" must be at least 1 and at most {MOST}"
        raise UserError(Argument("cpu_devices", many), line)
    try:
        jax.config.update("jax_num_cpu_devices", many)
    # JAX has started, for what was done before in this Python.
    except RuntimeError:
        if asked is None or asked == jax.device_count():
            return
        line = f": JAX has started in this process, with {jax.device_count()} devices"
        raise UserError(Argument("cpu_devices", asked), line) from None
    if many > 1 and jax.default_backend() == "cpu":
        # Those that rows or the mesh leave idle do not.
        used = count(many, rows=rows, most=many, sizes=sizes)
        of = f" of {many}" * (used < many)
        line = f"{used}{of} CPU devices share {rows} rows (--cpu_devices)"
        print(line, file=sys.stderr, flush=True)


def prepare_training(config, *, asked: int | None, sizes: Mapping[str, int]) -> None:
    """`prepare` for the training step of a config."""
    train = config.train
    prepare(
        config,
        asked=asked,
        rows=train.batch_size // train.micro_batches,
        segment_length=train.segment_length,
        sizes=sizes,
        training=True,
    )


def count(cores: int, *, rows: int, most: int, sizes: Mapping[str, int]) -> int:
    """The devices for a step: one a core, at most `most` and what divides the rows.

    A mesh without a free axis says itself how many. With one they are no fewer than
    its other axes need.
    """
    fixed = math.prod(size for size in sizes.values() if size != -1)
    fitting = min(cores, most) // fixed * fixed if fixed > 0 else 0
    if -1 not in sizes.values() or not fitting:
        return max(1, min(fixed, cores))
    found = sharding.fit_mesh(sizes, fitting, rows=rows, where=Argument("mesh"))
    return math.prod(found.values())


def worth(config, rows: int, segment_length: int, *, training: bool) -> int:
    """How many devices a step keeps busy, and this machine has memory for.

    A vocabulary that is not known yet counts as the smallest that the model can have.
    """
    fields = config.model
    size = max((SMALLEST_VOCABULARY, *(n + 1 for n in fields.get("cutoffs", ()))))
    model = models.build(fields, None if fields.vocab_size else size)
    # Who sees whom is an array of as many numbers as a segment has pairs of tokens: of
    # a long one its beginning is counted.
    length = min(segment_length, COUNTED)
    step = {"batch_size": rows, "segment_length": length}
    forward, whole = model.flops(**step, cached=True), model.flops(**step)
    # All of our models count theirs.
    if forward is None:
        return 1
    # Each weight is one multiplication and one addition a token. What attention adds is
    # little beside them; the table of embeddings is read and not multiplied.
    weights = forward.forward / (2 * rows * length)
    weights += model.vocab_size * (model.width or 0)
    each = weights * (BYTES_TRAINING if training else BYTES_FORWARD)
    busy = forward.forward / LEAST_FORWARD
    if training:
        busy = whole.training / LEAST_TRAINING
    return int(min(busy * segment_length / length, _memory() / 2 / each))


def _memory() -> float:
    """Bytes of this machine's memory."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # Not told here.
        return math.inf
