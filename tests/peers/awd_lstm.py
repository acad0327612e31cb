"""Worker: the PyTorch program of AWD-LSTM (salesforce/awd-lstm-lm, 1d466ec).

Forms: eager-f32 or compile-f32 (torch.compile and, where it is Adam, the fused one).
A current PyTorch takes it as it is, but for one line, which is changed in memory.
"""

from __future__ import annotations

import sys

import torch
import torch_side
import worker
from settings import Recurrent

FOLDER = torch_side.PEERS / "awd-lstm-lm"
# -1 was 'none' when it was written, and now is the last word, which would learn nothing
# from its lookups.
NO_PADDING = {"padding_idx = -1": "padding_idx = None"}


def build(setting: Recurrent, form: str):
    how, _, _ = form.partition("-")
    modules = load()
    model = modules["model"].RNNModel(
        "LSTM",
        setting.vocab_size,
        setting.d_model,
        setting.d_hidden,
        setting.n_layer,
        setting.dropout,
        setting.hidden_dropout,
        setting.input_dropout,
        setting.word_dropout,
        setting.weight_dropout,
        tie_weights=True,
    )
    criterion = modules["splitcross"].SplitCrossEntropyLoss(
        setting.d_model, splits=list(setting.cutoffs)
    )
    model.to(torch_side.device()).train(setting.train)
    criterion.to(torch_side.device())
    compiled = how == "compile"
    forward = caller(torch.compile(model) if compiled else model, criterion, setting)
    parameters, decay = model.parameters(), setting.weight_decay
    options = {"lr": torch_side.RATE, "weight_decay": decay}
    if setting.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, **options)
    else:
        optimizer = torch.optim.Adam(parameters, fused=compiled or None, **options)
    options = {"mems": None, "optimizer": optimizer, "dtype": None}
    run = torch_side.training(forward, model, setting, **options)
    return run, torch_side.facts(model)


def load() -> dict:
    """Its modules by name."""
    sys.path[:0] = [str(FOLDER)]
    found = {}
    for name in ("embed_regularize", "model", "splitcross"):
        patches = NO_PADDING if name == "embed_regularize" else None
        found[name] = torch_side.module(name, FOLDER / f"{name}.py", patches)
    return found


def caller(model, criterion, setting: Recurrent):
    """forward(inputs, targets, state) -> (loss, state), as the loop of its main.py."""
    decoder = model.decoder
    alpha, beta = setting.activation_penalty, setting.temporal_penalty

    def forward(inputs, targets, state):
        state = state or model.init_hidden(setting.batch_size)
        state = [tuple(x.detach() for x in pair) for pair in state]
        output, state, raw, dropped = model(inputs, state, return_h=True)
        loss = criterion(decoder.weight, decoder.bias, output, targets.reshape(-1))
        if alpha:
            loss = loss + alpha * dropped[-1].pow(2).mean()
        if beta:
            loss = loss + beta * (raw[-1][1:] - raw[-1][:-1]).pow(2).mean()
        return loss, state

    return forward


if __name__ == "__main__":
    worker.serve(build)
