"""A time limit on building rivals: a compiler that searches for a minute must not cost a run its other problems."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any


class OutOfTime(BaseException):
    """The time is over in the middle of a build. Not an Exception, since a compiler would report that as its own."""


class Deadline:
    """`seconds` from now; None is no limit."""

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
        """Raise OutOfTime inside the block when the time is over, in the middle of whatever runs there.

        Only the main thread can be interrupted; in others the block runs to its end."""
        if self.seconds is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ring(*_: Any) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(self.seconds - self.spent(), 1e-3))
        try:
            yield
        finally:
            lift()
            signal.signal(signal.SIGALRM, before)


def lift() -> None:
    """Let what follows run to its end: a CUDA graph's capture must not be broken off, and is short."""
    signal.setitimer(signal.ITIMER_REAL, 0)
