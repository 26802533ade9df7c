"""Identities of clips: digests that find duplicates, decide what is held out, and show whether a run's data changed.

A record of n clips is an int64 tensor [n, 3]: digests of the sound, of the whole clip (sound, text, domain, tokens),
and of the file's path.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.manifest import Clip
from ..data.packs import Pack, open_sound
from ..data.threads import threaded

BLOCK = 1 << 14
THREADS = 16  # they mostly wait for the disk


class Identity(NamedTuple):
    """Three signed 64-bit digests of a clip. Clips of a run are sorted by them."""

    sound: int  # of the file's size and content, see `file_digest`
    whole: int  # of the sound, the text, the domain, the token file and the file of latents
    place: int  # of the resolved path


class Known(NamedTuple):
    """A clip with its identity."""

    identity: Identity
    clip: Clip


def _digest(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little", signed=True)


def file_digest(path: Path, pack: Pack | None = None) -> int:
    """Digest of a file's size and of 16 KiB at its beginning, in its middle and at its end.

    It reads three blocks instead of the whole file: the 360,000 ten-second clips of 1,000 hours are then 17 GB of
    reading instead of 100 to 170. Files that agree in these blocks may differ elsewhere, so `drop_duplicates` reads
    such files whole. A file that cannot be read gets the digest of its path. pack: where the file lies in a larger one.
    """
    try:
        if pack is not None:
            size, read = pack.size, pack.read
            return _digest(str(size).encode(), *(read(start, count) for start, count in _blocks(size)))
        # Fewer calls of the system than `open` makes: threads wait for each other after each of them.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would block
        try:
            facts = os.fstat(file)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(f"{path}: not a regular file")
            size = facts.st_size
            return _digest(str(size).encode(), *(os.pread(file, count, start) for start, count in _blocks(size)))
        finally:
            os.close(file)
    except (OSError, ValueError):
        return _digest(b"unreadable", os.fsencode(path))


def _blocks(size: int) -> list[tuple[int, int]]:
    """(start, bytes) of what a digest reads of a file."""
    if size <= 3 * BLOCK:
        return [(0, 3 * BLOCK)]
    return [(start, BLOCK) for start in (0, (size - BLOCK) // 2, size - BLOCK)]


def identify(clips: Sequence[Clip]) -> list[Known]:
    """Each clip with its identity, in order."""
    folders: dict[Path, str] = {}

    def real(path: Path) -> str:
        """os.path.realpath, which asks the file system for each folder on the way, once for each folder."""
        if os.path.islink(path):
            return os.path.realpath(path)
        folder = path.parent
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        return os.path.join(folders[folder], path.name)

    def known(clip: Clip) -> Known:
        sound = file_digest(clip.path, clip.pack)
        tokens = b"" if clip.tokens is None else str(file_digest(clip.tokens, clip.token_pack)).encode()
        text = clip.text.encode("utf-8", "surrogatepass")
        latents = () if clip.latents is None else (str(file_digest(clip.latents, clip.latent_pack)).encode(),)
        whole = _digest(str(sound).encode(), text, clip.domain.encode(), tokens, *latents)
        return Known(Identity(sound, whole, _digest(os.fsencode(real(clip.path)))), clip)

    return list(threaded(known, clips, THREADS))


def by_identity(clips: Iterable[Known]) -> list[Known]:
    """The clips in the order of their digests, which says nothing of their list's order, speakers or texts."""
    return sorted(clips, key=lambda known: (known.identity, str(known.clip.path)))


def drop_duplicates(clips: Iterable[Known]) -> tuple[list[Known], list[tuple[Known, Known]]]:
    """The clips without repetitions, and each repetition with the clip that it repeats.

    A repetition has the text, domain, tokens and sound of an earlier clip: the same file by any path, or a file with
    the same bytes. One sound with several texts is several clips.
    """
    kept: list[Known] = []
    repeated: list[tuple[Known, Known]] = []
    by_whole: dict[int, list[Known]] = defaultdict(list)
    contents: dict[int, bytes] = {}
    for known in clips:
        same = [
            other
            for other in by_whole[known.identity.whole]
            if other.identity.place == known.identity.place or _content(known, contents) == _content(other, contents)
        ]
        if same:
            repeated.append((known, same[0]))
        else:
            by_whole[known.identity.whole].append(known)
            kept.append(known)
    return kept, repeated


