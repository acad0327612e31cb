"""Worker: xlformer, by the functions that its own commands run.

Forms: an implementation of attention ('auto', 'xla', ...) with cached keys and values
in scoring, on as many CPU devices as the commands make; ONE, the same on one device;
PLAIN, that with the plain memory projected again in every segment; and NAIVE, a plain
JAX port (naive.py).
"""

from __future__ import annotations

import importlib.metadata

import jax
import linear
import naive
import numpy as np
import worker
from settings import Linear, Recurrent, Setting, SingleHead, Step

from xlformer import models, scoring, sharding
from xlformer.config import default_config
from xlformer.machines import cores, rehearsal
from xlformer.models import TransformerXL
from xlformer.models.base import Model, compute_dtype
from xlformer.training.compiling import TrainingStep

NAIVE, PLAIN, ONE = "naive", "plain", "one device"


class Plain(TransformerXL):
    """Scores with the memory as it is: what every model does unless it says more."""

    to_cache = Model.to_cache
    cache_axes = Model.cache_axes


def build(setting: Step, form: str):
    if form == NAIVE:
        run, parameters = naive.build(setting, worker.batches(setting))
        return run, facts(parameters, "float32")
    if isinstance(setting, Linear):
        return linear.build(setting), facts(0, "float32")
    config = config_of(setting, "auto" if form in (PLAIN, ONE) else form)
    cores.prepare(
        config,
        asked=1 if form in (PLAIN, ONE) else None,
        rows=setting.batch_size,
        segment_length=setting.segment_length,
        sizes={"data": -1},
        training=setting.train,
    )
    model = models.build(config.model, vocab_size=setting.vocab_size)
    if form == PLAIN:
        model = Plain(model.config)
    cpu = jax.default_backend() == "cpu"
    mesh = sharding.make_mesh({"data": -1 if cpu else 1}, rows=setting.batch_size)
    make = training if setting.train else evaluation
    run, params = make(setting, config, model, mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return run, facts(parameters, compute_dtype(config.model.dtype).name)


def config_of(setting: Step, implementation: str):
    """The setting as a config of xlformer."""
    if isinstance(setting, Recurrent):
        config = _lstm(setting)
    elif isinstance(setting, SingleHead):
        config = _sha_rnn(setting)
    else:
        config = _transformer_xl(setting, implementation)
    config.train.update(batch_size=setting.batch_size)
    config.train.update(segment_length=setting.segment_length)
    config.optimizer.update(name=setting.optimizer, schedule="constant")
    return config


def _lstm(setting: Recurrent):
    same = ("n_layer", "d_model", "d_hidden", "cutoffs", "dropout", "hidden_dropout")
    same += ("input_dropout", "word_dropout", "weight_dropout")
    same += ("activation_penalty", "temporal_penalty")
    fields = {name: getattr(setting, name) for name in same}
    dtype = "auto" if setting.half else "float32"
    config = default_config("lstm", dtype=dtype, **fields)
    # Adam of theirs adds the decay to the gradient, which ours does not have; it costs
    # nothing beside the rest.
    if setting.optimizer == "sgd":
        config.optimizer.weight_decay = setting.weight_decay
    return config


def _sha_rnn(setting: SingleHead):
    rates = ("dropout", "hidden_dropout", "input_dropout")
    return default_config(
        "sha_rnn",
        n_layer=setting.n_layer,
        d_model=setting.d_model,
        d_inner=setting.d_inner,
        memory_length=setting.memory_length,
        dtype="auto" if setting.half else "float32",
        **dict.fromkeys(rates, setting.dropout),
    )


def _transformer_xl(setting: Setting, implementation: str):
    bins = 1 + len(setting.cutoffs)
    return default_config(
        "transformer_xl",
        n_layer=setting.n_layer,
        d_model=setting.d_model,
        n_head=setting.n_head,
        d_head=setting.d_head,
        d_inner=setting.d_inner,
        memory_length=setting.memory_length,
        clamp_length=setting.clamp_length,
        same_length=setting.same_length,
        dropout=setting.dropout,
        attention_dropout=setting.attention_dropout,
        cutoffs=setting.cutoffs,
        div_val=setting.div_val,
        tie_projections=(False,) + (True,) * (bins - 1) if bins > 1 else (),
        scan_layers=setting.gpu,  # as the published configs; it compiles in less time
        dtype="auto" if setting.half else "float32",
        attention=implementation,
    )


def training(setting, config, model, mesh):
    """The step that xlformer.train compiles, with two in flight as there."""
    step, batch = TrainingStep(config, model, mesh), rehearsal.batch(config, model)
    compiled = step.compile(batch)
    create = jax.jit(step.create, out_shardings=step.placed)
    state = create(jax.random.key(config.seed))
    batches = [
        {**batch, "inputs_BT": inputs_BT, "targets_BT": targets_BT}
        for inputs_BT, targets_BT in worker.batches(setting)
    ]

    def run(times: int) -> int:
        nonlocal state
        pending = None
        for k in range(times):
            state, found = compiled(state, batches[k % len(batches)])
            if pending is not None:
                pending.block_until_ready()
            pending = found["train/loss_nats"]
        pending.block_until_ready()
        return times * setting.tokens

    return run, state.params


def evaluation(setting, config, model, mesh):
    """xlformer.evaluate's scoring of one text, whose length is that of the round."""
    key = jax.random.key(config.seed)
    abstract = jax.eval_shape(model.init, key)
    placed = sharding.parameters(mesh, abstract, model.param_axes(abstract))
    params = jax.jit(model.init, out_shardings=placed)(key)
    rows, T = setting.batch_size, setting.segment_length
    evaluator = scoring.Evaluator(model, batch_size=rows, segment_length=T, mesh=mesh)
    evaluator.compile(params)
    rows_BN = np.concatenate([x for x, _ in worker.batches(setting)], axis=1)
    # In one compiled call; so the calls are full.
    each = max(1, scoring.TOKENS_PER_CALL // (rows * T))

    def run(times: int) -> int:
        N = times * each * T + 1
        repeated = -(-N // rows_BN.shape[1])
        tokens = np.tile(rows_BN, (1, repeated))[:, :N].ravel()
        plan = scoring.cut_rows_for(
            model,
            len(tokens),
            batch_size=rows,
            segment_length=T,
            warmup="none",
        )
        return evaluator.score(params, tokens, plan).targets

    return run, params


def facts(parameters: int, dtype: str) -> dict:
    names = ("jax", "jaxlib", "flax", "optax")
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "versions": {name: importlib.metadata.version(name) for name in names},
        "dtype": dtype,
        "parameters": int(parameters),
    }


if __name__ == "__main__":
    worker.serve(build)
