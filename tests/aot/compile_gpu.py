"""Compiles for a GPU that is not here, to the machine code that it would run.

    python tests/aot/compile_gpu.py

The fused attention kernels for an H100, then training steps. A line for each. Exit
code 1 if one does not compile, needs more shared memory than there is, or fetches what
is not written yet. Needs jax[cuda12] (5 GB), no GPU.
"""

import os
import pathlib
import re
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"

from programs import ENWIK8, LONG, WT103, attention, run, train_step

LARGE = dict(B=4, H=8, T=768, M=768, K=128)
KERNELS = {"forward", "backward_queries", "backward_keys"}


def kernels(dtype, **options):
    """All three are there, and read the ring when it has been written."""
    with tempfile.TemporaryDirectory() as dump:
        compiled = attention(
            "h100",
            "pallas_gpu",
            dtype,
            compiler_options={"xla_dump_to": dump, "xla_dump_hlo_as_text": True},
            **options,
        )
        texts = [path.read_text() for path in pathlib.Path(dump).glob("*.ptx")]
    entry = re.compile(r"\.entry relative_attention_(\w+)\(")
    found = {m[1]: text for text in texts if (m := entry.search(text))}
    assert found.keys() == KERNELS, found.keys()
    for name in KERNELS - {"backward_keys"}:
        # Asynchronous copies run ahead of the loop; a volatile load stays where it is.
        before_load, load, _ = found[name].partition("ld.volatile.global")
        last = re.findall(r"bar\.sync|st\.global", before_load)[-1]
        assert load and last == "bar.sync", name
    return compiled


def step(config, sizes, implementation="auto", **fields):
    return train_step("h100:8", sizes, implementation, config=config, **fields)


TWO_LAYERS = dict(n_layer=2, scan_layers=True, dropout=0.1, attention_dropout=0.1)
CHECKS = {
    "h100 enwik8 bfloat16": lambda: kernels("bfloat16", **ENWIK8),
    "h100 enwik8 float32": lambda: kernels("float32", **ENWIK8),
    "h100 enwik8 bfloat16, dropout, one more column of positions": lambda: kernels(
        "bfloat16", **ENWIK8, R=65, rate=0.1
    ),
    "h100 enwik8 large bfloat16": lambda: kernels("bfloat16", **LARGE),
    "h100 wt103 bfloat16": lambda: kernels("bfloat16", **WT103),
    "h100 wt103 float32": lambda: kernels("float32", **WT103),
    "h100 memory 3,800 bfloat16": lambda: kernels("bfloat16", **LONG),
    "h100 enwik8 bfloat16, blocked": lambda: attention(
        "h100", "blocked", "bfloat16", **ENWIK8
    ),
    "h100 enwik8 bfloat16, xla": lambda: attention("h100", "xla", "bfloat16", **ENWIK8),
    "step, data 8": lambda: step("quickstart", {"data": 8}, "pallas_gpu", **TWO_LAYERS),
    "step, data 2 x fsdp 2 x tensor 2": lambda: step(
        "quickstart",
        {"data": 2, "fsdp": 2, "tensor": 2},
        "pallas_gpu",
        **TWO_LAYERS,
    ),
    "step of enwik8_base:batch=176, data 8": lambda: step(
        "enwik8_base:batch=176", {"data": 8}
    ),
    "step of enwik8_large:batch=128, data 8": lambda: step(
        "enwik8_large:batch=128", {"data": 8}
    ),
    "step of lstm_penn:batch=32, data 8": lambda: train_step(
        "h100:8", {"data": 8}, config="lstm_penn:batch=32", vocab_size=10_000
    ),
    "step of sha_rnn_enwik8:batch=32, data 8": lambda: train_step(
        "h100:8", {"data": 8}, config="sha_rnn_enwik8:batch=32", vocab_size=205
    ),
    "step of universal_base:batch=8, data 2 x fsdp 2 x tensor 2": lambda: step(
        "universal_base:batch=8", {"data": 2, "fsdp": 2, "tensor": 2}
    ),
}

if __name__ == "__main__":
    run(CHECKS)
