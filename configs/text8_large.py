"""text8, 24 layers, 277,050,395 parameters: enwik8_large with its settings unchanged.

Paper:    Dai et al. 2019 (arXiv 1901.02860), table 3
Source:   the TensorFlow original's text8 large scripts
Command:  python -m xlformer.train --config=text8_large --workdir=runs/text8_large
Hardware: 32 TPU cores, 2-5 days (the original's README, for all four data sets)
Expected: 1.08 bits per character on test (published), by
          python -m xlformer.evaluate --workdir=runs/text8_large --split=test
          with segment 128, memory 3,800, clamp 1,000, same_length (config.eval)
Differs:  as enwik8_large: cold memory is masked, and the learning rate ends at 0.004 of
          its top. The PyTorch script, which made no figure, has no warm-up.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 27  # a to z and the space
PARAMETERS = 277_050_395


def get_config(debug=False, batch=0):
    config = default_config(
        "transformer_xl",
        n_layer=24,
        d_model=1024,
        n_head=8,
        d_head=128,
        d_inner=3072,
        memory_length=768,
        dropout=0.15,
        attention_dropout=0.15,
        init_scheme="tensorflow",
        scan_layers=True,
    )
    config.data.corpus = "text8"
    config.train.update(steps=400_000, batch_size=64, segment_length=768)
    config.train.update(log_every=200, eval_every=4000, save_every=4000)
    config.optimizer.update(learning_rate=2.5e-4, schedule="cosine_after_warmup")
    config.optimizer.update(warmup_steps=4000, final_fraction=0.004)
    config.eval.update(segment_length=128, memory_length=3800, clamp_length=1000)
    config.eval.update(same_length=True, batch_size=8)
    config.eval.max_tokens = 1_000_000  # in training: a fifth of the split
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
