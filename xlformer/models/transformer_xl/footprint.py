"""What a training step of Transformer-XL keeps and exchanges, in numbers a token."""

from __future__ import annotations

from xlformer.models.transformer_xl.config import TransformerXLConfig

# Kept for the backward pass of a layer without remat, for each of d_model and d_inner.
# Fitted to what libtpu 0.0.42 makes of 4 rows on a v5e: 1.3 GiB of temporaries for
# enwik8_base, 6.6 for enwik8_large (docs/scaling.md says how well it does elsewhere).
PER_WIDTH, PER_INNER = 13, 8
# Of the two gates of a layer, for each of d_model: what XLA for CPU (jax 0.10.2) keeps
# more with them, 4 layers against 2. No compiler for TPUs has been asked.
PER_GATED = 10


def kept_for_backward(config: TransformerXLConfig) -> float:
    """Numbers a token: what all layers keep, and one layer more for its backward pass.

    With remat='full' each layer keeps its input alone, and one at a time all the rest.
    """
    width = PER_WIDTH + (PER_GATED if config.gated else 0)
    layer = width * config.d_model + PER_INNER * config.d_inner
    kept = config.d_model if config.remat == "full" else layer
    return config.n_layer * kept + layer


def summed_activations(config: TransformerXLConfig) -> float:
    """Four sums of the width in each layer (Shoeybi et al. 2019, section 3).

    They are of the outputs of attention and of feed-forward, and backward of their
    inputs' gradients. A gate gathers what it lets through and what it gives, which is
    as much as one sum, and backward sums the gradients of its two inputs.
    """
    sums = 10.0 if config.gated else 4.0
    return sums * config.n_layer * config.d_model
