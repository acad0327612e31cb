"""PG-19 in 32,768 pieces, in segments that see themselves alone: 35.7M.

Paper:    Choromanski et al. 2020 (arXiv 2009.14794)
Command:  python -m xlformer.train --config=performer_pg19 --workdir=runs/pg19
          python -m xlformer.evaluate --workdir=runs/pg19 --split=test
Hardware: not tried
Expected: published as curves only: positive features that are drawn anew come to the
          exact Transformer, without new draws they stay above it, trigonometric ones
          are unstable, and performer_pg19:features=regularised converges sooner. The
          paper counts words from its pieces: perplexity per word = exp(1.5487 loss) on
          validation, exp(1.5359 loss) on test; `word_ppl` divides by the words of the
          text. Not measured here.
Data:     gs://deepmind-gutenberg (pip install 'xlformer[gcs,tokenizers]'), or a copy of
          it: --config.data.manual_dir=DIR. The pieces are SentencePiece's, trained on
          16 MiB of its training split (data/trained.py), or those of
          --config.data.tokenizer=FILE
Variant:  performer_pg19:mechanism=softmax, from whose weights a run goes on with
          --init_from=DIR --config.model.mechanism=favor;
          performer_pg19:carry=True, with sums over all of a book that came before
Differs:  the pieces, the length of a segment, which the paper's text does not say, and
          the batch are ours. A segment with the end of a book in it sees nothing of
          that book from where the next one begins.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 32_768  # SentencePiece
PARAMETERS = 35_713_024

SEGMENT = 2048


def get_config(
    debug=False, batch=0, mechanism="favor", features="positive", carry=False
):
    config = default_config(
        "performer",
        n_layer=6,
        d_model=512,
        n_head=8,
        d_inner=2048,
        mechanism=mechanism,
        carry_sums=carry or mechanism != "favor",
        features=features,
        n_features=256 if mechanism == "favor" else 0,
        context_length=SEGMENT,
        dropout=0.1,
        scan_layers=True,
    )
    # With lsh no reset can lie inside a segment.
    config.data.update(corpus="pg19", documents=mechanism != "lsh")
    config.train.update(steps=100_000, batch_size=64, segment_length=SEGMENT)
    config.train.update(log_every=200, eval_every=4000, save_every=4000)
    config.optimizer.update(name="adamw", learning_rate=1e-3, schedule="constant")
    config.optimizer.update(b1=0.9, b2=0.98, epsilon=1e-9, clip_norm=0.5)
    config.optimizer.weight_decay = 0.1
    config.eval.update(segment_length=SEGMENT, batch_size=8)
    config.eval.max_tokens = 1_000_000  # in training: a part of the split
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
