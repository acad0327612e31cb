"""WikiText-103, 16 layers, 191,950,298 parameters: NVIDIA's base model, LAMB.

Paper:    none; NVIDIA DeepLearningExamples, Transformer-XL for PyTorch
Source:   its wt103_base.yaml and README
Command:  python -m xlformer.train --config=wt103_base_nvidia --workdir=runs/nvidia_base
Hardware: 8 A100 of 40 GB: 76 minutes in mixed precision; one V100 of 16 GB: 766 minutes
Expected: 23.24 +- 0.08 test perplexity per word over 16 seeds (published), by
          python -m xlformer.evaluate --workdir=runs/nvidia_base --split=test
          with segment 64, memory 640, clamp 400, same_length (config.eval).
          Early gate: 42.6 on validation after 5,000 steps (worst seed 43.1), 32.3 after
          10,000; theirs is measured at 192 / 192 without clamp and same_length.
Differs:  their LAMB takes at most 10 for the norm of a weight, which the embedding
          exceeds, and does not correct the moments for their start at zero. They roll
          the token stream between epochs; here rows keep their text. One device
          may need train.micro_batches=8 (their batch_chunk on one V100).
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 267_735
PARAMETERS = 191_950_298


def get_config(debug=False, batch=0):
    config = default_config(
        "transformer_xl",
        n_layer=16,
        d_model=512,
        n_head=8,
        d_head=64,
        d_inner=2048,
        memory_length=192,
        dropout=0.1,
        attention_dropout=0.0,
        cutoffs=(19_997, 39_997, 199_997),  # 20,000 outputs with the 3 clusters
        div_val=1,
        tie_projections=(False, True, True, True),
        scan_layers=True,
    )
    config.data.corpus = "wikitext103"
    config.train.update(steps=40_000, batch_size=256, segment_length=192)
    config.train.update(log_every=100, eval_every=5000, save_every=1000)
    config.optimizer.update(name="lamb", learning_rate=0.01, epsilon=1e-6)
    config.optimizer.update(schedule="cosine_after_warmup", final_fraction=0.1)
    config.optimizer.warmup_steps = 1000
    config.eval.update(segment_length=64, memory_length=640, clamp_length=400)
    config.eval.update(same_length=True, batch_size=16)
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
