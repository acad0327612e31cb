"""Compiling quickly what runs a few times only, such as tests. Imports no JAX."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

# CPU-seconds of compiling init, forward and gradient of two layers with jax 0.10: by
# default 7.3, 1.0 and 3.2; with these 0.5, 0.1 and 0.4.
_FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def flags() -> tuple[str, ...]:
    """Of XLA_FLAGS; () where XLA might not know one, which ends the process."""
    known = importlib.metadata.version("jaxlib").startswith("0.10.")
    # It reads them too, and is of another version.
    return _FLAGS if known and importlib.util.find_spec("libtpu") is None else ()


def compile_quickly() -> None:
    """For this process, before it uses a device, and for those that it starts."""
    asked = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.partition("=")[0] for flag in asked}
    more = [flag for flag in flags() if flag.partition("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join([*asked, *more])
