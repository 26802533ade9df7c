"""Batches in order, from worker processes that may die."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import torch

from ..errors import UserError
from .batches import Batch, load_batch
from .buckets import BucketBatches
from .dataset import ClipDataset

MAX_RESTARTS = 3


class _Steps(torch.utils.data.Dataset):
    """Batches by step number, for the worker processes of a DataLoader."""

    def __init__(self, dataset: ClipDataset, batches: BucketBatches) -> None:
        self.dataset = dataset
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | str:
        try:
            return load_batch(self.dataset, self.batches, step, self.batches.seed)
        except UserError as error:
            # The DataLoader would bury the one line of a UserError in a worker's traceback.
            return str(error)


def _workers(loader: torch.utils.data.DataLoader) -> Iterator[Batch | str]:
    """The batches of a loader. A dead worker is noticed within five seconds of asking for a batch.

    The DataLoader's handler of SIGCHLD is replaced: it would raise in whatever the main thread is doing, for instance
    in the middle of an optimizer step.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    read = iter(loader)
    signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
    return read


def iterate(
    dataset: ClipDataset,
    batches: BucketBatches,
    *,
    start: int,
    stop: int,
    workers: int = 0,
    pin_memory: bool = False,
    notice: Callable[[str], None] | None = None,
) -> Iterator[Batch]:
    """Batches number `start` to `stop` - 1 in order, the same for any number of worker processes.

    If a worker dies (out of memory, killed), all workers start again and the batches go on where they were; `notice` is
    called with the reason. The random state of the calling process is neither used nor changed.

    Raises:
        UserError: no clip of a batch can be read, or workers died MAX_RESTARTS times for one batch.
    """
    if not 0 <= start <= stop or workers < 0:
        raise ValueError(f"need 0 <= start <= stop and workers >= 0, got {start}, {stop}, {workers}")
    if workers == 0:
        for step in range(start, stop):
            yield load_batch(dataset, batches, step, batches.seed)
        return
    step, died = start, 0
    while step < stop:
        loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
            _Steps(dataset, batches),
            sampler=range(step, stop),
            batch_size=None,
            num_workers=workers,
            pin_memory=pin_memory,
            # Without a generator the loader would draw its base seed from the global one.
            generator=torch.Generator(),
        )
        read = _workers(loader)
        while step < stop:
            try:
                batch = next(read)
            except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
                # The last three are raised by fetching a batch from a worker that has died since.
                died += 1
                what = str(error)
                if not isinstance(error, RuntimeError):
                    what = f"a data worker ended while it sent a batch ({what or type(error).__name__})"
                if "worker" not in what or died > MAX_RESTARTS:
                    raise UserError(f"data.workers: {what} (batch {step}); use fewer workers, or 0") from error
                if notice is not None:
                    notice(what)
                break
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch
            step, died = step + 1, 0
