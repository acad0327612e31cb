"""The parts that models are made of: mathematics first, thin Linen modules second."""
