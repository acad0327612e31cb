"""enwik8, the vanilla Transformer of 64 layers: 235,470,848 parameters in training.

Paper:    Al-Rfou et al. 2018 (arXiv 1808.04444); figures as in Dai et al. 2019,
          table 2
Command:  python -m xlformer.train --config=vanilla_enwik8_64 --workdir=runs/t64
Hardware: one TPU v2, 175 hours for the best of 4,000,000 steps, at about 2,500,000
Expected: 1.06 bits per character on test (published), by
          python -m xlformer.evaluate --workdir=runs/t64 --split=test --stride=1
          a window of 512 bytes for each one that is scored: 512 times the work of
          scoring without --stride
Differs:  as vanilla_enwik8_12 does. 218,792,192 of the parameters are beside the
          classifiers (published: 235M with them); with model.attention_bias=False there
          are 235,339,776 and 218,661,120.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 256  # every value of a byte, in the text or not
PARAMETERS = 235_470_848


def get_config(debug=False, batch=0):
    config = default_config(
        "vanilla",
        n_layer=64,
        d_model=512,
        n_head=2,
        d_inner=2048,
        context_length=512,
        attention_bias=True,
        dropout=0.55,
        attention_dropout=0.55,
        scan_layers=True,
        remat="attention",
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
