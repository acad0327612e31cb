"""WikiText-103, 16 layers, 151,107,538 parameters: the paper's "Standard" model.

Paper:    Dai et al. 2019 (arXiv 1901.02860), table 1
Source:   the PyTorch original's run_wt103_base.sh
Command:  python -m xlformer.train --config=wt103_base --workdir=runs/wt103_base
Hardware: several GPUs; neither their number nor the time is published
Expected: 24.03 test perplexity per word (published; the paper rounds to 24.0), by
          python -m xlformer.evaluate --workdir=runs/wt103_base --split=test
          with segment 64, memory 640, clamp 400, same_length (config.eval)
Differs:  nothing known. TensorFlow's script trains twice as long (400,000 steps) and
          with a pair of biases for each layer: model.untie_r=True, 151,119,838.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 267_735
PARAMETERS = 151_107_538


def get_config(debug=False, batch=0):
    config = default_config(
        "transformer_xl",
        n_layer=16,
        d_model=410,
        n_head=10,
        d_head=41,
        d_inner=2100,
        memory_length=150,
        dropout=0.1,
        attention_dropout=0.0,
        cutoffs=(20_000, 40_000, 200_000),
        div_val=1,
        tie_projections=(False, True, True, True),
        scan_layers=True,
    )
    config.data.corpus = "wikitext103"
    config.train.update(steps=200_000, batch_size=60, segment_length=150)
    config.train.update(log_every=200, eval_every=4000, save_every=4000)
    config.optimizer.update(learning_rate=2.5e-4, schedule="cosine", warmup_steps=0)
    config.eval.update(segment_length=64, memory_length=640, clamp_length=400)
    config.eval.update(same_length=True, batch_size=8)
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
