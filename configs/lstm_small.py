"""Penn Treebank, words, 2 LSTM layers, 3,416,592 parameters: ten minutes on one core.

Paper:    none: a plain LSTM (Merity et al. 2018 without their regularisers but dropout)
          of the size of `penn`, the Transformer-XL beside it
Command:  python -m xlformer.train --config=lstm_small --workdir=runs/lstm_small
Hardware: 1 CPU core (AMD EPYC): 10:04
Expected: test perplexity per word (with <eos>) 267.57 (jax 0.10.2, 2026-11-26), by
          python -m xlformer.evaluate --workdir=runs/lstm_small --split=test
          with segment 70 and 8 rows (config.eval). In the same ten minutes on the other
          core `penn` came to 178.14 in 1,030 steps of its own rate and a cosine that
          ends there (--config.train.steps=1030). One seed; no rate was searched for.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 10_000  # 9,999 types of train and <eos>
PARAMETERS = 3_416_592

STEPS = 1100  # of 1,400 tokens: the 929,589 of train 1.7 times
LEARNING_RATE = 3e-3
DROPOUT = 0.1


def get_config(debug=False, batch=0):
    config = default_config(
        "lstm",
        n_layer=2,
        d_model=200,
        d_hidden=392,
        dropout=DROPOUT,
        hidden_dropout=DROPOUT,
        input_dropout=DROPOUT,
    )
    config.data.corpus = "penn"
    config.train.update(steps=STEPS, batch_size=20, segment_length=70)
    config.train.update(log_every=100, eval_every=500, save_every=500)
    config.optimizer.update(learning_rate=LEARNING_RATE, warmup_steps=100)
    config.optimizer.schedule = "cosine_after_warmup"
    config.eval.update(segment_length=70, batch_size=8)
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
