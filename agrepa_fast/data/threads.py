"""Read many small files by several threads."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
CHUNK = 64  # items of a task: a task for each item costs more than what is often to do for one


def threaded(function: Callable[[T], R], items: Sequence[T], threads: int) -> Iterator[R]:
    """`function` of each item, in order, by at most `threads` threads.

    The first items tell how many are of use: where the disk answers at once, more threads only wait for each other.
    """

    def chunk(start: int) -> list[R]:
        return [function(item) for item in items[start : start + size]]

    size = max(1, min(CHUNK, -(-len(items) // threads)))
    began, worked = time.perf_counter(), time.thread_time()
    yield from chunk(0)
    seconds, busy = time.perf_counter() - began, time.thread_time() - worked
    with ThreadPoolExecutor(max(1, min(threads, round(seconds / max(busy, 1e-9))))) as pool:
        for results in pool.map(chunk, range(size, len(items), size)):
            yield from results


@contextmanager
def many_objects() -> Iterator[None]:
    """Collect no garbage in the block, which makes millions of objects that stay: a collection would visit them all."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
