"""enwik8, AWD-LSTM: 3 LSTM layers of 1,840 units, 47,270,045 parameters.

Paper:    Merity et al. 2018, An Analysis of Neural Language Modeling at Multiple Scales
          (arXiv 1803.08240), table 5
Source:   the program of its authors (awd-lstm-lm), whose README gives the command
Command:  python -m xlformer.train --config=lstm_enwik8 --workdir=runs/lstm_enwik8
Hardware: one NVIDIA Volta; time not measured here
Expected: 1.232 bits per character on test (the paper); not measured here
          python -m xlformer.evaluate --workdir=runs/lstm_enwik8 --split=test
          with segment 200 and one row (--batch_size=1)
Differs:  no weight decay: the original adds 1.2e-6 times the weights to the gradient
          of Adam, which adamw does otherwise. An epoch is said in steps, 3,606 of about
          195 bytes in 128 rows; random numbers.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 205  # bytes in use, newlines kept
PARAMETERS = 47_270_045

EPOCH = 3606  # steps: 90 million bytes in 128 rows of segments of 195 on average


def get_config(debug=False, batch=0):
    config = default_config(
        "lstm",
        n_layer=3,
        d_model=400,
        d_hidden=1840,
        dropout=0.4,
        hidden_dropout=0.1,
        input_dropout=0.1,
        weight_dropout=0.2,
    )
    config.data.corpus = "enwik8"
    config.train.update(steps=50 * EPOCH, batch_size=128, segment_length=200)
    config.train.update(log_every=200, eval_every=EPOCH, save_every=EPOCH)
    config.train.variable_length = True
    config.optimizer.update(learning_rate=1e-3, length_scaled=True)
    # After epochs 25 and 35 of 50.
    config.optimizer.update(schedule="steps", decay_at=(0.5, 0.7), decay_factor=0.1)
    config.eval.update(segment_length=200, batch_size=10)
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
