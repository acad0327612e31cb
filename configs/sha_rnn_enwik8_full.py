"""enwik8, SHA-RNN, 4 blocks, all with attention, 63,272,141 parameters.

Paper:    Merity 2019, Single Headed Attention RNN (arXiv 1911.11423)
Source:   the program of its author (sha-rnn): use_attn=True in all blocks, batch 8
Command:  python -m xlformer.train --config=sha_rnn_enwik8_full
          --workdir=runs/sha_rnn_enwik8_full
Hardware: one Titan V of 12 GB, an hour an epoch (its README)
Expected: 1.068 bits per character on test (the paper, 54M: without what makes the
          vectors of the values, 54,875,341: xlformer.convert --collapse; its README
          has 1.07 at 63M); not measured here
          python -m xlformer.evaluate --workdir=runs/sha_rnn_enwik8_full --split=test
          with segment 1,024, memory 5,000 and 8 rows (config.eval)
Differs:  as sha_rnn_enwik8
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 205  # bytes in use, newlines kept
PARAMETERS = 63_272_141

EPOCH = 11_294  # steps: 90 million bytes in 8 rows of segments of 996 on average


def get_config(debug=False, batch=0):
    config = default_config(
        "sha_rnn",
        n_layer=4,
        d_model=1024,
        d_inner=4096,
        attention="all",
        memory_length=5000,
        dropout=0.1,
        hidden_dropout=0.1,
        input_dropout=0.1,
    )
    config.data.corpus = "enwik8"
    config.train.update(steps=37 * EPOCH, batch_size=8, segment_length=1024)
    config.train.update(log_every=200, eval_every=EPOCH, save_every=EPOCH)
    config.train.variable_length = True
    config.optimizer.update(name="lamb_sha_rnn", learning_rate=2e-3, epsilon=1e-6)
    config.optimizer.update(weight_decay=1.2e-6, min_trust=0.25)
    config.optimizer.update(warmup_steps=800, warmup_from=1)
    # After epoch 32 of 37.
    config.optimizer.update(schedule="steps", decay_at=(32 / 37,), decay_factor=0.5)
    config.eval.update(segment_length=1024, batch_size=8)
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
