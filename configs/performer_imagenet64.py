"""ImageNet64 as the bytes of its pixels, 12,288 an image: 6 layers, 19.0M.

Paper:    Choromanski et al. 2020 (arXiv 2009.14794): 6 layers are near a Reformer of
          12, 12 layers near one of 24
Command:  python -m xlformer.train --config=performer_imagenet64 --workdir=runs/images
          python -m xlformer.evaluate --workdir=runs/images
Hardware: not tried
Expected: 3.69 bits per dimension after 100,000 steps with positive features, 3.67 with
          performer_imagenet64:features=regularised and with features=relu (published).
          Not measured here.
Data:     train_64x64.tar and valid_64x64.tar of image-net.org/small, or folders of
          their PNG files, in --config.data.manual_dir=DIR; pip install
          'xlformer[images]'. There is no test split: validation is the test. Segments
          are images, in training and in scoring; the card of an evaluation has
          `bits_per_dim`
Variant:  performer_imagenet64:layers=12
Differs:  the batch is ours; positions are rotary, norms come first, and the estimator
          is strictly causal (the docstring of models/performer/model.py). An image's
          first byte is said from the image before it, with nothing to know about it.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 256  # bytes
PARAMETERS = 19_034_368

IMAGE = 64 * 64 * 3


def get_config(debug=False, batch=0, layers=6, features="positive"):
    config = default_config(
        "performer",
        n_layer=layers,
        d_model=512,
        n_head=8,
        d_inner=2048,
        features=features,
        carry_sums=False,  # an image sees no other: segments are images
        n_features=256,
        context_length=IMAGE,
        dropout=0.1,
        scan_layers=True,
        remat="full",
    )
    config.data.corpus = "imagenet64"
    config.train.update(steps=100_000, batch_size=64, segment_length=IMAGE)
    config.train.update(log_every=200, eval_every=4000, save_every=4000)
    config.optimizer.update(name="adamw", learning_rate=1e-3, schedule="constant")
    config.optimizer.update(b1=0.9, b2=0.98, epsilon=1e-9, clip_norm=0.5)
    config.optimizer.weight_decay = 0.1
    config.eval.update(segment_length=IMAGE, batch_size=8)
    config.eval.max_tokens = 400 * IMAGE  # in training: a part of the split
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
