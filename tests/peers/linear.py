"""The attention operation of the Performer, in xlformer."""

import jax
import jax.numpy as jnp
import numpy as np
from settings import Linear

from xlformer.kernels.features import Features
from xlformer.kernels.linear_attention import linear_attention


def build(setting: Linear):
    """run(times) of the operation, where training with its gradients."""
    B, T, H, K = (
        setting.batch_size,
        setting.segment_length,
        setting.n_head,
        setting.d_head,
    )
    rng = np.random.default_rng(0)
    shapes = [(B, T, H, K)] * 3 + [(setting.n_features, K)]
    arrays = [jnp.asarray(rng.standard_normal(s, np.float32)) for s in shapes]
    # As the peer: it adds its epsilons to every feature.
    features = Features("relu", 1e-3) if setting.relu else Features("positive", 1e-4)

    def attend(q, k, v, w):
        q, k = q * K**-0.25, k * K**-0.25
        return linear_attention(q, k, v, features, w, causal=setting.causal)[0]

    def loss(*arrays):
        return jnp.square(attend(*arrays)).sum()

    step = jax.grad(loss, argnums=(0, 1, 2)) if setting.train else attend
    compiled = jax.jit(step).lower(*arrays).compile()

    def run(times: int) -> int:
        for _ in range(times):
            jax.block_until_ready(compiled(*arrays))
        return times * setting.tokens

    return run
