"""Machines that are here and machines that are not: what a run takes on them."""
