"""What makes tracing and compiling cheap: in tests most programs run a few times."""

import gc

from xlformer.machines import quick


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process of the tests with so many devices."""
    of_devices = f"--xla_force_host_platform_device_count={devices}"
    return " ".join([of_devices, *quick.flags()])


def collect_seldom() -> None:
    """Imports and traces make millions of objects, few of which are circular garbage.

    To look for it as often as Python does by default is 6 % of what the tests cost.
    """
    gc.set_threshold(100_000, 20, 20)
