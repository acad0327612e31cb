"""The bytes of Python's own standard library, SHA-RNN, 4 blocks, 680,768 parameters.

Paper:    none: the shape of sha_rnn_enwik8 (Merity 2019) at the size of `quickstart`
Command:  python -m xlformer.train --config=sha_rnn_small --workdir=runs/sha_rnn_small
Hardware: 2 CPU cores: minutes; a step takes 0.116 CPU-seconds, one of quickstart 0.127
Expected: not measured
Variant:  sha_rnn_small:attention=none has no attention (641,792 parameters),
          sha_rnn_small:attention=all has it in all blocks (797,696)
Differs:  from the published runs in Adam for LAMB: after 400 steps 3.27 bits per byte,
          where LAMB at 4e-3 had 3.93 after 300 (one seed)
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 256  # bytes
PARAMETERS = 680_768

STEPS = 3000
LEARNING_RATE = 3e-3


def get_config(debug=False, batch=0, attention="second_last"):
    config = default_config(
        "sha_rnn",
        n_layer=4,
        d_model=112,
        d_inner=448,
        attention=attention,
        memory_length=0 if attention == "none" else 256,
        dropout=0.0,  # less than one epoch: nothing to overfit
        hidden_dropout=0.0,
        input_dropout=0.0,
    )
    config.data.corpus = "stdlib"
    config.train.update(steps=STEPS, batch_size=16, segment_length=64)
    config.train.update(log_every=50, eval_every=1000, save_every=1000)
    config.optimizer.update(learning_rate=LEARNING_RATE, warmup_steps=100)
    config.optimizer.schedule = "cosine_after_warmup"
    config.eval.update(segment_length=64, batch_size=16)
    config.eval.max_tokens = 65_536  # in training: seconds, not a minute
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
