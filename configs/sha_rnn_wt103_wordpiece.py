"""WikiText-103 in word pieces, SHA-RNN, 4 blocks, one with attention.

61,787,968 parameters with 8,000 pieces.

Paper:    Merity 2019, Single Headed Attention RNN (arXiv 1911.11423), whose second
          version takes its figures of this corpus back ("normalization issues")
Command:  python -m xlformer.train --workdir=runs/sha_rnn_wt103
          --config=sha_rnn_wt103_wordpiece
Variant:  sha_rnn_wt103_wordpiece:tokenizer=FILE, of SentencePiece or of Hugging Face's
          tokenizers; tokenizer=sentencepiece:N trains one of N pieces
Data:     wikitext103 (docs/data.md), in byte pairs that Hugging Face's tokenizers
          train on its training split; the original's program names a file of
          YouTokenToMe, which is not published
Hardware: not published
Expected: no valid figure is published. The card gives perplexity per word, the nats of
          all pieces by the words of the text, which compares with wt103_base whatever
          the pieces are; not measured here
          python -m xlformer.evaluate --workdir=runs/sha_rnn_wt103 --split=test
Differs:  the pieces and the length of the run, which the paper does not say; otherwise
          sha_rnn_enwik8
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 8000  # whatever the tokenizer has
PARAMETERS = 61_787_968


def get_config(debug=False, batch=0, tokenizer="tokenizers:8000"):
    config = default_config(
        "sha_rnn",
        n_layer=4,
        d_model=1024,
        d_inner=4096,
        attention="second_last",
        memory_length=5000,
        dropout=0.1,
        hidden_dropout=0.1,
        input_dropout=0.1,
    )
    config.data.update(corpus="wikitext103", tokenizer=tokenizer)
    config.train.update(steps=150_000, batch_size=16, segment_length=1024)
    config.train.update(log_every=200, eval_every=4000, save_every=4000)
    config.train.variable_length = True
    config.optimizer.update(name="lamb_sha_rnn", learning_rate=2e-3, epsilon=1e-6)
    config.optimizer.update(weight_decay=1.2e-6, min_trust=0.25)
    config.optimizer.update(warmup_steps=800, warmup_from=1)
    config.optimizer.update(schedule="steps", decay_at=(32 / 37,), decay_factor=0.5)
    config.eval.update(segment_length=1024, batch_size=8)
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
