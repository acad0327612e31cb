"""A profiler trace of a few steps, chosen by config.train.profile_start and _steps."""

from __future__ import annotations

import jax


class Profiler:
    """Starts and stops the trace of `steps` steps; of 0 it does nothing."""

    def __init__(self, directory, *, first: int, steps: int):
        self._first, self._end = first, first + steps
        self._directory = directory
        self._running = False

    def due(self, step: int) -> bool:
        """Whether `follow` has something to do before this step."""
        return self._running != (self._first <= step < self._end)

    def follow(self, step: int) -> str:
        """Call it between two steps, with nothing in flight; returns a line or ''.

        Where one call makes several steps the trace covers whole calls.
        """
        if not self.due(step):
            return ""
        if self._running:
            return self.stop()
        # With steps in flight the trace would begin with those of before it.
        jax.profiler.start_trace(str(self._directory))
        self._running = True
        return ""

    def stop(self) -> str:
        """Ends a trace that is being taken, also of a run that fails."""
        if not self._running:
            return ""
        self._running = False
        jax.profiler.stop_trace()
        return f"profile: {self._directory}"
