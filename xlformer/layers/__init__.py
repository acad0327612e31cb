"""The parts of the models: mathematics first, thin Linen modules second."""
