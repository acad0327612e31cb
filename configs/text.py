"""Your own text: one file or many, as bytes, characters or words.

Paper:    none
Command:  python -m xlformer.train --workdir=runs/book \\
              --config=text:path=book.txt,unit=chars
          path=a.txt;b.txt or path=books/*.txt (quote them) joins files; documents keeps
          memory from reaching over from one file into the next
Hardware: 2 CPU cores: some minutes for 3,000 steps
Expected: depends on the text; measured by
          python -m xlformer.evaluate --workdir=runs/book --split=test
          --config.train.steps and the model's sizes are yours to raise. Of unit=words
          those that stand once are <unk> (min_count=1 keeps them), max_vocab=20000 says
          how many symbols there may be; a vocabulary of many thousand words wants
          model.cutoffs, say (2000,10000), and more dropout.
"""

from xlformer.config import default_config, shrink

VOCAB_SIZE = 256  # of unit=bytes; the others count what the text has
PARAMETERS = 675_968


def get_config(
    path="",
    unit="bytes",
    documents=False,
    tokenizer="",
    min_count=0,
    max_vocab=0,
    debug=False,
    batch=0,
):
    config = default_config(
        "transformer_xl",
        n_layer=3,
        d_model=128,
        n_head=4,
        d_head=32,
        d_inner=512,
        memory_length=64,
        pre_norm=True,
        final_norm=True,
        dropout=0.1,
        attention_dropout=0.0,
    )
    config.data.update(corpus="text", path=path, unit=unit, documents=documents)
    config.data.update(tokenizer=tokenizer, min_count=min_count, max_vocab=max_vocab)
    config.train.update(steps=3000, batch_size=16, segment_length=64)
    config.train.update(log_every=50, eval_every=500, save_every=500)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100)
    config.optimizer.schedule = "cosine_after_warmup"
    config.eval.update(segment_length=64, batch_size=8, max_tokens=65_536)
    if debug:
        shrink(config)
    config.train.batch_size = batch or config.train.batch_size
    return config