def _content(known: Known, contents: dict[int, bytes]) -> bytes:
    """SHA-256 of the whole file."""
    place = known.identity.place
    if place not in contents:
        contents[place] = _sha256(known.clip)
    return contents[place]


def colliding(clips: Iterable[Clip], sounds: Mapping[Path, int]) -> dict[Path, Path]:
    """Files of the same digest whose contents differ: {file: the first file with its digest}.

    sounds: {file: its `file_digest`}. Files that are alone with their digest are not read.
    """
    groups: dict[int, dict[str, Clip]] = defaultdict(dict)
    for clip in clips:
        groups[sounds[clip.path]].setdefault(os.path.realpath(clip.path), clip)
    found = {}
    for group in groups.values():
        first, *others = group.values()
        whole = _sha256(first) if others else b""
        found.update({clip.path: first.path for clip in others if _sha256(clip) != whole})
    return found


def _sha256(clip: Clip) -> bytes:
    with open_sound(clip.path, clip.pack) as file:
        return hashlib.file_digest(file, "sha256").digest()  # type: ignore[arg-type]


def held_out(clips: Sequence[Known], share: float) -> set[int]:
    """Digests of the sounds to hold out: those whose digest, read as a fraction of 1, is below `share`.

    The fraction depends on the sound's bytes alone. So a sound stays on its side when clips are added, moved or listed
    in another order. Small domains are an exception until they grow: of two or more sounds at least one is held out
    (the lowest) and at least one is not (the highest); a single sound is trained on.
    """
    by_domain: dict[str, set[int]] = defaultdict(set)
    for known in clips:
        by_domain[known.clip.domain].add(known.identity.sound)
    held: set[int] = set()
    for sounds in by_domain.values():
        ordered = sorted(sounds, key=_fraction)
        count = sum(_fraction(sound) < share for sound in ordered)
        held.update(ordered[: min(max(1, count), len(ordered) - 1)])
    return held


def _fraction(digest: int) -> float:
    return (digest % 2**64) / 2**64


def record(clips: Sequence[Known]) -> Tensor:
    """[n, 3] int64, in the order of the clips."""
    return torch.tensor([known.identity for known in clips], dtype=torch.int64).reshape(-1, 3)


def list_digest(*lists: Sequence[Known]) -> str:
    """Hexadecimal digest of lists of clips; equal for the same clips in the same order."""
    return hashlib.sha256(repr([[known.identity.whole for known in clips] for clips in lists]).encode()).hexdigest()


@dataclass(frozen=True)
class Changes:
    """How a list of clips differs from a recorded one. changed: clips with other text, tokens or bytes."""

    added: int
    removed: int
    changed: int

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def __str__(self) -> str:
        return f"{self.added} added, {self.removed} removed, {self.changed} changed"


def compare(recorded: Tensor, now: Tensor) -> Changes:
    """How the present clips differ from the recorded ones; both [n, 3], in any order."""
    before, after = recorded.tolist(), now.tolist()
    before, after, _ = _pair(before, after, 1)
    before, after, edited = _pair(before, after, 0)
    before, after, replaced = _pair(before, after, 2)
    return Changes(len(after), len(before), edited + replaced)


def _pair(before: list[list[int]], after: list[list[int]], column: int) -> tuple[list[list[int]], list[list[int]], int]:
    """Both lists without the rows that have a partner of the same number in `column`, and how many had one."""
    shared = Counter(row[column] for row in before) & Counter(row[column] for row in after)

    def rest(rows: list[list[int]]) -> list[list[int]]:
        left = shared.copy()
        kept = []
        for row in rows:
            if left[row[column]]:
                left[row[column]] -= 1
            else:
                kept.append(row)
        return kept

    return rest(before), rest(after), shared.total()
