"""Is every implementation of attention right on this device? Values and gradients.

    PYTHONPATH=. python tests/peers/check_kernels.py [--quick] [--json=FILE]

Each is compared with `xla` in float32 and the highest precision of products. It passes
when its error is at most three times that of `xla` in its own dtype and precision: the
order of sums differs, not more. With dropout all drop the same units. Exit code 1 if
one fails; one that this device cannot run is a row with the reason.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import pathlib
import sys

import jax
import jax.numpy as jnp

from xlformer.errors import UserError
from xlformer.kernels.relative_attention import IMPLEMENTATIONS, relative_attention

# T, M, K and what else is on: tiles that fit and that do not, the published shapes.
CASES = {
    "128 of 128": {"T": 128, "M": 128, "K": 64},
    "partly filled memory": {"T": 128, "M": 128, "K": 64, "start": 37},
    "dropout": {"T": 256, "M": 128, "K": 64, "rate": 0.2},
    "odd sizes": {"T": 100, "M": 37, "K": 41, "start": 5, "rate": 0.1},
    "window": {"T": 160, "M": 640, "K": 64, "window": 639},
    "NVIDIA base": {"T": 192, "M": 192, "K": 64},
    "enwik8 12 layers": {"T": 512, "M": 512, "K": 64},
    "enwik8 24 layers": {"T": 768, "M": 768, "K": 128, "rate": 0.15},
}
QUICK = ("128 of 128", "odd sizes")
FLOAT32 = (*QUICK, "dropout")  # the published shapes are for bfloat16
THREADS = 8  # most of the time goes into compiling
B, H = 2, 2
TIMES, LEAST = 3.0, 1e-5  # of the error of xla; errors are relative to the largest


def inputs(dtype, *, T, M, K, **_):
    keys = jax.random.split(jax.random.key(0), 6)
    S = M + T
    shapes = [(B, T, H, K)] * 2 + [(B, S, H, K)] * 2 + [(S, H, K), (B, T, H, K)]
    drawn = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    drawn[:2] = [x * K**-0.5 for x in drawn[:2]]
    return [x.astype(dtype) for x in drawn]


def run(implementation, dtype, case):
    """{name: array} of the output and all gradients, in float32."""
    *arrays, cotangent = inputs(jnp.bfloat16, **case)  # the same numbers for both
    arrays = [x.astype(dtype) for x in arrays]
    start, rate = case.get("start"), case.get("rate", 0.0)

    def weighed(*arrays):
        y_BTHK = relative_attention(
            *arrays,
            window=case.get("window"),
            key_start_BT=None if start is None else jnp.full((B, case["T"]), start),
            dropout_rate=rate,
            dropout_key=jax.random.key(1) if rate else None,
            implementation=implementation,
        ).astype(jnp.float32)
        return (y_BTHK * cotangent.astype(jnp.float32)).sum(), y_BTHK

    both = jax.value_and_grad(weighed, argnums=tuple(range(5)), has_aux=True)
    (_, y_BTHK), grads = jax.jit(both)(*arrays)
    names = ("y", "qu", "qw", "k", "v", "r")
    return {
        n: x.astype(jnp.float32) for n, x in zip(names, (y_BTHK, *grads), strict=True)
    }


def worst(found, exact) -> tuple[float, str]:
    """The largest error, relative to the largest number, and in what."""
    errors = {
        name: float(
            jnp.abs(found[name] - exact[name]).max() / jnp.abs(exact[name]).max()
        )
        for name in exact
    }
    name = max(errors, key=lambda n: (errors[n] != errors[n], errors[n]))  # NaN first
    return errors[name], name


def check(case_name: str) -> list[dict]:
    case = CASES[case_name]
    with jax.default_matmul_precision("highest"):
        exact = run("xla", jnp.float32, case)
    rows = []
    for dtype in (jnp.float32, jnp.bfloat16):
        if dtype == jnp.float32 and case_name not in FLOAT32:
            continue
        allowed, _ = worst(run("xla", dtype, case), exact)
        for name in IMPLEMENTATIONS:
            if name == "xla":
                continue
            row = {"case": case_name, "dtype": jnp.dtype(dtype).name, "what": name}
            try:
                error, where = worst(run(name, dtype, case), exact)
            except UserError as refused:
                rows.append({**row, "ok": True, "why_not": str(refused)})
                continue
            except Exception as failed:  # A compiler may raise anything.
                reason = " ".join(str(failed).split())[:150]
                rows.append({**row, "ok": False, "why_not": reason})
                continue
            ok = error <= max(LEAST, TIMES * allowed)
            rows.append(row | {"ok": ok, "error": error, "in": where, "xla": allowed})
    return rows


def line(row: dict) -> str:
    start = f"{row['case']:<22}{row['dtype']:<10}{row['what']:<12}"
    verdict = "ok" if row["ok"] else "FAILED"
    if "why_not" in row:
        return f"{start}{'-' if row['ok'] else verdict}: {row['why_not']}"
    return (
        f"{start}{verdict:<8}{row['error']:.1e} in {row['in']:<3} xla {row['xla']:.1e}"
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    rows = []
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(check, QUICK if args.quick else CASES):
            rows += found
            print("\n".join(line(row) for row in found), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    failed = sum(not row["ok"] for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} are right")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
