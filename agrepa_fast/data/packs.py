"""Sound files inside larger files: members of tar archives, rows of data sets. `Clip.pack` locates them.

The path of such a clip (`shard.tar/key.flac`) is its name in messages and tables. There is no file at this path.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol


class Pack(Protocol):
    """The bytes of one sound file inside a larger file. Hashable, and picklable for worker processes."""

    @property
    def file(self) -> Path:
        """The larger file, whose size and time of change tell whether it is still the same."""
        ...

    @property
    def size(self) -> int:
        """Bytes of the sound file."""
        ...

    def read(self, start: int, count: int) -> bytes:
        """Bytes start to start + count - 1, or fewer if the file has become shorter.

        It must not raise an error, because libsndfile calls it. libsndfile then reports a truncated sound."""
        ...


@dataclass(frozen=True)
class Member:
    """A member of an uncompressed archive: a range of its bytes."""

    file: Path
    offset: int
    size: int

    def read(self, start: int, count: int) -> bytes:
        """See `Pack`."""
        try:
            return os.pread(_descriptor(self.file), max(0, min(count, self.size - start)), self.offset + start)
        except OSError:
            return b""


@lru_cache(maxsize=256)
def _opened(file: Path, process: int) -> BinaryIO:
    return open(file, "rb", buffering=0)


def _descriptor(file: Path) -> int:
    """A file descriptor of this process: processes must not share positions or closed files."""
    return _opened(file, os.getpid()).fileno()


class PackFile(io.RawIOBase):
    """A pack as a file object. Reading a header reads only the bytes of the header."""

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.pack.size}[whence]
        self.at = max(0, base + offset)
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = self.pack.read(self.at, len(buffer))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def open_sound(path: Path, pack: Pack | None) -> BinaryIO:
    """The bytes of a sound file, in a file of its own or in a pack. OSError where it cannot be opened."""
    if pack is None:
        return open(path, "rb")
    return io.BufferedReader(PackFile(pack), 1 << 14)
