"""A data set of clips: a sample is a crop's mel [T, M], tokens [S, K] and audio [n], read from its files."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict, TypeVar

import torch
from torch import Tensor

from ..errors import UserError
from .audio import check_minimum, read_audio, read_header, resampled_length
from .features import FeatureSource, Frames
from .manifest import Clip
from .mel import LogMel, MelConfig
from .tokens import BYTE_VOCABULARY, check_range, encode_text, read_tokens
from .verdicts import Verdicts

# Decoded waveforms and mels of whole clips kept in memory, per process: 1 GiB is 3 hours of sound at 24 kHz.
CACHE_BYTES = 1 << 30
# `check` decodes data sets up to this size (17 minutes at 16 kHz), which takes seconds and finds silent files at once.
SMALL_BYTES = 64 << 20
# A decoded file may be shorter or longer than its header says by so much.
LENGTH_SECONDS = 0.01

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Sample(TypedDict):
    """One clip's crop. T is the crop's own length, not the bucket's."""

    mel: Tensor  # [T, M] float32
    prompt: int  # frames of the reference prefix
    tokens: Tensor  # [S, K] int64
    vocabulary: int
    audio: Tensor  # [n] float32
    clip: Clip
    index: int
    start: int  # of the crop, in mel frames of the clip
    features: dict[str, Frames | None]  # {teacher: extracted features of the crop}, for each of the set's sources


@dataclass(frozen=True)
class Skipped:
    """A clip that cannot be read, and why."""

    path: Path
    source: str
    reason: str


class TokenSource(Protocol):
    """Where extracted tokens of clips are read from."""

    def read(self, clip: Clip, sound: int | None) -> Tensor:
        """[S, K] int64; `sound` is the digest of the clip's sound. UserError: the clip has none."""
        ...


