"""Attention and training steps, compiled for a machine that is not here."""

import sys
import time
import traceback

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from xlformer import config as config_lib
from xlformer import models, sharding
from xlformer.errors import UserError
from xlformer.kernels.relative_attention import relative_attention
from xlformer.machines import rehearsal, topologies
from xlformer.training.compiling import TrainingStep

ENWIK8 = dict(B=8, H=8, T=512, M=512, K=64)
WT103 = dict(B=8, H=10, T=150, M=150, K=41)
# The longest memory of the paper's evaluations: 24 layers on enwik8.
LONG = dict(B=1, H=8, T=128, M=3800, K=128, window=3799)


def mesh_of(topology, sizes):
    """A mesh of devices that are not here, to compile for."""
    found = topologies.machine(topology)
    if found.devices is None:
        raise UserError(f"{topology}: {found.note}")
    return sharding.make_mesh(sizes, devices=found.devices)


def attention(
    topology,
    implementation,
    dtype,
    *,
    B,
    H,
    T,
    M,
    K,
    R=None,
    window=None,
    rate=0.0,
    wrap=lambda function: function,
    compiler_options=None,
):
    """Forward and backward, partly filled memory, on one device."""
    mesh, S, R = mesh_of(topology, {"data": 1}), M + T, R or K

    def array(*shape, dtype=dtype):
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    arrays = [array(B, n, H, w) for n, w in ((T, K), (T, R), (S, K), (S, K))]
    arrays.append(array(S, H, R))

    def both(arrays, start_BT, dy_BTHK):
        key = jax.random.key(0) if rate else None

        def forward(arrays):
            if implementation == "classic":
                return classic(*arrays, start_BT)
            return relative_attention(
                *arrays,
                window=window,
                key_start_BT=start_BT,
                dropout_rate=rate,
                dropout_key=key,
                implementation=implementation,
            )

        y_BTHK, vjp = jax.vjp(wrap(forward), arrays)
        return y_BTHK, vjp(dy_BTHK)

    start_BT = array(B, T, dtype="int32")
    with jax.set_mesh(mesh):
        lowered = jax.jit(both).lower(arrays, start_BT, array(B, T, H, K))
        return lowered.compile(compiler_options)


def classic(qu_BTHK, qw_BTHK, k_BSHK, v_BSHK, r_SHK, start_BT):
    """The form of Dai et al. 2019, appendix B: pad, reshape, slice."""
    T, S = qu_BTHK.shape[1], k_BSHK.shape[1]
    wide = dict(preferred_element_type=jnp.float32)
    raw_BHTS = jnp.einsum("BTHK,SHK->BHTS", qw_BTHK, r_SHK[::-1], **wide)
    padded = jnp.pad(raw_BHTS, ((0, 0), (0, 0), (0, 0), (1, 0)))
    shifted = padded.reshape(*raw_BHTS.shape[:2], S + 1, T)[:, :, 1:]
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", qu_BTHK, k_BSHK, **wide)
    scores_BHTS += shifted.reshape(raw_BHTS.shape)
    keys_S = jnp.arange(S)
    seen = keys_S <= jnp.arange(T)[:, None] + (S - T)
    seen = seen[None] & (keys_S >= start_BT[..., None])
    p_BHTS = jax.nn.softmax(jnp.where(seen[:, None], scores_BHTS, -1e30))
    return jnp.einsum("BHTS,BSHK->BTHK", p_BHTS.astype(v_BSHK.dtype), v_BSHK)


def train_step(
    topology,
    sizes,
    implementation=None,
    *,
    config="quickstart",
    vocab_size=256,
    **fields,
):
    """The step of a config as `xlformer.train` would make it.

    implementation: of attention, where the model has one.
    """
    config = config_lib.load(config)
    fields |= {"attention": implementation} if implementation else {}
    config.model.update(dtype="bfloat16", **fields)
    model = models.build(config.model, vocab_size=vocab_size)
    step = TrainingStep(config, model, mesh_of(topology, sizes))
    return step.compile(rehearsal.batch(config, model))


def run(checks):
    """A line for each; exit code 1 if one does not compile."""
    failed = 0
    for name, check in checks.items():
        start = time.perf_counter()
        try:
            compiled = check()
        except Exception:
            traceback.print_exc()
            print(f"FAILED {name}", flush=True)
            failed += 1
            continue
        seconds = time.perf_counter() - start
        temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
        line = f"compiled {name}: {seconds:.1f} s, {temporary:,.0f} MiB temporary"
        costs = compiled.cost_analysis()  # NVIDIA's compiler has none.
        if costs:
            megabytes = costs["bytes accessed"] / 1e6
            line += f", {megabytes:,.0f} MB accessed outside of kernels"
        print(line, flush=True)
    sys.exit(min(failed, 1))
