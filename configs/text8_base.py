"""text8, 12 layers, 40,964,635 parameters: enwik8_base on 27 symbols.

Paper:    none for this size; the paper's text8 row is text8_large
Source:   the PyTorch original's run_text8_base.sh
Command:  python -m xlformer.train --config=text8_base --workdir=runs/text8_base
Hardware: not published
Expected: not published; python -m xlformer.evaluate --workdir=runs/text8_base
          --split=test scores it with segment 80, memory 2,100, clamp 820, same_length
Differs:  nothing known. TensorFlow's script has 24 rows: ':batch=24'.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 27  # a to z and the space
PARAMETERS = 40_964_635


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
    config.data.corpus = "text8"
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
