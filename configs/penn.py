"""Penn Treebank, words, 3 layers: what fits two CPU cores in half an hour.

Paper:    the paper's own row (54.52 test perplexity with 24M parameters, variational
          dropout and weight averaging) cannot be followed: its hyper-parameters were
          never published, and nobody is known to have reproduced it. This is another,
          ten times smaller run, and does not promise that figure.
Command:  python -m xlformer.train --config=penn --workdir=runs/penn
Hardware: 2 CPU cores (AMD EPYC): 29 minutes
Expected: test perplexity per word (with <eos>) 89.54, validation 95.46 (jax 0.10.2,
          2026-11-22; two runs agreed to the bit), by
          python -m xlformer.evaluate --workdir=runs/penn --split=test
          with segment 70 and memory 70 (config.eval)
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 10_000  # 9,999 types of train and <eos>
PARAMETERS = 3_373_648

STEPS = 8000  # of 1,120 tokens: the 929,589 of train 9.6 times
LEARNING_RATE = 2e-3
DROPOUT = 0.2


def get_config(debug=False, batch=0):
    config = default_config(
        "transformer_xl",
        n_layer=3,
        d_model=192,
        n_head=6,
        d_head=32,
        d_inner=768,
        memory_length=70,
        pre_norm=True,
        final_norm=True,
        dropout=DROPOUT,
        attention_dropout=0.1,
    )
    config.data.corpus = "penn"
    config.train.update(steps=STEPS, batch_size=16, segment_length=70)
    config.train.update(log_every=100, eval_every=800, save_every=800)
    config.optimizer.update(learning_rate=LEARNING_RATE, warmup_steps=200)
    config.optimizer.schedule = "cosine_after_warmup"
    config.eval.update(segment_length=70, batch_size=8)
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
