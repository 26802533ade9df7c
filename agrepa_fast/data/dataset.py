"""Clips as samples: a crop's mel [T, M], tokens [S, K] and audio [n], read from their files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from ..errors import UserError
from .audio import read_audio
from .manifest import Clip
from .mel import LogMel, MelConfig
from .tokens import BYTE_VOCABULARY, encode_text, read_tokens

# Decoded waveforms and mels of whole clips kept in memory, per process: 1 GiB is 3 hours of sound at 24 kHz.
CACHE_BYTES = 1 << 30


class Sample(TypedDict):
    """One clip's crop. T here is its own length, not the bucket's."""

    mel: Tensor  # [T, M] float32
    prompt: int  # frames of the reference prefix
    tokens: Tensor  # [S, K] int64
    vocabulary: int
    audio: Tensor  # [n] float32
    clip: Clip
    index: int
    start: int  # of the crop, in mel frames of the clip


@dataclass(frozen=True)
class Skipped:
    """A clip left out because it cannot be read."""

    path: Path
    source: str
    reason: str


class ClipDataset:
    """Clips as samples: a random crop of at most `max_frames` frames, its mel, tokens and prompt length.

    vocabularies: name to the vocabulary size of each of K streams (K the same for all); vocabulary_of: domain
    to the name its clips use ("text" when not given). A clip without a token file uses the bytes of its text,
    which only a `(256,)` vocabulary can hold. prompt_fraction: the reference prefix is a share of the crop
    drawn uniformly from this range. domains: the names and order that `Batch.domain` counts in; give the
    training set's to a validation set (default: those of the clips, sorted).

    A cropped clip keeps the part of its tokens that the crop spans: of S tokens over L frames, a crop from
    frame a to b keeps tokens floor(S a / L) to ceil(S b / L), so tokens stretched over the crop stay
    aligned. An uncropped clip keeps all.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        mel_config: MelConfig,
        *,
        max_frames: int,
        vocabularies: Mapping[str, Sequence[int]] | None = None,
        vocabulary_of: Mapping[str, str] | None = None,
        prompt_fraction: tuple[float, float] = (0.0, 0.5),
        domains: Sequence[str] | None = None,
        cache: bool = True,
    ) -> None:
        if not clips:
            raise UserError("the list of clips is empty")
        if mel_config.samples(max_frames) < mel_config.minimum_samples:
            raise ValueError(f"max_frames {max_frames} is shorter than one window of {mel_config.n_fft}")
        low, high = prompt_fraction
        if not 0 <= low <= high < 1:
            raise ValueError(f"prompt_fraction must satisfy 0 <= low <= high < 1, got {prompt_fraction}")
        sizes = {"text": (BYTE_VOCABULARY,)} if vocabularies is None else vocabularies
        self.clips = list(clips)
        self.mel_config = mel_config
        self.max_frames = max_frames
        self.vocabularies = {name: tuple(streams) for name, streams in sizes.items()}
        self.vocabulary_names = tuple(self.vocabularies)
        self.prompt_fraction = (low, high)
        self.domains = tuple(sorted({clip.domain for clip in clips})) if domains is None else tuple(domains)
        if len({len(streams) for streams in self.vocabularies.values()}) != 1:
            raise ValueError(f"all vocabularies need the same number of streams, got {self.vocabularies}")
        self._vocabulary_of = {domain: (vocabulary_of or {}).get(domain, "text") for domain in self.domains}
        for clip in self.clips:
            self._check_vocabulary(clip)
        self._log_mel = LogMel(mel_config)
        self._samples: dict[Path, int] = {}
        self._token_counts: dict[Clip, int] = {}
        self._cache: dict[Path, Tensor] | None = {} if cache else None
        self._mels: dict[Path, Tensor] = {}  # of whole clips: a crop's is another one each time
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def lengths(self) -> list[int]:
        """Frames of each clip, at most max_frames: what BucketBatches takes.

        Reads every file that `check` has not already read; UserError for one that cannot be read.
        """
        for clip in self.clips:
            if clip.path not in self._samples:
                self._remember(clip.path, self._read(clip.path))
        return [min(self.mel_config.frames(self._samples[clip.path]), self.max_frames) for clip in self.clips]

    @property
    def token_lengths(self) -> list[int]:
        """Tokens that a crop of each clip has at most; reads those that `check` has not already read."""
        longest = []
        for clip, frames in zip(self.clips, self.lengths):
            if clip not in self._token_counts:
                self._tokens(clip)
            count, total = self._token_counts[clip], self.mel_config.frames(self._samples[clip.path])
            # A crop's first and last token may be cut in two: see the class.
            longest.append(count if frames == total else min(count, count * frames // total + 2))
        return longest

    def check(self, max_share: float) -> list[Skipped]:
        """Read every clip once, drop those that cannot be read, and return them with the reasons.

        UserError when more than `max_share` (0 to 1) of the clips, or all of them, cannot be read.
        """
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_share must be between 0 and 1, got {max_share}")
        kept: list[Clip] = []
        skipped: list[Skipped] = []
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for clip, result in zip(self.clips, pool.map(self._try, self.clips)):
                if isinstance(result, str):
                    skipped.append(Skipped(clip.path, clip.source, result))
                else:
                    self._remember(clip.path, result)
                    kept.append(clip)
        if len(skipped) > max_share * len(self.clips) or not kept:
            first = "; ".join(f"{item.path} ({item.source}): {item.reason}" for item in skipped[:3])
            more = ", ..." if len(skipped) > 3 else ""
            raise UserError(
                f"{len(skipped)} of {len(self.clips)} clips cannot be read, "
                f"at most {max_share:.0%} may be: {first}{more}"
            )
        self.clips = kept
        return skipped

    def item(self, index: int, generator: torch.Generator) -> Sample:
        """The sample of clip `index`; `generator` decides the crop and the prompt length.

        UserError when the clip or its tokens cannot be read.
        """
        clip = self.clips[index]
        waveform = self._waveform(clip.path)
        tokens, vocabulary = self._tokens(clip)
        total = self.mel_config.frames(waveform.shape[0])
        frames = min(total, self.max_frames)
        start = 0
        if total > frames:
            start = int(torch.randint(total - frames + 1, (), generator=generator))
            first = start * self.mel_config.hop_length
            waveform = waveform[first : first + self.mel_config.samples(frames)]
            count = tokens.shape[0]
            tokens = tokens[count * start // total : -(-count * (start + frames) // total)]
        low, high = self.prompt_fraction
        share = low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
        return {
            "mel": self._mel(clip.path, waveform, whole=total == frames),
            # Of the crop, never of the file: otherwise the prompt could reveal the whole target.
            "prompt": int(share * frames),
            "tokens": tokens,
            "vocabulary": vocabulary,
            "audio": waveform,
            "clip": clip,
            "index": index,
            "start": start,
        }

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
        tokens = text if clip.tokens is None else read_tokens(clip.tokens, self.vocabularies[name])
        self._token_counts[clip] = tokens.shape[0]
        return tokens, number

    def _try(self, clip: Clip) -> Tensor | str:
        try:
            waveform = self._read(clip.path)
            self._tokens(clip)
        except UserError as error:
            return str(error).removeprefix(f"{clip.path}: ")
        return waveform

    def _read(self, path: Path) -> Tensor:
        return read_audio(path, self.mel_config.sample_rate, minimum_samples=self.mel_config.minimum_samples)

    def _waveform(self, path: Path) -> Tensor:
        if self._cache is not None and path in self._cache:
            return self._cache[path]
        waveform = self._read(path)
        self._remember(path, waveform)
        return waveform

    def _mel(self, path: Path, waveform: Tensor, whole: bool) -> Tensor:
        """Log-mel of a crop; of a whole clip from the cache, where it has been computed before."""
        if path in self._mels:
            return self._mels[path]
        mel = self._log_mel(waveform)
        if whole and self._cache is not None and self._cached_bytes + mel.nbytes <= CACHE_BYTES:
            self._mels[path] = mel
            self._cached_bytes += mel.nbytes
        return mel

    def _remember(self, path: Path, waveform: Tensor) -> None:
        self._samples[path] = waveform.shape[0]
        size = waveform.nbytes
        if self._cache is None or path in self._cache or self._cached_bytes + size > CACHE_BYTES:
            return
        self._cache[path] = waveform
        self._cached_bytes += size
