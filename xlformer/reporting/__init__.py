"""The parts of a report on runs: what is read and measured, the figures, the page."""
