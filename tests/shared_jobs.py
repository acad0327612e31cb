"""Jobs for workers, in a module that imports no JAX."""

import os
import signal
import sys
import time

from xlformer.errors import UserError


def of_this_process(number, parent):
    """What a job sees of its process; slow enough for helpers to get their share."""
    if os.getpid() == parent:
        time.sleep(0.3)
    return number, os.getpid(), "jax" in sys.modules


def die(folder, number, lives, parent):
    """Kills its process, if that is a helper, as often as there are lives."""
    kills = len(os.listdir(folder))
    if os.getpid() != parent and kills < lives:
        open(os.path.join(folder, str(kills)), "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuse(number):
    raise UserError(f"job {number} is bad")


def fail_in_a_helper(parent):
    """Divides by zero, if its process is a helper."""
    return 1 // (os.getpid() == parent)


def many(number, size):
    """A large result."""
    return bytes([number]) * size


def leave_a_file_and_fail(folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    raise ZeroDivisionError
