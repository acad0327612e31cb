"""Proteins of TrEMBL, in segments of 1,024, by 36 layers: causal or masked, 75.7M.

Paper:    Choromanski et al. 2020 (arXiv 2009.14794)
Command:  python -m xlformer.train --config=performer_protein --workdir=runs/protein
          python -m xlformer.train --config=performer_protein:causal=False ...
Hardware: not tried
Expected: accuracy in % and perplexity (published). Causal, UNI: 31.58 and 9.17 on test,
          18.44 and 13.63 out of distribution, by features=relu; the exact Transformer,
          mechanism=softmax: 30.80 and 9.37, 19.70 and 13.20. Masked, BID: 36.09 and
          8.36, 24.10 and 12.26 by features=relu; 33.00 and 9.24, 23.48 and 12.41 by
          features=positive,projected; 33.32 and 9.22, 25.07 and 12.09 by
          mechanism=softmax. Frequencies alone: 9.92 and 17.80. Not measured here.
Data:     UniProt's current TrEMBL (some 60 GB), or any FASTA file of proteins alone in
          --config.data.manual_dir=DIR, or train.fasta, valid.fasta and test.fasta there
          (.gz too). Splits are ours: the card says how, and what the paper did
Differs:  the paper's ReLU model is its program's default, without a projection:
          projected=False. The batch is ours. The paper has one protein a row, clipped
          at 1,024; here rows are filled, one protein after the other, without a symbol
          between them. Causal, each sees itself alone and all of itself: sums go over
          the ends of segments, and begin anew with a protein (not with another
          mechanism: there the end of a segment cuts it). Masked, a segment sees all
          proteins that are in it. Each hidden residue is behind the mask
          (training/objectives.py), one id and 513 parameters more.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 25  # the 20 standard residues, and B, O, U, X, Z
PARAMETERS = 75_640_345

LENGTH = 1024


def get_config(
    debug=False,
    batch=0,
    causal=True,
    mechanism="favor",
    features="",
    projected=False,
):
    favor = mechanism == "favor"
    config = default_config(
        "performer",
        n_layer=36,
        d_model=512,
        n_head=8,
        d_inner=1024,
        mechanism=mechanism,
        # The model's own default where no features are read.
        features=features or ("relu" if favor else "positive"),
        projected=projected or not favor,
        n_features=256 if favor and projected else 0,
        context_length=LENGTH,
        causal=causal,
        dropout=0.1,
        scan_layers=True,
        remat="full",
    )
    # A masked model cannot forget within a segment what is before a protein.
    config.data.update(corpus="trembl", documents=causal and mechanism != "lsh")
    config.train.update(steps=100_000, batch_size=256, segment_length=LENGTH)
    config.train.update(log_every=200, eval_every=4000, save_every=4000)
    config.train.objective = "next_token" if causal else "masked"
    config.optimizer.update(name="adamw", learning_rate=1e-3, schedule="constant")
    config.optimizer.update(b1=0.9, b2=0.98, epsilon=1e-9, clip_norm=0.5)
    config.optimizer.weight_decay = 0.1
    config.eval.update(segment_length=LENGTH, batch_size=64)
    config.eval.max_tokens = 1_000_000  # in training: a part of the split
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
