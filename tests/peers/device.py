"""Says what this machine is: date, GPU, versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import shutil
import subprocess

import compare
import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "triton")
QUERY = "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm"


def main() -> None:
    print(datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"))
    print(compare.host())
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi", QUERY, "--format=csv,noheader"], check=False)
    for name in PACKAGES:
        try:
            print(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            print(name, "is not here")
    print(jax.devices(), flush=True)


if __name__ == "__main__":
    main()
