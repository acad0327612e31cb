"""Penn Treebank, characters, 4 layers: what fits two CPU cores in about 25 minutes.

Paper:    none for Transformer-XL; larger models of others reach 1.12 (Mogrifier LSTM)
Command:  python -m xlformer.train --config=pennchar --workdir=runs/pennchar
Hardware: 2 CPU cores: meant for about 25 minutes
Expected: to be measured, in test bits per character (with the end of line), by
          python -m xlformer.evaluate --workdir=runs/pennchar --split=test
          with segment 64 and memory 128 (config.eval)
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 50  # 49 characters of train and <eos>
PARAMETERS = 1_934_258

STEPS = 11_000  # at 0.12 s each; of 1,024 tokens: the 5,017,482 of train 2.2 times
LEARNING_RATE = 2e-3
DROPOUT = 0.05


def get_config(debug=False, batch=0):
    config = default_config(
        "transformer_xl",
        n_layer=4,
        d_model=192,
        n_head=4,
        d_head=48,
        d_inner=768,
        memory_length=64,
        pre_norm=True,
        final_norm=True,
        dropout=DROPOUT,
        attention_dropout=0.0,
    )
    config.data.corpus = "pennchar"
    config.train.update(steps=STEPS, batch_size=16, segment_length=64)
    config.train.update(log_every=50, eval_every=1100, save_every=1100)
    config.optimizer.update(learning_rate=LEARNING_RATE, warmup_steps=200)
    config.optimizer.schedule = "cosine_after_warmup"
    config.eval.update(segment_length=64, memory_length=128, batch_size=16)
    config.eval.update(same_length=True, max_tokens=65_536)
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
