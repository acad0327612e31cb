"""The fused GPU kernels, interpreted on the CPU with small tiles."""

import dataclasses

import jax
import jax.numpy as jnp
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
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from xlformer.errors import UserError
from xlformer.kernels import pallas_gpu, pallas_gpu_kernels, pallas_gpu_tiles
from xlformer.kernels.call import Call, interpreted
from xlformer.kernels.relative_attention import choose, relative_attention
from xlformer.kernels.visibility import Visibility

CAUSAL = [name for name, case in CASES.items() if case.get("causal", True)]


@pytest.fixture
def small_tiles():
    with interpreted(query_tile=4, key_tile=8):
        yield


@pytest.mark.parametrize("name", CAUSAL)
def test_values_and_gradients_equal_the_double_loop(name, small_tiles):
    check_against_double_loop("pallas_gpu", name)


@pytest.mark.parametrize("name", sorted(RESETS))
def test_no_gradient_crosses_a_reset(name, small_tiles):
    check_no_gradient_crosses("pallas_gpu", name)


@pytest.mark.parametrize(("T", "M", "K", "query_tile", "key_tile", "options"), TILES)
def test_tiles_of_any_shape_equal_xla(T, M, K, query_tile, key_tile, options):
    key_tile = 1 << (key_tile - 1).bit_length()
    with interpreted(query_tile=query_tile, key_tile=key_tile):
        check_tiles("pallas_gpu", T, M, K, options)


def test_bfloat16_is_as_close_as_xla_in_bfloat16(small_tiles):
    check_bfloat16("pallas_gpu")


@pytest.mark.parametrize(("B", "manual"), [(8, False), (3, False), (8, True)])
def test_a_mesh_gives_the_numbers_of_one_device(B, manual, small_tiles):
    check_over_mesh("pallas_gpu", B=B, manual=manual)


# The choice, and what is refused ------------------------------------------------------


def make_call(*, T=512, M=512, K=64, R=64, dtype="bfloat16", rate=0.0, **visibility):
    S = M + T
    shapes = [(1, T, 1, K), (1, S, 1, K), (1, S, 1, K), (S, 1, R)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return Call.of(*arrays, Visibility(**visibility), rate)


def test_auto_chooses_it_for_long_segments_in_bfloat16():
    assert choose(make_call(), "gpu") == "pallas_gpu"
    assert choose(make_call(T=64), "gpu") == "pallas_gpu"
    assert choose(make_call(T=63), "gpu") == "xla"
    assert choose(make_call(dtype="float32"), "gpu") == "blocked"
    assert choose(make_call(causal=False, window=9), "gpu") == "blocked"


def test_auto_falls_back_with_one_warning_where_it_is_wrong(caplog, monkeypatch):
    def wrong(call):
        raise ValueError("gradient of qw differ by 12.0% from those of 'xla'")

    monkeypatch.setattr(pallas_gpu, "try_out", wrong)
    for _ in range(2):
        assert choose(make_call(T=257), "gpu") == "blocked"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "does not work" in record.getMessage()
    assert record.getMessage().endswith(
        "gradient of qw differ by 12.0% from those of 'xla'"
    )


def test_an_explicit_kernel_that_cannot_run_is_refused(small_tiles, monkeypatch):
    with pytest.raises(UserError, match="knows only causal attention"):
        arrays = make_arrays(causal=False)
        relative_attention(*arrays, causal=False, implementation="pallas_gpu")
    refusal = pallas_gpu_tiles.refusal
    real = dataclasses.replace(make_call(K=128, R=128), test_tiles=None)
    assert refusal(real, "gpu") is None
    assert refusal(real, "tpu").startswith("needs an NVIDIA GPU, this is tpu")
    wrong = dataclasses.replace(real, dtype="float64")
    assert refusal(wrong, "gpu") == "knows float32 and bfloat16, not dtype=float64"
    monkeypatch.setattr(pallas_gpu_tiles, "shared_memory", lambda: 16 << 10)
    assert refusal(real, "gpu") == (
        "its least tiles with d_head=128 in bfloat16 need 37 KiB of shared memory, "
        "this GPU has 16: set 'blocked'"
    )


@pytest.mark.parametrize(
    ("shared", "K", "forward", "backward"),
    [
        (227, 64, (64, 128, 1), (64, 64, 3)),  # H100
        (227, 41, (64, 128, 1), (64, 64, 3)),
        (227, 128, (64, 64, 1), (64, 64, 1)),
        (99, 64, (64, 64, 2), (64, 64, 2)),  # of the RTX cards
        (99, 128, (32, 32, 2), (32, 32, 2)),
        (48, 128, (16, 16, 2), (16, 16, 2)),
    ],
)
def test_tiles_are_as_large_as_the_shared_memory_allows(
    shared, K, forward, backward, monkeypatch
):
    monkeypatch.setattr(pallas_gpu_tiles, "shared_memory", lambda: shared << 10)
    for is_forward, expected in ((True, forward), (False, backward)):
        found = pallas_gpu_tiles.cut(make_call(K=K, R=K), forward=is_forward)
        assert (found.Q, found.N, found.stages) == expected
    assert pallas_gpu_tiles.cut(make_call(T=20, K=64)).Q == 32


def test_backward_kernels_may_have_other_tiles(small_tiles, monkeypatch):
    cut = pallas_gpu_tiles.cut

    def other(call, forward=True):
        return cut(call) if forward else dataclasses.replace(cut(call), Q=8, N=16)

    monkeypatch.setattr(pallas_gpu, "cut", other)
    # A call of its own: nothing that was traced with other tiles is taken for it.
    options = dict(window=11, rate=0.2, key_start_BT=())
    pallas_gpu.compare(make_call(T=23, M=13, K=8, R=8, dtype="float32", **options))


# What runs before the first use -------------------------------------------------------


def test_the_trial_is_content(small_tiles):
    options = dict(window=9, rate=0.2, key_start_BT=())
    pallas_gpu.compare(make_call(T=19, M=13, K=8, R=8, dtype="float32", **options))


def test_the_trial_finds_what_was_read_too_early(monkeypatch, small_tiles):
    """As where a compiler fetches the next tile of a loop before it is written."""
    call = make_call(T=19, M=13, K=8, R=8, dtype="float32")
    real = pallas_gpu_kernels._Queries.push

    def late(self, n):
        real(self, jnp.where(n == self.first, n, n - 1))

    monkeypatch.setattr(pallas_gpu_kernels._Queries, "push", late)
    with pytest.raises(ValueError, match="differ by .*% from"):
        pallas_gpu.compare(call)


def test_the_trial_runs_while_another_program_is_traced(monkeypatch, small_tiles):
    call, seen = make_call(T=9, M=2, K=8, R=8), []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(pallas_gpu, "compare", lambda c: seen.append(c))
    jax.jit(lambda x: (pallas_gpu.try_out(call), x)[1]).trace(np.ones(3))
    assert seen == [call]


# For a GPU that is not here -----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_kernels_are_lowered_for_a_gpu(dtype):
    """With the tiles of a real one. tests/aot compiles them too, but needs 5 GB."""
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    mesh = AbstractMesh(
        (1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device
    )
    arrays = [jnp.asarray(x, dtype) for x in make_arrays(B=1, T=300, M=90, H=1, K=41)]
    start_BT = starts(1, 300, 90, (5,))

    def loss(arrays):
        return relative_attention(
            *arrays,
            key_start_BT=start_BT,
            dropout_rate=0.1,
            dropout_key=jax.random.key(0),
            implementation="pallas_gpu",
        ).sum()

    with use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss)).trace(arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 3
