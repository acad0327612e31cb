"""The bytes of Python's own standard library, 3 layers: minutes on two CPU cores.

Paper:    none; the run that shows on any machine, without a network, that all works
Command:  bash launch/local.sh, or
          python -m xlformer.train --config=quickstart --workdir=runs/quickstart
Hardware: 2 CPU cores (AMD EPYC): 3:03 (2026-11-26; 2:21 with one device on 2026-11-22)
Expected: 2.055 bits per byte on test (Python 3.11.7, jax 0.10.2, 2026-11-26), by
          python -m xlformer.evaluate --workdir=runs/quickstart --split=test
          trained on two CPU devices; 2.056 with --cpu_devices=1, another order of sums;
          with segment 64 and memory 64 (config.eval). The corpus is the interpreter's
          own library, so numbers compare within one Python version only.
Variant:  quickstart:positions=rotary, the same memory without the paper's encoding:
          1.846 bits per byte on 65,536 bytes of validation after training, where the
          paper's has 1.838 and, with another order of summation, 1.830 (what both print
          at step 3,200; one seed, 2026-11-22).
          quickstart:optimizer=muon or adafactor, and quickstart:tail=0.25, which has a
          constant rate and averages the last quarter of its steps: not run to the end
          (docs/flags.md has 200 steps of muon).
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 256  # bytes
PARAMETERS = 675_968

STEPS = 3200  # at 0.04 to 0.053 s each on two cores
LEARNING_RATE = 4e-3
# How each was chosen, and on what device: docs/flags.md.
RATES = {"muon": 8e-3, "adafactor": 1e-1}


def get_config(debug=False, batch=0, positions="original", optimizer="adam", tail=0.0):
    config = default_config(
        "transformer_xl",
        n_layer=3,
        d_model=128,
        n_head=4,
        d_head=32,
        d_inner=512,
        memory_length=64,
        pre_norm=True,  # learns faster than post-norm in so few steps
        final_norm=True,
        dropout=0.0,  # less than one epoch: nothing to overfit
        attention_dropout=0.0,
    )
    config.model.positions = positions
    config.data.corpus = "stdlib"
    config.train.update(steps=STEPS, batch_size=16, segment_length=64)
    config.train.update(log_every=50, eval_every=800, save_every=800)
    rate = RATES.get(optimizer, LEARNING_RATE)
    config.optimizer.update(name=optimizer, learning_rate=rate, warmup_steps=100)
    config.optimizer.schedule = "constant" if tail else "cosine_after_warmup"
    config.train.tail_average = tail
    config.eval.update(segment_length=64, batch_size=16)
    config.eval.max_tokens = 65_536  # in training: seconds, not a minute
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