class ClipDataset:
    """Clips as samples: a random crop of at most `max_frames` frames, with its mel, tokens and prompt length.

    Args:
        vocabularies: for each name, the vocabulary sizes of K streams (the same K for all).
        vocabulary_of: {domain: name}; "text" for a domain that is not named. A clip without a token file uses the bytes
            of its text, which only a vocabulary `(256,)` can hold.
        prompt_share: the length of the reference prefix, as a share of the crop, is drawn uniformly from this range.
        domains: the names, in order, that `Batch.domain` indexes. Give a validation set those of the training set; the
            default is those of the clips, sorted.
        sounds: digests of the clips' sounds, by which extracted features are found.
        tokens: {domain: the extracted tokens of its clips without a token file}.

    `sources` ({teacher: where its extracted features are}) is empty at first; what is set there comes with every
    sample.

    A cropped clip keeps the tokens that the crop spans: of S tokens over L frames, a crop from frame a to b keeps
    tokens floor(S a / L) to ceil(S b / L), so tokens that are stretched over the crop stay aligned. An uncropped clip
    keeps all.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        mel_config: MelConfig,
        *,
        max_frames: int,
        vocabularies: Mapping[str, Sequence[int]] | None = None,
        vocabulary_of: Mapping[str, str] | None = None,
        prompt_share: tuple[float, float] = (0.0, 0.5),
        domains: Sequence[str] | None = None,
        sounds: Mapping[Path, int] | None = None,
        tokens: Mapping[str, TokenSource] | None = None,
        cache: bool = True,
    ) -> None:
        if not clips:
            raise UserError("the list of clips is empty")
        if mel_config.samples(max_frames) < mel_config.minimum_samples:
            raise ValueError(f"max_frames {max_frames} is shorter than one window of {mel_config.n_fft}")
        low, high = prompt_share
        if not 0 <= low <= high < 1:
            raise ValueError(f"prompt_share must satisfy 0 <= low <= high < 1, got {prompt_share}")
        sizes = {"text": (BYTE_VOCABULARY,)} if vocabularies is None else vocabularies
        self.clips = list(clips)
        self.mel_config = mel_config
        self.max_frames = max_frames
        self.vocabularies = {name: tuple(streams) for name, streams in sizes.items()}
        self.vocabulary_names = tuple(self.vocabularies)
        self.prompt_share = (low, high)
        self.domains = tuple(sorted({clip.domain for clip in clips})) if domains is None else tuple(domains)
        if len({len(streams) for streams in self.vocabularies.values()}) != 1:
            raise ValueError(f"all vocabularies need the same number of streams, got {self.vocabularies}")
        self._extracted_tokens = dict(tokens or {})
        self._vocabulary_of = {domain: (vocabulary_of or {}).get(domain, "text") for domain in self.domains}
        for clip in self.clips:
            self._check_vocabulary(clip)
        self.sounds = dict(sounds or {})
        self.sources: dict[str, FeatureSource] = {}
        self._log_mel = LogMel(mel_config)
        self._samples: dict[Path, int] = {}
        self._token_counts: dict[Clip, int] = {}
        self._unreadable: set[Path] = set()
        self._cache: dict[Path, Tensor] | None = {} if cache else None
        self._mels: dict[Path, Tensor] = {}  # of whole clips; a crop differs each time
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def lengths(self) -> list[int]:
        """Frames of each clip, at most max_frames, as `BucketBatches` takes them.

        Reads the header of every file that `check` has not read.

        Raises:
            UserError: a header cannot be read.
        """
        return [min(self.mel_config.frames(self.samples_of(clip)), self.max_frames) for clip in self.clips]

    def samples_of(self, clip: Clip) -> int:
        """Samples of a whole clip at the rate of the mels."""
        if clip.path not in self._samples:
            self._samples[clip.path] = self._measure(clip)
        return self._samples[clip.path]

    def drop(self, reasons: Mapping[Clip, str]) -> list[Skipped]:
        """Take clips out of the set; returns them as skipped, for these reasons."""
        skipped = [Skipped(clip.path, clip.source, reasons[clip]) for clip in self.clips if clip in reasons]
        self.clips = [clip for clip in self.clips if clip not in reasons]
        return skipped

    @property
    def token_lengths(self) -> list[int]:
        """The largest number of tokens that a crop of each clip can have; reads those that `check` has not read."""
        longest = []
        for clip, frames in zip(self.clips, self.lengths):
            if clip not in self._token_counts:
                self._tokens(clip)
            count, total = self._token_counts[clip], self.mel_config.frames(self._samples[clip.path])
            # A crop's first and last token may be cut in two: see the class.
            longest.append(count if frames == total else min(count, count * frames // total + 2))
        return longest

    def check(self, max_share: float, *, memory: Path | None = None, progress: bool = False) -> list[Skipped]:
        """Drop the clips that cannot be read, and return them with the reasons.

        It reads headers, texts and token files. It decodes sound if the header does not give its length (MP3), and in
        data sets of at most 64 MiB. Elsewhere a silent or damaged file is found when it is first used, and `load_batch`
        replaces it.

        Args:
            max_share: the largest share of clips, from 0 to 1, that may be unreadable.
            memory: a file that remembers the files that were fine, for the next start (see `verdicts.verdict_file`).
            progress: show a bar.

        Raises:
            UserError: more than `max_share` of the clips, or all of them, cannot be read.
        """
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_share must be between 0 and 1, got {max_share}")
        verdicts = Verdicts(memory)
        reasons = _reasons(self.clips, self._each(self.clips, lambda clip: self._examine(clip, verdicts), progress))
        verdicts.save()
        fine = [clip for clip in self.clips if clip not in reasons]
        if sum(4 * self._samples[clip.path] for clip in fine) <= SMALL_BYTES:
            waveforms = self._each(fine, self._decode, progress)
            reasons |= _reasons(fine, waveforms)
            for clip, waveform in zip(fine, waveforms):
                if isinstance(waveform, Tensor):
                    self._keep(clip.path, waveform)
        total = len(self.clips)
        skipped = self.drop(reasons)
        check_share(skipped, total, max_share, "cannot be read")
        return skipped

    def readable(self, index: int) -> bool:
        """Whether clip `index` can be decoded and has its features; a warning names it the first time if not."""
        clip = self.clips[index]
        if clip.path not in self._unreadable:
            try:
                self._waveform(clip)
                self._features(clip, 0.0, 0.0)
            except UserError as error:
                self._unreadable.add(clip.path)
                _log.warning("%s: %s; another clip stands in", clip.source, error)
        return clip.path not in self._unreadable

    def item(self, index: int, generator: torch.Generator | None) -> Sample:
        """The sample of clip `index`; `generator` decides the crop and the prompt length.

        Without a generator the crop begins with the clip, and there is no prompt.

        Raises:
            UserError: the clip, its tokens or its features cannot be read.
        """
        clip = self.clips[index]
        waveform = self._waveform(clip)
        tokens, vocabulary = self._tokens(clip)
        total = self.mel_config.frames(waveform.shape[0])
        frames = min(total, self.max_frames)
        start = 0
        if total > frames:
            start = int(torch.randint(total - frames + 1, (), generator=generator)) if generator else 0
            first = start * self.mel_config.hop_length
            waveform = waveform[first : first + self.mel_config.samples(frames)]
            count = tokens.shape[0]
            tokens = tokens[count * start // total : -(-count * (start + frames) // total)]
        low, high = self.prompt_share
        share = 0.0
        if generator is not None:
            share = low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
        return {
            "mel": self._mel(clip.path, waveform, whole=total == frames),
            # A share of the crop and not of the file, so that the prompt cannot reveal the whole target.
            "prompt": int(share * frames),
            "tokens": tokens,
            "vocabulary": vocabulary,
            "audio": waveform,
            "clip": clip,
            "index": index,
            "start": start,
            "features": self._features(
                clip, start / self.mel_config.frame_rate, waveform.shape[0] / self.mel_config.sample_rate
            ),
        }

    def _features(self, clip: Clip, start: float, seconds: float) -> dict[str, Frames | None]:
        sound = self.sounds.get(clip.path)
        return {name: source.read(clip, sound, start, seconds) for name, source in self.sources.items()}

    def _check_vocabulary(self, clip: Clip) -> None:
        if clip.domain not in self._vocabulary_of:
            known = ", ".join(self.domains)
            raise UserError(f"{clip.source}: domain {clip.domain!r} is not one of this run's ({known})")
        name = self._vocabulary_of[clip.domain]
        if name not in self.vocabularies:
            known = ", ".join(self.vocabulary_names)
            raise UserError(
                f"{clip.source}: domain {clip.domain!r} needs the vocabulary {name!r}, known are {known}: "
                "say which vocabulary each domain uses"
            )
        if clip.domain in self._extracted_tokens:
            return
        if clip.tokens is None and self.vocabularies[name] != (BYTE_VOCABULARY,):
            raise UserError(
                f"{clip.source}: {clip.path.name} has no token file, and the vocabulary {name!r} "
                f"{self.vocabularies[name]} is not byte text ({BYTE_VOCABULARY},): "
                "add the column tokens or use byte text"
            )

    def _tokens(self, clip: Clip) -> tuple[Tensor, int]:
        name = self._vocabulary_of[clip.domain]
        number = self.vocabulary_names.index(name)
        try:
            text = encode_text(clip.text)
        except UserError as error:
            raise UserError(f"{clip.path}: {error}") from error
        if clip.tokens is not None:
            tokens = read_tokens(clip.tokens, self.vocabularies[name])
        elif clip.domain in self._extracted_tokens:
            tokens = self._extracted_tokens[clip.domain].read(clip, self.sounds.get(clip.path))
            check_range(clip.path, tokens.numpy(), self.vocabularies[name])
        else:
            tokens = text
        self._token_counts[clip] = tokens.shape[0]
        return tokens, number

    def _each(self, clips: Sequence[Clip], read: Callable[[Clip], T], progress: bool) -> list[T | UserError]:
        """What `read` returns for each clip, or the UserError that it raises. Several threads call it."""

        def result(clip: Clip) -> T | UserError:
            try:
                return read(clip)
            except UserError as error:
                # The traceback would keep the decoded sound in memory.
                return error.with_traceback(None)

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            results = pool.map(result, clips)
            return list(_bar(results, len(clips)) if progress else results)

    def _examine(self, clip: Clip, verdicts: Verdicts) -> None:
        """Note the number of samples and tokens of a clip.

        Raises:
            UserError: they cannot be read.
        """
        if clip.path not in self._samples:
            self._samples[clip.path] = self._measure(clip, verdicts)
        if clip.tokens is None:
            self._tokens(clip)
            return
        kind = f"tokens {self.vocabularies[self._vocabulary_of[clip.domain]]}"
        known = verdicts.find(clip.tokens, kind, 1)
        if known is None:
            self._tokens(clip)
            verdicts.remember(clip.tokens, kind, self._token_counts[clip])
        else:
            encode_text(clip.text)
            self._token_counts[clip] = known[0]

    def _measure(self, clip: Clip, verdicts: Verdicts | None = None) -> int:
        """Samples of a file at the rate of the mels."""
        config, path, pack = self.mel_config, clip.path, clip.pack
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
        samples = resampled_length(frames, rate, config.sample_rate)
        check_minimum(path, samples, config.sample_rate, config.minimum_samples)
        return samples

    def _waveform(self, clip: Clip) -> Tensor:
        if self._cache is not None and clip.path in self._cache:
            return self._cache[clip.path]
        waveform = self._decode(clip)
        self._keep(clip.path, waveform)
        return waveform

    def _decode(self, clip: Clip) -> Tensor:
        config, path = self.mel_config, clip.path
        waveform = read_audio(path, config.sample_rate, minimum_samples=config.minimum_samples, pack=clip.pack)
        # The plan of the batches is made from the lengths that are known by now.
        expected = self._samples.setdefault(path, waveform.shape[0])
        if abs(waveform.shape[0] - expected) > LENGTH_SECONDS * config.sample_rate:
            raise UserError(f"{path}: has {waveform.shape[0]} samples, and had {expected} when the run began")
        return waveform[:expected]

    def _mel(self, path: Path, waveform: Tensor, whole: bool) -> Tensor:
        """Log-mel of a crop. That of a whole clip is cached."""
        if path in self._mels:
            return self._mels[path]
        mel = self._log_mel(waveform)
        if whole and self._cache is not None and self._cached_bytes + mel.nbytes <= CACHE_BYTES:
            self._mels[path] = mel
            self._cached_bytes += mel.nbytes
        return mel

    def _keep(self, path: Path, waveform: Tensor) -> None:
        size = waveform.nbytes
        if self._cache is None or path in self._cache or self._cached_bytes + size > CACHE_BYTES:
            return
        self._cache[path] = waveform
        self._cached_bytes += size


def check_share(skipped: Sequence[Skipped], total: int, max_share: float, what: str) -> None:
    """UserError when more than `max_share` of `total` clips, or all of them, are skipped; `what` says why."""
    if len(skipped) > max_share * total or len(skipped) == total:
        first = "; ".join(f"{item.path} ({item.source}): {item.reason}" for item in skipped[:3])
        more = ", ..." if len(skipped) > 3 else ""
        raise UserError(f"{len(skipped)} of {total} clips {what}, at most {max_share:.0%} may be: {first}{more}")


def _reasons(clips: Sequence[Clip], results: Sequence[object]) -> dict[Clip, str]:
    """The results that are errors: why clips cannot be read."""
    return {
        clip: str(result).removeprefix(f"{clip.path}: ")
        for clip, result in zip(clips, results)
        if isinstance(result, UserError)
    }


def _bar(results: Iterable[T], total: int) -> Iterable[T]:
    """The results, with a progress bar if they take longer than a second and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return results
    return tqdm(results, total=total, desc="checking clips", unit="clip", delay=1.0, leave=False, file=sys.stderr)
