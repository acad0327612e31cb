"""The fused TPU kernels, interpreted on the CPU with small tiles."""

import dataclasses

import jax
import numpy as np
import pytest
from attention_cases import (
    CASES,
    RESETS,
    TILES,
    check_against_double_loop,
    check_bfloat16,
    check_no_gradient_crosses,
    check_over_mesh,
    check_tiles,
    make_arrays,
    starts,
)
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    use_abstract_mesh,
)

from xlformer import sharding
from xlformer.kernels import pallas_tpu
from xlformer.kernels.call import Call, interpreted
from xlformer.kernels.pallas_tpu_tiles import MOST_BYTES, cut
from xlformer.kernels.relative_attention import relative_attention
from xlformer.kernels.visibility import Visibility

CAUSAL = [name for name, case in CASES.items() if case.get("causal", True)]


@pytest.mark.parametrize("name", CAUSAL)
def test_values_and_gradients_equal_the_double_loop(name):
    with interpreted(query_tile=8, key_tile=8):
        check_against_double_loop("pallas_tpu", name)


@pytest.mark.parametrize("name", sorted(RESETS))
def test_no_gradient_crosses_a_reset(name):
    with interpreted(query_tile=8, key_tile=8):
        check_no_gradient_crosses("pallas_tpu", name)


@pytest.mark.parametrize(("T", "M", "K", "query_tile", "key_tile", "options"), TILES)
def test_tiles_of_any_shape_equal_xla(T, M, K, query_tile, key_tile, options):
    with interpreted(query_tile=query_tile, key_tile=key_tile):
        check_tiles("pallas_tpu", T, M, K, options)


def test_bfloat16_is_as_close_as_xla_in_bfloat16():
    with interpreted(query_tile=8, key_tile=16):
        check_bfloat16("pallas_tpu")


@pytest.mark.parametrize(("B", "manual"), [(8, False), (3, False), (8, True)])
def test_a_mesh_gives_the_numbers_of_one_device(B, manual):
    """Rows and heads split, or 3 rows whole; `data` already split around, or not."""
    with interpreted(query_tile=8, key_tile=16):
        check_over_mesh("pallas_tpu", B=B, manual=manual)


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
        visibility = Visibility(key_start_BT=np.zeros((1, 9), np.int32))
        call = Call.of(arrays[0], *arrays[2:], visibility, rate=0.1)

    def traced(x):
        pallas_tpu.try_out(call)
        with pytest.raises(ValueError, match="interpret"):  # the CPU's compiler
            pallas_tpu.try_out(dataclasses.replace(call, test_tiles=None))
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
            tiles = cut(Call.of(*shapes, Visibility(), rate=0.0))
            assert tiles.vmem_bytes() < MOST_BYTES / 1.3
            assert tiles.Tp - T < 128 and tiles.Sp - S < 384 and tiles.Q <= tiles.N
