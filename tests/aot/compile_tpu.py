"""Compiles for TPUs that are not here, with the compiler that they would use.

    python tests/aot/compile_tpu.py [full]

The fused attention kernels, then training steps over meshes; with `full` also the step
of whole published models, and the bytes of every implementation. A line for each, with
what the compiler says of it. Exit code 1 if one does not compile. Needs jax[tpu], no
TPU. The interpreter of Pallas accepts what this compiler refuses, so this is the check.
"""

import functools
import os
import sys

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several may compile at once

import jax
from programs import ENWIK8, LONG, WT103, attention, run, train_step

from xlformer.kernels.call import OUTPUT_NAME

# For ENWIK8 in bfloat16: a fifth of 2,783 MB, the least that a version of this compiler
# has counted for the form of the paper (libtpu 0.0.42 counts 3,702).
MOST_BYTES = 556e6
MIXED = {"data": 2, "fsdp": 2, "tensor": 2}


def kernels(topology, dtype, *, expected=2, **options):
    """One forward and one backward, unless something has to run again."""
    compiled = attention(topology, "pallas_tpu", dtype, **options)
    found = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    assert found == expected, f"{found} kernels, expected {expected}"
    return compiled


def kept_outputs():
    kernels("v5e:2x2", "bfloat16", **ENWIK8, wrap=jax.checkpoint, expected=3)
    policy = jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME)
    keep = functools.partial(jax.checkpoint, policy=policy)
    return kernels("v5e:2x2", "bfloat16", **ENWIK8, wrap=keep)


def few_bytes():
    compiled = kernels("v5e:2x2", "bfloat16", **ENWIK8)
    found = compiled.cost_analysis()["bytes accessed"]
    assert found < MOST_BYTES, f"{found / 1e6:.0f} MB"
    return compiled


def lstm(topology, sizes, **fields):
    config = "lstm_penn:batch=32"
    return train_step(topology, sizes, config=config, vocab_size=10_000, **fields)


def universal(topology, sizes, **fields):
    config = "universal_base:batch=8"
    return train_step(topology, sizes, "auto", config=config, **fields)


def sha_rnn(topology, sizes, **fields):
    config = "sha_rnn_enwik8:batch=32"
    return train_step(topology, sizes, config=config, vocab_size=205, **fields)


# Of less, which compiles in less time.
SMALL_LSTM = dict(n_layer=1, d_model=256)
SMALL_UNIVERSAL = dict(n_step=2, d_model=256, n_head=4, d_inner=512, scan_layers=True)
SMALL_SHA_RNN = dict(n_layer=2, d_model=256, d_inner=512, memory_length=1280)
TWO_LAYERS = dict(n_layer=2, scan_layers=True, dropout=0.1, attention_dropout=0.1)
CHECKS = {
    "v5e enwik8 bfloat16": few_bytes,
    "v5e enwik8 float32": lambda: kernels("v5e:2x2", "float32", **ENWIK8),
    "v5e enwik8 bfloat16, dropout, one more column of positions": lambda: kernels(
        "v5e:2x2", "bfloat16", **ENWIK8, R=65, rate=0.1
    ),
    "v5e enwik8 bfloat16, rematerialised but for the outputs": kept_outputs,
    "v5e wt103 bfloat16": lambda: kernels("v5e:2x2", "bfloat16", **WT103),
    "v5e wt103 float32": lambda: kernels("v5e:2x2", "float32", **WT103),
    "v5e memory 3,800 bfloat16": lambda: kernels("v5e:2x2", "bfloat16", **LONG),
    "v5e memory 3,800 float32": lambda: kernels("v5e:2x2", "float32", **LONG),
    "v5e one tile of keys, head size 80": lambda: kernels(
        "v5e:2x2", "bfloat16", B=8, H=8, T=300, M=212, K=80
    ),
    "v5p enwik8 bfloat16": lambda: kernels("v5p:2x2x1", "bfloat16", **ENWIK8),
    "v5p wt103 float32": lambda: kernels("v5p:2x2x1", "float32", **WT103),
    "v6e enwik8 bfloat16": lambda: kernels("v6e:2x2", "bfloat16", **ENWIK8),
    "v6e wt103 float32": lambda: kernels("v6e:2x2", "float32", **WT103),
    "step, data 8": lambda: train_step(
        "v5e:2x4", {"data": 8}, "pallas_tpu", **TWO_LAYERS
    ),
    "step, data 2 x fsdp 2 x tensor 2": lambda: train_step(
        "v5e:2x4", MIXED, "auto", **TWO_LAYERS
    ),
    "step, data 2 x fsdp 2 x tensor 2, layers one by one": lambda: train_step(
        "v5e:2x4", MIXED, "pallas_tpu", **TWO_LAYERS | {"scan_layers": False}
    ),
    "step, data 2 x fsdp 2 x tensor 2, xla": lambda: train_step(
        "v5e:2x4", MIXED, "xla", **TWO_LAYERS
    ),
    "step of a small lstm, data 2 x fsdp 2 x tensor 2": lambda: lstm(
        "v5e:2x4", MIXED, **SMALL_LSTM
    ),
    "step of a small universal, data 2 x fsdp 2 x tensor 2": lambda: universal(
        "v5e:2x4", MIXED, **SMALL_UNIVERSAL
    ),
}
FULL = {
    # 70 s on two cores: a third of what the others of CHECKS take together.
    "step of a small sha_rnn, data 2 x fsdp 2 x tensor 2": lambda: sha_rnn(
        "v5e:2x4", MIXED, **SMALL_SHA_RNN
    ),
    "v5e enwik8 bfloat16, the form of the paper": lambda: attention(
        "v5e:2x2", "classic", "bfloat16", **ENWIK8
    ),
    "v5e enwik8 bfloat16, blocked": lambda: attention(
        "v5e:2x2", "blocked", "bfloat16", **ENWIK8
    ),
    "v5e enwik8 bfloat16, xla": lambda: attention(
        "v5e:2x2", "xla", "bfloat16", **ENWIK8
    ),
    "step of enwik8_base:batch=32, data 8": lambda: train_step(
        "v5e:2x4", {"data": 8}, "auto", config="enwik8_base:batch=32"
    ),
    "step of enwik8_large:batch=32, data 8, remat": lambda: train_step(
        "v5e:2x4", {"data": 8}, "auto", config="enwik8_large:batch=32", remat="full"
    ),
    **{
        f"{topology} step of {step.__name__}, data 8": (
            lambda step=step, topology=topology: step(topology, {"data": 8})
        )
        for topology in ("v5e:2x4", "v5p:2x2x2", "v6e:2x4")
        for step in (lstm, universal, sha_rnn)
    },
}


if __name__ == "__main__":
    run(CHECKS | (FULL if sys.argv[1:] == ["full"] else {}))
