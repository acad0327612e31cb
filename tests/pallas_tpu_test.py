"""The fused TPU kernels, interpreted on the CPU with small tiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    CASES,
    RESETS,
    check_against_double_loop,
    check_close,
    check_no_gradient_crosses,
    make_arrays,
    values_and_gradients,
)
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    NamedSharding,
    use_abstract_mesh,
)
from jax.sharding import PartitionSpec as P
from quick import jit

from xlformer import sharding
from xlformer.kernels import pallas_tpu
from xlformer.kernels.pallas_tpu_case import MOST_BYTES, Case, interpreted
from xlformer.kernels.relative_attention import relative_attention

CAUSAL = [name for name, case in CASES.items() if case.get("causal", True)]


def starts(B, T, M, at):
    """Resets of row 0 at these queries; row 1 has 2 valid slots of memory."""
    start_BT = np.zeros((B, T), np.int32)
    for t in at:
        start_BT[0, t:] = M + t
    start_BT[1:] = max(M - 2, 0)
    return start_BT


@pytest.mark.parametrize("name", CAUSAL)
def test_values_and_gradients_equal_the_double_loop(name):
    with interpreted(query_tile=8, key_tile=8):
        check_against_double_loop("pallas_tpu", name)


@pytest.mark.parametrize("name", sorted(RESETS))
def test_no_gradient_crosses_a_reset(name):
    with interpreted(query_tile=8, key_tile=8):
        check_no_gradient_crosses("pallas_tpu", name)


@pytest.mark.parametrize(
    ("T", "M", "K", "query_tile", "key_tile", "options"),
    [
        (37, 21, 80, 8, 24, {}),
        (29, 50, 64, 8, 16, dict(window=11)),
        (40, 0, 41, 16, 16, dict(at=(0, 17, 39))),
        (33, 47, 128, 8, 32, dict(at=(9, 10), window=40)),
    ],
)
def test_tiles_of_any_shape_equal_xla(T, M, K, query_tile, key_tile, options):
    """Ragged, longer than each other, wholly out of sight; all with dropout."""
    options = dict(options)
    if "at" in options:
        options["key_start_BT"] = starts(2, T, M, options.pop("at"))
    options |= dict(
        dropout_rate=0.25, dropout_key=jax.random.split(jax.random.key(1), 2)
    )
    arrays = make_arrays(T=T, M=M, K=K, R=K + 1, H=2)
    arrays = [x / K**0.25 for x in arrays]  # scores of about 1 at any width
    with interpreted(query_tile=query_tile, key_tile=key_tile):
        found = values_and_gradients(arrays, "pallas_tpu", **options)
    check_close(*found, *values_and_gradients(arrays, "xla", **options))


def test_bfloat16_is_as_close_as_xla_in_bfloat16():
    exact = make_arrays(T=20, M=12, K=16)
    low = [jnp.asarray(x / 2, jnp.bfloat16) for x in exact]
    with interpreted(query_tile=8, key_tile=16):
        found = values_and_gradients(low, "pallas_tpu")
    plain = values_and_gradients(low, "xla")
    best = values_and_gradients([x.astype(jnp.float32) for x in low], "xla")
    leaves = map(jax.tree.leaves, (found, plain, best))
    for actual, other, exact in zip(*leaves, strict=True):
        assert actual.dtype == jnp.bfloat16
        error = np.abs(np.asarray(actual, np.float32) - exact).max()
        assert error < 2 * np.abs(np.asarray(other, np.float32) - exact).max()


# Over a mesh --------------------------------------------------------------------------


@pytest.mark.parametrize(("B", "manual"), [(8, False), (3, False), (8, True)])
def test_a_mesh_gives_the_numbers_of_one_device(B, manual):
    """Rows and heads split, or 3 rows whole; `data` already split around, or not."""
    T, M, H = 10, 7, 4
    arrays = make_arrays(B=B, T=T, M=M, H=H)
    dy_BTHK = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)
    rows = {
        "arrays": arrays[:4],
        "dy": dy_BTHK,
        "start": starts(B, T, M, (3, 9)),
        "keys": jax.random.split(jax.random.key(0), B),
    }

    def both(rows, r_SHK, implementation):
        def forward(arrays):
            return relative_attention(
                *arrays,
                key_start_BT=rows["start"],
                dropout_rate=0.2,
                dropout_key=rows["keys"],
                implementation=implementation,
            )

        y_BTHK, vjp = jax.vjp(forward, [*rows["arrays"], r_SHK])
        *grads, dr_SHK = vjp(rows["dy"])[0]
        return y_BTHK, grads, dr_SHK

    def on_mesh(rows, r_SHK):
        if not manual:
            return both(rows, r_SHK, "pallas_tpu")

        def local(rows, r_SHK):
            y_BTHK, grads, dr_SHK = both(rows, r_SHK, "pallas_tpu")
            return y_BTHK, grads, jax.lax.psum(dr_SHK, "data")

        return jax.shard_map(
            local,
            in_specs=(P("data"), P()),
            out_specs=(P("data"), P("data"), P()),
            axis_names={"data"},
            check_vma=False,
        )(rows, r_SHK)

    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})

    def put(x):
        names = ("batch", None, "heads", None)[: x.ndim]
        return jax.device_put(
            x, NamedSharding(mesh, sharding.spec(x.shape, names, mesh.shape))
        )

    split = jax.tree.map(put, rows)
    with jax.set_mesh(mesh), interpreted(query_tile=8, key_tile=16):
        found = jit(on_mesh)(split, arrays[4])
    expected = jit(both, static_argnums=2)(rows, arrays[4], "xla")
    for actual, array in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(actual, array, atol=1e-5, rtol=1e-5)


# For a TPU that is not here -----------------------------------------------------------


def lowered_kernels(dtype):
    """How many kernels forward and backward are, with the tiles of a real TPU.

    tests/aot compiles them too, but needs libtpu.
    """
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh(
        (1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device
    )
    arrays = [x.astype(dtype) for x in make_arrays(B=1, T=300, M=90, H=1, K=41)]
    start_BT = starts(1, 300, 90, (5,))

    def loss(arrays):
        return relative_attention(
            *arrays,
            key_start_BT=start_BT,
            dropout_rate=0.1,
            dropout_key=jax.random.key(0),
        ).sum()

    with use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss)).trace(arrays)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    return text.count("custom_call @tpu_custom_call")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_kernels_are_lowered_for_a_tpu(dtype):
    assert lowered_kernels(dtype) == 2


def test_the_probe_compiles_both_kernels_while_another_program_is_traced(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    arrays = make_arrays(B=1, T=9, M=2)
    with interpreted(query_tile=8, key_tile=8):
        case = Case.of(
            *(arrays[0], *arrays[2:]),
            key_start_BT=arrays,
            window=None,
            causal=True,
            rate=0.1,
        )

    def traced(x):
        pallas_tpu.try_out(case)
        with pytest.raises(ValueError, match="interpret"):  # the CPU's compiler
            pallas_tpu.try_out(dataclasses.replace(case, interpret=False))
        return x

    with jax.set_mesh(sharding.make_mesh({"data": 8})):
        jax.jit(traced).trace(np.ones(3))


def test_published_shapes_fit_the_fast_memory():
    for T, M, K in ((512, 512, 64), (768, 768, 128), (128, 3800, 128), (384, 1600, 64)):
        for dtype in ("float32", "bfloat16"):
            S = M + T
            shapes = [jax.ShapeDtypeStruct((1, n, 1, K), dtype) for n in (T, S, S)] + [
                jax.ShapeDtypeStruct((S, 1, K), dtype)
            ]
            case = Case.of(
                *shapes, key_start_BT=None, window=None, causal=True, rate=0.0
            )
            assert case.vmem_bytes() < MOST_BYTES / 1.3
            assert case.Tp - T < 128 and case.Sp - S < 384 and case.Q <= case.N
