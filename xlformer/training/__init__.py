"""State, step, optimizers, checkpoints and what goes wrong around them."""
