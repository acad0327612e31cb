"""enwik8, the vanilla Transformer of 12 layers: 44,257,280 parameters in training.

Paper:    Al-Rfou et al. 2018 (arXiv 1808.04444); figures as in Dai et al. 2019,
          table 2
Command:  python -m xlformer.train --config=vanilla_enwik8_12 --workdir=runs/t12
Hardware: not published for 12 layers
Expected: 1.11 bits per character on test (published), by
          python -m xlformer.evaluate --workdir=runs/t12 --split=test --stride=1
          a window of 512 bytes for each one that is scored: 512 times the work of
          scoring without --stride
Differs:  segments follow each other, where the paper draws windows. The paper says
          nothing of biases in attention: with them there are 44,257,280 parameters in
          training (published: 44M), 41,236,736 of them beside the classifiers of its
          losses; with model.attention_bias=False 44,232,704 and 41,212,160.
          Not published either: how parameters begin, and clipping (none here). Dropout,
          the optimizer and its steps are as others report them.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 256  # every value of a byte, in the text or not
PARAMETERS = 44_257_280


def get_config(debug=False, batch=0):
    config = default_config(
        "vanilla",
        n_layer=12,
        d_model=512,
        n_head=2,
        d_inner=2048,
        context_length=512,
        attention_bias=True,
        dropout=0.2,
        attention_dropout=0.2,
        scan_layers=True,
    )
    config.data.update(corpus="enwik8", alphabet="bytes")
    config.train.update(steps=4_000_000, batch_size=16, segment_length=512)
    config.train.update(log_every=200, eval_every=10_000, save_every=10_000)
    config.optimizer.update(name="sgd", momentum=0.99, learning_rate=0.003)
    config.optimizer.update(schedule="constant", clip_norm=0.0)
    config.eval.update(segment_length=512, batch_size=16)
    config.eval.max_tokens = 1_000_000  # in training: a fifth of the split
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
