"""A time limit on code that is not ours: an alarm raises in it, again and again until it lets go."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from engine.errors import EngineError

AGAIN_S = 1.0  # code that swallows the first one meets the next


class TimeLimitError(BaseException):
    """Raised inside the code that took too long. Not an `Exception`: what catches those does not catch it."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises `TimeLimitError` inside the block after so many seconds; None is no limit.

    The alarm is a signal: it ends Python code, sleeps and waits for a socket, and C code once that returns. It takes
    SIGALRM for as long as the block lasts and only works in the main thread.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise EngineError(
            f"time limit: got {seconds:g} s outside the main thread, where no alarm can be set; give null"
            " (--reward_timeout_s null) or train in the main thread"
        )

    running = True

    def ring(number: int, frame: FrameType | None) -> None:
        if running:
            raise TimeLimitError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    finally:
        try:
            running = False
        finally:  # also when the alarm rings just now
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
