"""enwik8, 12 layers, 41,055,436 parameters: the paper's base model for characters.

Paper:    Dai et al. 2019 (arXiv 1901.02860), table 2
Source:   the PyTorch original's run_enwik8_base.sh
Command:  python -m xlformer.train --config=enwik8_base --workdir=runs/enwik8_base
Hardware: 4 GPUs of 11 GB (the original's README); time not published
Expected: 1.06 bits per character on test (published), by
          python -m xlformer.evaluate --workdir=runs/enwik8_base --split=test
          with segment 80, memory 2,100, clamp 820, same_length (config.eval)
Differs:  nothing known. Newlines are dropped as the original drops them, so its 1.06 is
          per symbol scored; data.newline=keep gives true bits per byte, another number.
          22 rows split over 1, 2 or 11 devices; TensorFlow's has 24 (':batch=24').
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 204  # bytes in use, without the newline
PARAMETERS = 41_055_436


def get_config(debug=False, batch=0):
    config = default_config(
        "transformer_xl",
        n_layer=12,
        d_model=512,
        n_head=8,
        d_head=64,
        d_inner=2048,
        memory_length=512,
        dropout=0.1,
        attention_dropout=0.0,
        scan_layers=True,
    )
    config.data.update(corpus="enwik8", newline="drop")
    config.train.update(steps=400_000, batch_size=22, segment_length=512)
    config.train.update(log_every=200, eval_every=4000, save_every=4000)
    config.optimizer.update(learning_rate=2.5e-4, schedule="cosine", warmup_steps=0)
    config.eval.update(segment_length=80, memory_length=2100, clamp_length=820)
    config.eval.update(same_length=True, batch_size=8)
    config.eval.max_tokens = 1_000_000  # in training: a fifth of the split
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
