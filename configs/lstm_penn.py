"""Penn Treebank, words, AWD-LSTM: 3 LSTM layers of 1,150 units, 24,221,600 parameters.

Paper:    Merity et al. 2018 (arXiv 1708.02182), table 1
Source:   the program of its authors (awd-lstm-lm), whose README gives the command:
          --batch_size 20 --dropouti 0.4 --dropouth 0.25, the rest its defaults
Command:  python -m xlformer.train --config=lstm_penn --workdir=runs/lstm_penn
Hardware: one NVIDIA Quadro GP100: 65 seconds an epoch (that README), so 9 hours
Expected: perplexity 58.8 on test, 61.2 on validation (that README, without fine-tuning
          or pointer; the paper has 58.8 and 60.7); not measured here
          python -m xlformer.evaluate --workdir=runs/lstm_penn --split=test
          with segment 70 and one row (--batch_size=1)
Differs:  an epoch is said in steps, 681 of about 68 tokens in 20 rows; random numbers.
          The original's lookup passes no gradient to the last word of its vocabulary.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 10_000  # 9,999 types of train and <eos>
PARAMETERS = 24_221_600

EPOCH = 681  # steps: 929,589 tokens in 20 rows of segments of 68.25 on average


def get_config(debug=False, batch=0):
    config = default_config(
        "lstm",
        n_layer=3,
        d_model=400,
        d_hidden=1150,
        dropout=0.4,
        hidden_dropout=0.25,
        input_dropout=0.4,
        word_dropout=0.1,
        weight_dropout=0.5,
        activation_penalty=2.0,
        temporal_penalty=1.0,
    )
    config.data.corpus = "penn"
    config.train.update(steps=500 * EPOCH, batch_size=20, segment_length=70)
    config.train.update(log_every=200, eval_every=EPOCH, save_every=EPOCH)
    config.train.variable_length = True
    config.optimizer.update(name="nt_asgd", learning_rate=30.0, schedule="constant")
    config.optimizer.update(length_scaled=True, weight_decay=1.2e-6)
    config.eval.update(segment_length=70, batch_size=10)
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
