"""Stopping on a signal with nothing lost: SIGTERM, as schedulers send it before they take a machine away, and SIGINT (Ctrl-C).

The first signal ends the command as soon as what was made is on disk: sampling drops the chunk that it is at, training ends its step and saves
a checkpoint. A second one ends it at once, which loses what a kill loses: what is newer than the last checkpoint or chunk. The same one again within
a second is the first: a supervisor signals a whole group, and a launcher in it hands the signal on.
"""

import os
import signal
import threading
import time
from contextlib import contextmanager

from posttrain import distributed

CONTINUE = 75  # sysexits.h's EX_TEMPFAIL: not done, and the same command goes on
ENDED_BY_HAND = 128 + signal.SIGINT  # what a shell says of Ctrl-C: whoever pressed it wants no scheduler to begin again

SAME = 1.0  # seconds in which the same signal again is no second one
_asked: int | None = None
_since = 0.0  # when it came, on time.monotonic's clock
_held = 0


class Stopped(BaseException):
    """The command ends here on a signal, and the same command goes on. No `except Exception` of a library holds it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = ENDED_BY_HAND if number == signal.SIGINT else CONTINUE


@contextmanager
def heeded():
    """SIGTERM and SIGINT end what happens inside with `Stopped`. Outside a program's first thread they stay what they were."""
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = None


def _receive(number: int, frame) -> None:
    global _asked, _since
    if _asked == number and time.monotonic() - _since < SAME:
        return
    if _asked is not None:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    _asked, _since = number, time.monotonic()
    if not _held:
        raise Stopped(number)
    if distributed.is_main():  # os.write: the signal may have come in the middle of a print
        os.write(2, f"\n{signal.Signals(number).name}: stops after this step, with a checkpoint; a second signal ends it at once.\n".encode())


def asked() -> bool:
    """Whether a signal has come."""
    return _asked is not None


def check() -> None:
    """Stop here where a signal has come, also where a library has held its exception."""
    if asked():
        raise Stopped(_asked)


def check_together() -> None:
    """`check` of several processes in step: all stop where one was asked to."""
    if any(distributed.gather(asked())):
        raise Stopped(_asked or signal.SIGTERM)


@contextmanager
def deferred():
    """A signal that comes inside waits for `check`, and no longer than for the end of this. Of several processes `check_together` alone stops all."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1
    if distributed.world() == 1:
        check()
