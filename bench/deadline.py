"""A time limit for building rivals, so that a slow compiler does not use up the time of other problems."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

RING_AGAIN = 2.0  # seconds; longer than it takes to leave the block


class OutOfTime(BaseException):
    """The time is over during a build. It is no Exception, because compilers catch those."""


class Deadline:
    """A deadline `seconds` from now; None for no limit."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._began = time.monotonic()

    def spent(self) -> float:
        return time.monotonic() - self._began

    def over(self) -> bool:
        return self.seconds is not None and self.spent() >= self.seconds

    def more_than_half_spent(self) -> bool:
        return self.seconds is not None and self.spent() > self.seconds / 2

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """Raise OutOfTime inside the block when the time is over, wherever it is.

        Only the main thread can be interrupted; in other threads the block runs to its end.
        """
        if self.seconds is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ring(*_: Any) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, ring)
        # It rings again, since an exception in a destructor or in a callback from C is only printed.
        signal.setitimer(signal.ITIMER_REAL, max(self.seconds - self.spent(), 1e-3), RING_AGAIN)
        try:
            yield
        finally:
            lift()
            signal.signal(signal.SIGALRM, before)


def lift() -> None:
    """Suspend the limit: the capture of a CUDA graph must not be interrupted, and is short."""
    signal.setitimer(signal.ITIMER_REAL, 0)
