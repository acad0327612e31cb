"""What goes wrong around a run: signals, and losses that explode."""

from __future__ import annotations

import os
import signal
import socket
import threading

from xlformer.errors import INTERRUPTED, UserError
from xlformer.hosts.job import say

# Steps in a row that are not finite and that train.skip_nonfinite forgives. Bad batches
# are rare; where ten follow each other the parameters themselves are lost.
MAX_SKIPS = 10
# The signal that no longer waits for the save. The second one, which impatience sends,
# is only answered.
FORCING_SIGNALS = 3


class Interrupt:
    """Notices SIGINT and SIGTERM at once, even while XLA compiles for minutes.

    A Python handler runs only when the main thread returns from C++, so the C-level
    handler's wake-up byte is read by a thread of its own.

        with Interrupt() as interrupt:
            for step in ...:
                ...                      # one step
                interrupt.armed = True   # from now on there is something to save
                if interrupt.requested:
                    save(); return INTERRUPTED

    Until `armed` is set a signal ends the process at once with INTERRUPTED. After that
    the first is left to the loop, the second is answered by a line, the third ends the
    process. Outside the main thread it does nothing: Python allows no handlers there.
    In a job of several hosts leave SIGTERM to JAX's preemption service, which makes all
    of them stop at the same step: signals=[SIGINT], instead=SIGTERM sends that on.
    """

    def __init__(self, signals=(signal.SIGINT, signal.SIGTERM), *, instead=None):
        self._signals, self._instead = tuple(signals), instead
        self.armed = False
        self.requested: str | None = None
        self._count = 0
        self._previous = {}
        self._previous_wakeup = -1
        self._reader = self._writer = self._watcher = None

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        # set_wakeup_fd refuses a descriptor that could block within a signal handler.
        self._writer.setblocking(False)
        # A daemon: a process that ends by an error does not wait for it.
        self._watcher = threading.Thread(
            target=self._watch, name="interrupt", daemon=True
        )
        self._watcher.start()
        self._previous_wakeup = signal.set_wakeup_fd(
            self._writer.fileno(), warn_on_full_buffer=False
        )
        for number in self._signals:
            # Without a Python-level handler no byte is written; this one does nothing.
            self._previous[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *error):
        if self._watcher is None:
            return
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        self._writer.close()  # the watcher reads an end of file
        self._watcher.join()
        self._reader.close()
        self._watcher = None

    def _watch(self) -> None:
        while data := self._reader.recv(64):
            for number in data:
                if number in self._signals:
                    self._notice(signal.Signals(number).name)

    def _notice(self, name: str) -> None:
        self._count += 1
        # JAX's preemption service notices the other signal and tells all hosts; this
        # process stops with them, so nothing is requested here.
        if self._instead is not None and self._count < FORCING_SIGNALS:
            os.kill(os.getpid(), self._instead)
            return
        if not self.armed and self._instead is None:
            self._leave(f"{name}: stopped before the first step, nothing to save")
        if self._count >= FORCING_SIGNALS:
            self._leave(f"{name}, for the third time: stopping without saving")
        if self.requested is None:
            self.requested = name
            say(f"{name}: saving after this step; a third signal stops at once")
        else:
            say(f"{name} again: still saving; once more stops at once")

    @staticmethod
    def _leave(line: str) -> None:
        say(line)
        # sys.exit would end this thread only, and the main thread, which may be inside
        # of a compiler, may not come back for minutes.
        os._exit(INTERRUPTED)


class NotFinite(UserError):
    """The loss of a run is not finite, which says something of what was trained."""


def nonfinite_message(
    *, step: int, last_good: int | None, learning_rate: float, config=None
) -> str:
    """The one line for a loss that is NaN or infinite.

    config is the resolved config, whose values are then shown beside the names.
    """
    restart = (
        "there is no checkpoint to go back to"
        if last_good is None
        else f"the last good checkpoint is step {last_good}"
    )
    known = {
        "optimizer.learning_rate": "lower",
        "optimizer.warmup_steps": "raise",
        "optimizer.clip_norm": "lower, 0 is off",
        "model.dtype": "float32 is the safe one",
    }
    knobs = [f"config.{k}{_value(config, k)} ({how})" for k, how in known.items()]
    return (
        f"the loss is not finite at step {step} (learning rate {learning_rate:.3g}); "
        f"{restart}; what usually helps: {', '.join(knobs)}, or "
        "config.train.skip_nonfinite=True to drop such steps"
    )


def too_many_skips(skipped_in_a_row: int) -> bool:
    """True when dropping steps no longer helps: the parameters themselves are lost."""
    return skipped_in_a_row >= MAX_SKIPS


def _value(config, field: str) -> str:
    for part in field.split("."):
        if config is None or part not in config:
            return ""
        config = config[part]
    return f"={config}"
