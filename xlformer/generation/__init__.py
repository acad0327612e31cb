"""Continuing texts: the state is carried, a token costs the same however many came."""
