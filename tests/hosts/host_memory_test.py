"""A run that saves often keeps none of what it has saved: the short form of
soak/memory.py."""

from soak.memory import measure
from training_runs import bag, text_config, write_text

SAVES, WARMUP = 40, 15


def test_saved_checkpoints_do_not_stay_in_memory(tmp_path):
    config = text_config(write_text(tmp_path / "text.txt"), steps=SAVES * 2)
    config.train.update(save_every=2, eval_every=0, log_every=0)
    model = bag(vocab_size=1200)  # 5.5 MiB of parameters
    steps, sizes, state = measure(config, tmp_path / "run", model)
    assert len(steps) == SAVES and state > 5 * 2**20
    growth = (sizes[-1] - sizes[WARMUP]) / state
    # All of them would be 24; the rest is what malloc keeps for each new thread.
    assert growth < 8, f"{growth:.1f} checkpoints' worth in {SAVES - WARMUP} saves"
