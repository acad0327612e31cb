"""What makes tracing and compiling cheap: in the tests most programs run a few times.

CPU-seconds of compiling init, forward and gradient of two layers with jax 0.10: by
default 7.3, 1.0 and 3.2; with FLAGS 0.5, 0.1 and 0.4.
"""

import gc
import importlib.metadata

FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process of the tests with so many devices."""
    # An XLA that does not know a flag ends the process: other versions go without.
    known = FLAGS if importlib.metadata.version("jaxlib").startswith("0.10.") else ()
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *known])


def collect_seldom() -> None:
    """Imports and traces make millions of objects, few of which are circular garbage.

    To look for it as often as Python does by default is 6 % of what the tests cost.
    """
    gc.set_threshold(100_000, 20, 20)
