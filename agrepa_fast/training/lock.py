"""One writer for each run folder: an advisory lock on `RUN/.lock`, which ends with the process that holds it.

The kernel keeps the lock (flock), so a lock file that a killed process left behind blocks nobody. Over NFS it works
between machines if the mount has locking (NFSv4, or NFSv3 with lockd). With `nolock` it works only between processes of
one machine; a file system without locks gives a warning.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import time
import warnings
import weakref
from pathlib import Path

from ..errors import UserError, writing
from .distributed import gather, rank

NAME = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
PATIENCE = 1.0  # seconds in which a new holder writes its name into the file


class RunLock:
    """A lock of `run_dir`, held from its construction to `release` or to the end of the process.

    Args:
        work, instead: what the message says of the holder's work, and what to do instead of waiting for it.

    Raises:
        UserError: another process holds it (the message names the process), or the folder cannot be written.
    """

    def __init__(
        self, run_dir: Path, work: str = "writes this run", instead: str = "start another run with train.name=ANOTHER"
    ) -> None:
        path = run_dir / NAME
        with writing(path):
            self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                warnings.warn(
                    f"{run_dir}: its file system has no locks ({error.strerror}); let one process alone write it",
                    stacklevel=3,
                )
            else:
                self._close()
                raise UserError(
                    f"{run_dir}: {_holder(path)} {work}; wait for its end or stop it, or {instead}"
                ) from None
        holder = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)
        except OSError:
            pass  # a full disk: the lock holds, but the file does not name its holder
        _held.add(self)

    def release(self) -> None:
        """Release the lock. Calling it again does nothing."""
        if self._descriptor is not None:
            try:
                os.ftruncate(self._descriptor, 0)
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            except OSError:
                pass  # closing the file unlocks it too
        self._close()

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = getattr(self, "_descriptor", None), None
        if descriptor is not None:
            os.close(descriptor)


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _forget() -> None:
    # A forked data worker would hold the lock with its parent's descriptor, and for seconds after the parent's death.
    for lock in list(_held):
        lock._close()


os.register_at_fork(after_in_child=_forget)


def hold(run_dir: Path) -> RunLock | None:
    """Lock a run's folder: rank 0 holds the lock for all ranks. Every rank must call it.

    Raises:
        UserError: as RunLock, on every rank.
    """
    lock, refusal = None, ""
    if rank() == 0:
        try:
            lock = RunLock(run_dir)
        except UserError as error:
            refusal = str(error)
    if refusal := gather(refusal)[0]:
        raise UserError(refusal)
    return lock


def _holder(path: Path) -> str:
    """The process that holds the lock, in words."""
    deadline = time.monotonic() + PATIENCE
    words = "another process"
    while True:
        try:
            holder = json.loads(path.read_bytes()[:1000])
            pid, host = int(holder["pid"]), str(holder["host"])
            words = f"process {pid} on {host}, since {holder['since']},"
            if host != platform.node() or _alive(pid):
                return words
        except (OSError, ValueError, TypeError, KeyError):
            pass
        # The file is empty or names a process that is gone: the new holder has not written its name yet.
        if time.monotonic() > deadline:
            return words
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
