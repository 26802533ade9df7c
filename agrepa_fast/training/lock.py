"""One writer per run folder: an advisory lock on `RUN/.lock` that ends with its process, however that ends.

The lock is the kernel's (flock), so a file that a killed process left behind holds nobody up. Over NFS it works
between machines where the mount has locking (NFSv4, or NFSv3 with lockd); with `nolock` only processes of one machine
see each other, and a file system without locks gives a warning.
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
PATIENCE = 1.0  # seconds that a new holder may take to write down who it is


class RunLock:
    """Holds `run_dir` from its construction to `release`, or to the end of the process.

    Raises:
        UserError: another process holds the folder (the message says which), or it cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
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
                    f"{run_dir}: {_holder(path)} writes this run; wait for its end or stop it, "
                    "or start another run with train.name=ANOTHER"
                ) from None
        holder = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)
        except OSError:
            pass  # a full disk: the lock holds all the same, only the holder's name is not known
        _held.add(self)

    def release(self) -> None:
        """Let others write; again is no mistake."""
        if self._descriptor is not None:
            try:
                os.ftruncate(self._descriptor, 0)
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            except OSError:
                pass  # closing unlocks too
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
    """Lock a run's folder: rank 0 holds it for all ranks, and all are refused together. Every rank must call it.

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
            found = json.loads(path.read_bytes()[:1000])
            pid, host = int(found["pid"]), str(found["host"])
            words = f"process {pid} on {host}, since {found['since']},"
            if host != platform.node() or _alive(pid):
                return words
        except (OSError, ValueError, TypeError, KeyError):
            pass
        # Empty, or about a process that is gone: the holder has only just begun and writes its name next.
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
