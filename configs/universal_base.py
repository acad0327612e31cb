"""enwik8 by a Universal Transformer of tensor2tensor's base size, 6 steps, 12.8M.

Paper:    Dehghani et al. 2018 (arXiv 1807.03819), whose language model is of LAMBADA
          alone; for enwik8 nothing is published
Source:   tensor2tensor's universal_transformer_base: sizes, dropout, Adam and its
          schedule; here as a causal language model, decoder only
Command:  python -m xlformer.train --config=universal_base --workdir=runs/universal_base
Hardware: not tried; its FLOPs are those of 6 layers of this width
Expected: not measured; no figure is published
Differs:  hidden units are dropped at 0.3 as the residuals are, where tensor2tensor has
          a relu_dropout of 0.1; no label smoothing (0.1 there), which is not a loss in
          nats; kernels begin normal with the variance 1/1024, not uniform.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 205  # bytes in use
PARAMETERS = 12_810_445

SEGMENT = 512


def get_config(debug=False, batch=0, act="none"):
    config = default_config(
        "universal",
        n_step=6,
        d_model=1024,
        n_head=16,
        d_inner=4096,
        memory_length=0,
        context_length=SEGMENT,
        act=act,  # adaptive_universal_transformer_base has convex, at most 12 steps
        force_halt_last=act == "none",  # not in its ACT
        dropout=0.3,
        attention_dropout=0.1,
        scan_layers=True,
    )
    config.data.update(corpus="enwik8")
    config.train.update(steps=400_000, batch_size=64, segment_length=SEGMENT)
    config.train.update(log_every=200, eval_every=4000, save_every=4000)
    # 2 / sqrt(1024): the rate of step n is 1 / 16 / sqrt(max(n, 8000)) after warm-up.
    config.optimizer.update(learning_rate=0.0625, schedule="inverse_sqrt")
    config.optimizer.update(warmup_steps=8000, clip_norm=0.0)
    config.optimizer.update(b1=0.9, b2=0.997, epsilon=1e-9)
    config.eval.update(segment_length=SEGMENT, batch_size=8)
    config.eval.max_tokens = 1_000_000  # in training: a fifth of the split
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
