"""Worker: the original PyTorch Transformer-XL (kimiyoung/transformer-xl, 44781ed).

Forms are FORM-DTYPE: eager or compile (torch.compile and the fused Adam), f32 or bf16
(autocast). What a current PyTorch refuses is changed in memory while it is loaded.
"""

from __future__ import annotations

import sys

import torch
import torch_side
import worker
from settings import Setting

FOLDER = torch_side.PEERS / "transformer-xl/pytorch"
# It asks for CUDA's version where there may be none, and uses it nowhere.
NO_CUDA_VERSION = {
    "CUDA_MAJOR = int(torch.version.cuda.split('.')[0])": "",
    "CUDA_MINOR = int(torch.version.cuda.split('.')[1])": "",
}
# masked_fill takes no masks of bytes any more.
BOOLEAN_MASKS = {".byte()[:": ".bool()[:"}
# Reading the mask back cuts the graph of torch.compile in every layer.
NO_READING_BACK = {
    "attn_mask is not None and attn_mask.any().item()": "attn_mask is not None"
}
DTYPES = {"f32": None, "bf16": torch.bfloat16}


def build(setting: Setting, form: str):
    how, _, dtype = form.partition("-")
    model = load(how).MemTransformerLM(**arguments(setting))
    torch_side.randomize(model)
    model.to(torch_side.device()).train(setting.train)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32: faster than its default
    memory = torch_side.fill(caller(model), setting, torch_side.batches(setting))
    called = torch.compile(model) if how == "compile" else model
    if setting.train:
        optimizer = torch.optim.Adam(
            model.parameters(),
            lr=torch_side.RATE,
            fused=True if how == "compile" else None,
        )
        run = torch_side.training(
            caller(called),
            model,
            setting,
            mems=memory,
            optimizer=optimizer,
            dtype=DTYPES[dtype],
        )
    else:
        run = torch_side.scoring(caller(called), setting, mems=memory)
    return run, torch_side.facts(model)


def load(how: str):
    """Its mem_transformer.py."""
    sys.path[:0] = [str(FOLDER / "utils"), str(FOLDER)]
    name = "proj_adaptive_softmax"
    torch_side.module(name, FOLDER / f"utils/{name}.py", NO_CUDA_VERSION)
    patches = BOOLEAN_MASKS | (NO_READING_BACK if how == "compile" else {})
    return torch_side.module("mem_transformer", FOLDER / "mem_transformer.py", patches)


def arguments(setting: Setting) -> dict:
    """Of its model, for the shapes of a setting."""
    return {
        "n_token": setting.vocab_size,
        "n_layer": setting.n_layer,
        "n_head": setting.n_head,
        "d_model": setting.d_model,
        "d_head": setting.d_head,
        "d_inner": setting.d_inner,
        "dropout": setting.dropout,
        "dropatt": setting.attention_dropout,
        "div_val": setting.div_val,
        "cutoffs": list(setting.cutoffs),
        "tie_projs": [False] + [True] * len(setting.cutoffs),
        "tgt_len": setting.segment_length,
        "ext_len": 0,
        "mem_len": setting.memory_length,
        "same_length": setting.same_length,
        "clamp_len": setting.clamp_length or -1,
    }


def caller(model):
    """forward(inputs, targets, mems) -> (loss, mems)."""

    def forward(inputs, targets, mems):
        loss, *mems = model(inputs, targets, *(mems or ()))
        return loss, mems

    return forward


if __name__ == "__main__":
    worker.serve(build)
