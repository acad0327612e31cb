"""One Billion Word, 24 layers, 841,354,862 parameters: the paper's "Large" model.

Paper:    Dai et al. 2019 (arXiv 1901.02860), table 4
Source:   the TensorFlow original's lm1b_large_tpu.sh
Command:  python -m xlformer.train --config=lm1b_large --workdir=runs/lm1b_large
Hardware: 512 TPU cores, 2-5 days (the original's README, for all four data sets)
Expected: 21.8 test perplexity per word (published), by
          python -m xlformer.evaluate --workdir=runs/lm1b_large --split=test
          with segment 32, memory 128, no clamp, same_length (config.eval)
Data:     lm1b (docs/data.md): the words that occur three times in train, or those of
          --config.data.vocab_file=1b_word_vocab.txt, which the original reads
Differs:  the script leaves out the square projection of bin 0 in front of embedding and
          softmax (model.proj_same_dim=False: 838,078,062); here all bins have one, as
          in PyTorch. Cold memory is masked (model.attend_zero_memory). The learning
          rate ends at 0.004 of its top, as in train_gpu.py; the TPU program: 0.01. The
          PyTorch twin has rate 2.5e-4. The originals' validation and test sets are the
          same file; TensorFlow's has two <S> between sentences and scores both, here
          there is one: of about 26 words each, 21.8 is then some 24.5 (arithmetic).
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 793_471  # from memory, not verified against a copy of the corpus
PARAMETERS = 841_354_862


def get_config(debug=False, batch=0):
    config = default_config(
        "transformer_xl",
        n_layer=24,
        d_model=1280,
        n_head=16,
        d_head=80,
        d_inner=8192,
        memory_length=32,
        untie_r=True,
        dropout=0.05,
        attention_dropout=0.05,
        cutoffs=(60_000, 100_000, 640_000),
        div_val=4,
        tie_projections=(False, False, False, False),
        init_std=0.005,
        init_scheme="tensorflow",
        scan_layers=True,
    )
    config.data.corpus = "lm1b"
    config.train.update(steps=1_200_000, batch_size=512, segment_length=32)
    config.train.update(log_every=200, eval_every=4000, save_every=4000)
    config.optimizer.update(learning_rate=1e-4, schedule="cosine_after_warmup")
    config.optimizer.update(warmup_steps=30_000, final_fraction=0.004)
    config.eval.update(segment_length=32, memory_length=128)
    config.eval.update(same_length=True, batch_size=16)
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
