"""WikiText-103, 18 layers, 285,205,322 parameters: the paper's "Large" model.

Paper:    Dai et al. 2019 (arXiv 1901.02860), table 1
Source:   the TensorFlow original's wt103_large_tpu.sh
Command:  python -m xlformer.train --config=wt103_large --workdir=runs/wt103_large
Hardware: 64 TPU cores, 2-5 days (the original's README, for all four data sets)
Expected: 18.3 test perplexity per word (published), by
          python -m xlformer.evaluate --workdir=runs/wt103_large --split=test
          with segment 128, memory 1,600, clamp 1,000, same_length (config.eval)
Differs:  cold memory is masked; the original attends to zeros there
          (model.attend_zero_memory=True does so too). The learning rate ends at 0.004
          of its top, as in train_gpu.py; the TPU program, which made the figure: 0.01.
          The paper counts 257M parameters; the script's model has 285M. With one pair
          of biases for all layers (PyTorch, model.untie_r=False) it has 285,170,506.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 267_735
PARAMETERS = 285_205_322


def get_config(debug=False, batch=0):
    config = default_config(
        "transformer_xl",
        n_layer=18,
        d_model=1024,
        n_head=16,
        d_head=64,
        d_inner=4096,
        memory_length=384,
        untie_r=True,
        dropout=0.2,
        attention_dropout=0.2,
        cutoffs=(20_000, 40_000, 200_000),
        div_val=4,
        tie_projections=(False, True, True, True),
        proj_same_dim=True,
        init_std=0.005,
        init_scheme="tensorflow",
        scan_layers=True,
    )
    config.data.corpus = "wikitext103"
    config.train.update(steps=4_000_000, batch_size=128, segment_length=384)
    config.train.update(log_every=200, eval_every=4000, save_every=4000)
    config.optimizer.update(learning_rate=2.5e-4, schedule="cosine_after_warmup")
    config.optimizer.update(warmup_steps=16_000, final_fraction=0.004)
    config.eval.update(segment_length=128, memory_length=1600, clamp_length=1000)
    config.eval.update(same_length=True, batch_size=8)
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
