"""The bytes of Python's own standard library, one layer in 4 steps: minutes on a CPU.

Paper:    none; the Universal Transformer (Dehghani et al. 2018, arXiv 1807.03819) on
          any machine, without a network
Command:  python -m xlformer.train --config=universal_small --workdir=runs/small
Hardware: 2 CPU cores
Expected: not measured
Variant:  universal_small:act=accumulate, or act=convex: adaptive computation time, each
          byte with as many steps as it needs, at most 8. It has no memory, because
          tokens of different depths have no states in common; so its positions are
          absolute, and it takes twice the FLOPs, which are those of all 8 steps.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 256  # bytes
PARAMETERS = 376_736

STEPS, SEGMENT = 3200, 64
LEARNING_RATE = 3e-3


def get_config(debug=False, batch=0, act="none"):
    config = default_config(
        "universal",
        n_step=4,
        d_model=160,
        n_head=5,
        d_inner=640,
        memory_length=SEGMENT if act == "none" else 0,
        context_length=SEGMENT,
        positions="relative" if act == "none" else "sinusoid",
        act=act,
        dropout=0.0,  # less than one epoch: nothing to overfit
    )
    config.data.corpus = "stdlib"
    config.train.update(steps=STEPS, batch_size=16, segment_length=SEGMENT)
    config.train.update(log_every=50, eval_every=800, save_every=800)
    config.optimizer.update(learning_rate=LEARNING_RATE, warmup_steps=100)
    config.optimizer.schedule = "cosine_after_warmup"
    config.eval.update(segment_length=SEGMENT, batch_size=16)
    config.eval.max_tokens = 65_536  # in training: seconds, not a minute
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
