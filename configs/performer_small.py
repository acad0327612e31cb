"""The Performer on the bytes of Python's own standard library: minutes on a CPU.

Paper:    Choromanski et al. 2020 (arXiv 2009.14794), in small: vanilla_small's sizes
Command:  python -m xlformer.train --config=performer_small --workdir=runs/performer
Hardware: 2 CPU cores
Expected: not measured
Variant:  performer_small:mechanism=softmax, or lsh, linformer, identity: the same
          parameters, but Linformer's E and F beside them. Linformer sees what comes
          after a token, so it is trained to say hidden ones; no score of it compares.
          performer_small:mechanism=linformer,causal=False; causal=False for the others
          makes them comparable with it.
          performer_small:carry=False, whose segments see themselves alone: 3.15 bits
          after 300 steps of 4 x 256 bytes, 3.45 with sums of all that came before (two
          cores of an AMD EPYC, jax 0.10.2, 2026-11-26).
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 256  # bytes
PARAMETERS = 626_560

SEGMENT = 64
OPTIONS = {
    "lsh": {"rounds": 2, "buckets": 8, "chunk": 16},
    "linformer": {"projection_length": 32},
}


def get_config(
    debug=False,
    batch=0,
    mechanism="favor",
    features="positive",
    carry=True,
    causal=True,
):
    config = default_config(
        "performer",
        n_layer=3,
        d_model=128,
        n_head=4,
        d_inner=512,
        mechanism=mechanism,
        carry_sums=carry,
        features=features,
        context_length=SEGMENT,
        causal=causal,
        dropout=0.0,  # less than one epoch: nothing to overfit
        **OPTIONS.get(mechanism, {}),
    )
    config.data.corpus = "stdlib"
    config.train.update(steps=3200, batch_size=16, segment_length=SEGMENT)
    config.train.update(log_every=50, eval_every=800, save_every=800)
    config.train.objective = "next_token" if causal else "masked"
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100)
    config.optimizer.schedule = "cosine_after_warmup"
    config.eval.update(segment_length=SEGMENT, batch_size=16)
    config.eval.max_tokens = 65_536  # in training: seconds, not a minute
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
