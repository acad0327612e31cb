"""The vanilla Transformer on the bytes of Python's standard library: minutes on a CPU.

Paper:    Al-Rfou et al. 2018 (arXiv 1808.04444), in small: the sizes of quickstart
Command:  python -m xlformer.train --config=vanilla_small --workdir=runs/vanilla_small
Hardware: 2 CPU cores; 0.89 of quickstart's FLOPs a step, of which each has 3,200
Expected: 2.192 bits per byte on test (Python 3.11.7, jax 0.10.2, 2026-11-26), by
          python -m xlformer.evaluate --workdir=runs/vanilla_small --split=test
          in segments of 64, and 2.124 with --stride=16, which reads four times as much.
          683,648 of the parameters remain beside the classifiers of its losses.
Variant:  vanilla_small:auxiliary=False, without these losses and classifiers
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 256  # bytes
PARAMETERS = 848_768


def get_config(debug=False, batch=0, auxiliary=True):
    config = default_config(
        "vanilla",
        n_layer=3,
        d_model=128,
        n_head=4,
        d_inner=512,
        context_length=64,
        layer_losses=auxiliary,
        second_target_weight=0.5 if auxiliary else 0.0,
        init_std=0.06,  # in 400 steps 2.94 bits where 0.02 has 3.16
        dropout=0.0,  # less than one epoch: nothing to overfit
        attention_dropout=0.0,
    )
    config.data.corpus = "stdlib"
    config.train.update(steps=3200, batch_size=16, segment_length=64)
    config.train.update(log_every=50, eval_every=800, save_every=800)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100)
    config.optimizer.schedule = "cosine_after_warmup"
    config.eval.update(segment_length=64, batch_size=16)
    config.eval.max_tokens = 65_536  # in training: seconds, not a minute
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
