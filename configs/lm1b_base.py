"""One Billion Word, 18 layers, 357,846,898 parameters: the base model of the scripts.

Paper:    none: the paper's base row (0.46B, 23.5) is another model, lm1b_base_paper
Source:   the TensorFlow original's lm1b_base_gpu.sh
Command:  python -m xlformer.train --config=lm1b_base --workdir=runs/lm1b_base
Hardware: 4 GPUs by the script; time not published
Expected: not published for this model; a user reached 30.25 test perplexity per word
          with the PyTorch script (the original's issue 69). Evaluation:
          python -m xlformer.evaluate --workdir=runs/lm1b_base --split=test
          with segment 32, memory 128, no clamp, same_length (config.eval)
Data:     lm1b (docs/data.md): the words that occur three times in train, or those of
          --config.data.vocab_file=1b_word_vocab.txt, which the original reads
Differs:  the script leaves out the square projection of bin 0 in front of embedding and
          softmax (model.proj_same_dim=False: 355,749,746); here all bins have one, as
          in PyTorch. Cold memory is masked (model.attend_zero_memory). PyTorch's script
          has no dropout, 224 rows of 32 tokens, 20,000 + 480,000 steps. The originals'
          validation and test sets are the same file; TensorFlow's has two <S> between
          sentences and scores both, here and in PyTorch there is one.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 793_471  # from memory, not verified against a copy of the corpus
PARAMETERS = 357_846_898


def get_config(debug=False, batch=0):
    config = default_config(
        "transformer_xl",
        n_layer=18,
        d_model=1024,
        n_head=8,
        d_head=128,
        d_inner=4096,
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
