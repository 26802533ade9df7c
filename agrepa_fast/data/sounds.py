"""The sound of clips at one sampling rate: its length, whole waveforms [S] from memory, and parts of long files."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..errors import UserError
from .audio import check_minimum, read_audio, read_header, read_part, read_sound
from .clip import Clip
from .resampling import resampled_length
from .verdicts import Verdicts

# Decoded waveforms and mels of whole clips kept in memory, per process: 1 GiB is 3 hours of sound at 24 kHz.
CACHE_BYTES = 1 << 30
# A decoded file may be shorter or longer than its header says by so much.
LENGTH_SECONDS = 0.01


class Sounds:
    """Sounds by the path of their clip.

    Args:
        minimum_samples: a shorter sound is refused. cache: keep whole waveforms in memory, up to CACHE_BYTES.
    """

    def __init__(self, sample_rate: int, minimum_samples: int, *, cache: bool) -> None:
        self.sample_rate = sample_rate
        self.minimum_samples = minimum_samples
        self.lengths: dict[Path, int] = {}
        self._cache: dict[Path, Tensor] | None = {} if cache else None
        self._cached_bytes = 0
        self._all_bytes = 0  # of all sounds whose length is known
        self._mixes: dict[Path, int] = {}

    def length(self, clip: Clip, verdicts: Verdicts | None = None) -> int:
        """Samples of a whole clip.

        Raises:
            UserError: the header cannot be read.
        """
        if clip.path not in self.lengths:
            self._note(clip.path, self._measure(clip, verdicts))
        return self.lengths[clip.path]

    def whole(self, clip: Clip) -> Tensor:
        """The waveform of a clip.

        Raises:
            UserError: it cannot be decoded, or its length has changed.
        """
        if self._cache is not None and clip.path in self._cache:
            return self._cache[clip.path]
        waveform = self.decode(clip)
        self.keep(clip.path, waveform)
        return waveform

    def part(self, clip: Clip, start: int, stop: int) -> Tensor:
        """Samples start to stop - 1 of `whole`, which is not decoded where the cache could not hold all sounds.

        Raises:
            UserError: as `whole`, for what the part shows.
        """
        length, path = self.length(clip), clip.path
        if self._cache is None or (path not in self._cache and self._all_bytes > CACHE_BYTES):
            mix = self._mixes.get(path)
            part = read_part(path, self.sample_rate, start, stop, length=length, mix=mix, pack=clip.pack)
            if part is not None:
                return part
        return self.whole(clip)[start:stop]

    def decode(self, clip: Clip) -> Tensor:
        """The waveform of a clip, past the cache. Errors as `whole`."""
        path, rate = clip.path, self.sample_rate
        waveform, mix = read_sound(path, rate, minimum_samples=self.minimum_samples, pack=clip.pack)
        self._mixes[path] = mix
        # The plan of the batches is made from the lengths that are known by now.
        if path not in self.lengths:
            self._note(path, waveform.shape[0])
        expected = self.lengths[path]
        if abs(waveform.shape[0] - expected) > LENGTH_SECONDS * rate:
            raise UserError(f"{path}: has {waveform.shape[0]} samples, and had {expected} when the run began")
        return waveform[:expected]

    def keep(self, path: Path, waveform: Tensor) -> None:
        """Put a waveform into the cache, if there is room."""
        if self._cache is not None and path not in self._cache and self.reserve(waveform.nbytes):
            self._cache[path] = waveform

    def reserve(self, size: int) -> bool:
        """Take bytes of the cache for something else; False if it has none left."""
        fits = self._cache is not None and self._cached_bytes + size <= CACHE_BYTES
        self._cached_bytes += size if fits else 0
        return fits

    def _note(self, path: Path, length: int) -> None:
        self.lengths[path] = length
        self._all_bytes += 4 * length

    def _measure(self, clip: Clip, verdicts: Verdicts | None) -> int:
        path, pack = clip.path, clip.pack
        file = path if pack is None else pack.file
        known = verdicts.find(path, "sound", 2, file) if verdicts is not None else None
        if known is None:
            frames, rate, exact = read_header(path, pack)
            if not exact:
                frames = read_audio(path, rate, pack=pack).shape[0]
            if verdicts is not None:
                verdicts.remember(path, "sound", frames, rate, file=file)
        else:
            frames, rate = known
        samples = resampled_length(frames, rate, self.sample_rate)
        check_minimum(path, samples, self.sample_rate, self.minimum_samples)
        return samples
