"""What linear attention computes and moves over the length, beside softmax's.

    PYTHONPATH=.:tests python tests/speed/linear_traffic.py --topology=v5e:2x2

One layer's causal operation, forward and backward, 8 heads of 64, 256 positive
features, bfloat16, one row on one device, compiled for a machine that is not here
(needs jax[tpu], or jax[cuda12] for --topology=h100). FLOPs and bytes are the
compiler's own counts, a token; of a loop it counts one round, so that loops over blocks
are unrolled for it here. Softmax attention is XLA's (`blocked`), whose scores go
through memory; the fused kernel's are read off a table of its operands: q, k, v, the
output and their gradients, once each, which is the least that any form moves.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import jax.numpy as jnp
from aot.programs import mesh_of
from jax.sharding import NamedSharding, PartitionSpec

from xlformer.kernels.features import Features
from xlformer.kernels.linear_attention import linear_attention
from xlformer.kernels.relative_attention import relative_attention

H, K, M = 8, 64, 256
SHORTEST = 1024


def favor(q, k, v, w):
    scale = K**-0.25
    return linear_attention(q * scale, k * scale, v, Features(), w)[0]


def softmax(q, k, v, w):
    del w
    return relative_attention(q * K**-0.5, None, k, v, None, implementation="blocked")


def compiled(attend, topology: str, T: int):
    mesh = mesh_of(topology, {"data": 1})
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = [(1, T, H, K)] * 3 + [(M, K), (1, T, H, K)]
    arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=whole) for s in shapes]

    def both(q, k, v, w, dy):
        y, vjp = jax.vjp(lambda *x: attend(*x, w), q, k, v)
        return y, vjp(dy)

    with jax.set_mesh(mesh):
        return jax.jit(both).lower(*arrays).compile()


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--topology", required=True)
    parser.add_argument("--most", type=int, default=16384)
    parser.add_argument("--most_softmax", type=int, default=4096)
    args = parser.parse_args(argv)
    jax.lax.scan = functools.partial(jax.lax.scan, unroll=True)
    # q, k, v, y forward; q, k, v, y, dy and three gradients backward.
    least = 12 * H * K * 2
    print(f"{args.topology}, jax {jax.__version__}, a token: MFLOP and kB")
    print(f"least of a fused softmax kernel: {least / 1e3:.1f} kB")
    for name, attend in ("favor", favor), ("softmax", softmax):
        T = SHORTEST
        while T <= (args.most if attend is favor else args.most_softmax):
            start = time.perf_counter()
            found = compiled(attend, args.topology, T)
            # A GPU's compiler counts nothing where there is no GPU.
            cost = found.cost_analysis() or {}
            flops, moved = (
                cost.get(k, float("nan")) for k in ("flops", "bytes accessed")
            )
            memory = found.memory_analysis()
            print(
                f"{name:>8}{T:>8,}{flops / T / 1e6:10.2f} MFLOP"
                f"{moved / T / 1e3:10.1f} kB"
                f"{memory.temp_size_in_bytes / 2**20:9.0f} MiB of temporaries"
                f"{time.perf_counter() - start:8.0f} s to compile",
                flush=True,
            )
            T *= 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
