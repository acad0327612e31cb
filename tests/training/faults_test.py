"""Locks and signals with real processes; the message for a loss that explodes."""

import os
import signal
import threading
import time

import pytest
from processes import finish, start

from xlformer.config import default_config
from xlformer.hosts import faults
from xlformer.hosts.faults import INTERRUPTED, Interrupt

# Signals ----------------------------------------------------------------------------

# The second lock of a mutex never returns and no signal ends it: an endless compile.
IN_C = """
    import ctypes, sys
    from xlformer.hosts.faults import Interrupt
    with Interrupt() as interrupt:
        interrupt.armed = sys.argv[1] == "armed"
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
        libc.pthread_mutex_lock(mutex)
        print("ready", flush=True)
        libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_the_first_step_a_signal_ends_even_a_long_c_call(number):
    process = start(IN_C, "not yet")
    begin = time.monotonic()
    process.send_signal(number)
    code, errors = finish(process)
    assert code == INTERRUPTED == 42
    assert time.monotonic() - begin < 2
    assert errors.count("\n") == 1 and signal.Signals(number).name in errors


def test_among_several_hosts_ctrl_c_becomes_the_signal_that_reaches_all():
    process = start(
        """
        import signal
        from xlformer.hosts.faults import Interrupt
        signal.signal(signal.SIGTERM, lambda *_: print("told all", flush=True))
        with Interrupt([signal.SIGINT], instead=signal.SIGTERM) as interrupt:
            print("ready", flush=True)
            while True:
                signal.pause()
        """
    )
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "told all\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "told all\n"
    process.send_signal(signal.SIGINT)
    code, errors = finish(process)
    assert code == INTERRUPTED and "for the third time" in errors


def test_once_armed_two_signals_wait_for_the_loop_and_the_third_does_not():
    process = start(IN_C, "armed")
    for word in "saving after this step", "still saving":
        process.send_signal(signal.SIGTERM)
        assert word in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, errors = finish(process)
    assert code == INTERRUPTED and "without saving" in errors


def wait_until(condition):
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_the_loop_sees_the_name_and_the_handlers_come_back():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    for number in signal.SIGTERM, signal.SIGINT:  # twice: it can be used again
        with Interrupt() as interrupt:
            interrupt.armed = True
            assert interrupt.requested is None
            os.kill(os.getpid(), number)
            name = signal.Signals(number).name
            assert wait_until(lambda i=interrupt, n=name: i.requested == n)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert "interrupt" not in [t.name for t in threading.enumerate()]


def test_the_chosen_signals_only():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt(signals=[signal.SIGINT]):
        assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_it_does_nothing():
    seen = []

    def body():
        with Interrupt() as interrupt:
            interrupt.armed = True
            seen.append(interrupt.requested)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [None]


# Losses -----------------------------------------------------------------------------


def test_the_message_for_a_nonfinite_loss_says_where_and_what_to_turn():
    config = default_config()
    config.optimizer.clip_norm = 0.125
    message = faults.nonfinite_message(
        step=1234, last_good=1000, learning_rate=2.5e-4, config=config
    )
    for word in ("step 1234", "step 1000", "0.00025", "clip_norm=0.125"):
        assert word in message
    for field in ("learning_rate", "warmup_steps", "clip_norm", "dtype"):
        assert field in message
    assert "\n" not in message
    none = faults.nonfinite_message(step=1, last_good=None, learning_rate=1.0)
    assert "no checkpoint to go back to" in none


def test_ten_skips_in_a_row_are_too_many():
    assert not faults.too_many_skips(faults.MAX_SKIPS - 1)
    assert faults.too_many_skips(faults.MAX_SKIPS) and faults.MAX_SKIPS == 10
