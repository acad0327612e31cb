"""One Billion Word, 20 layers, 469,059,442 parameters: the paper's "Base" model.

Paper:    Dai et al. 2019 (arXiv 1901.02860), table 4
Source:   no script: 20 layers, width 1,024 and inner width 6,144 are the author's word
          (the original's issue 69); all else is lm1b_base
Command:  python -m xlformer.train --config=lm1b_base_paper --workdir=runs/lm1b_paper
Hardware: not published
Expected: 23.5 test perplexity per word (published), by
          python -m xlformer.evaluate --workdir=runs/lm1b_paper --split=test
          with segment 32, memory 128, no clamp, same_length (config.eval)
Data:     lm1b (docs/data.md): the words that occur three times in train, or those of
          --config.data.vocab_file=1b_word_vocab.txt, which the original reads
Differs:  rows, lengths, rate and steps are lm1b_base's, for want of published ones; so
          are its differences. Without bin 0's projections (model.proj_same_dim=False):
          466,962,290.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 793_471  # from memory, not verified against a copy of the corpus
PARAMETERS = 469_059_442


def get_config(debug=False, batch=0):
    config = default_config(
        "transformer_xl",
        n_layer=20,
        d_model=1024,
        n_head=8,
        d_head=128,
        d_inner=6144,
        memory_length=256,
        untie_r=True,
        dropout=0.1,
        attention_dropout=0.0,
        cutoffs=(60_000, 100_000, 640_000),
        div_val=4,
        tie_projections=(False, False, False, False),
        init_scheme="tensorflow",
        scan_layers=True,
    )
    config.data.corpus = "lm1b"
    config.train.update(steps=400_000, batch_size=256, segment_length=256)
    config.train.update(log_every=200, eval_every=4000, save_every=4000)
    config.optimizer.update(learning_rate=2.5e-4, schedule="cosine_after_warmup")
    config.optimizer.update(warmup_steps=0, final_fraction=0.004)
    config.eval.update(segment_length=32, memory_length=128)
    config.eval.update(same_length=True, batch_size=16)
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
