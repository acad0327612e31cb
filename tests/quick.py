"""What makes compiling cheap: in the tests nearly all programs run a few times only.

CPU-seconds of compiling init, forward and gradient of two layers with jax 0.10: by
default 7.3, 1.0 and 3.2; with FLAGS 0.5, 0.1 and 0.4.
"""

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
