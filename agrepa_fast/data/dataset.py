"""A data set of clips: a sample is a crop's mel or latents [T, M], tokens [S, K] and audio [n], from its files."""

from __future__ import annotations

import copy
import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import UserError
from .features import FeatureSource, Frames
from .latents import LatentFiles, LatentGrid, LatentSource, check_count
from .manifest import Clip
from .mel import LogMel, MelConfig
from .sample import Sample, TokenSource
from .skipped import Skipped, bar, check_share, reasons_of
from .sounds import Sounds
from .threads import threaded
from .tokens import BYTE_VOCABULARY, check_range, check_text_vocabulary, encode_text, read_tokens
from .verdicts import Verdicts

# `check` decodes data sets of up to so many bytes (17 minutes at 16 kHz) and clips. It takes about a second, and finds
# silent files at once.
SMALL_BYTES = 64 << 20
SMALL_CLIPS = 1000

T = TypeVar("T")
_log = logging.getLogger(__name__)


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
        mel_config: of the mels; or the grid of latents, which stand in their place.
        latents: where latents are read from; default: the files of the clips.

    `sources` ({teacher: where its extracted features are}) is empty at first; what is set there comes with every
    sample.

    A cropped clip keeps the tokens that the crop spans: of S tokens over L frames, a crop from frame a to b keeps
    tokens floor(S a / L) to ceil(S b / L), so tokens that are stretched over the crop stay aligned. An uncropped clip
    keeps all.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        mel_config: MelConfig | LatentGrid,
        *,
        max_frames: int,
        vocabularies: Mapping[str, Sequence[int]] | None = None,
        vocabulary_of: Mapping[str, str] | None = None,
        prompt_share: tuple[float, float] = (0.0, 0.5),
        domains: Sequence[str] | None = None,
        sounds: Mapping[Path, int] | None = None,
        tokens: Mapping[str, TokenSource] | None = None,
        latents: LatentSource | None = None,
        cache: bool = True,
    ) -> None:
        if not clips:
            raise UserError("the list of clips is empty")
        if mel_config.samples(max_frames) < mel_config.minimum_samples:
            raise ValueError(
                f"max_frames {max_frames} is shorter than one window ({mel_config.minimum_samples} samples)"
            )
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
        self._latents = latents or LatentFiles(mel_config.mels)
        self._log_mel = LogMel(mel_config) if isinstance(mel_config, MelConfig) else None
        self._latent_counts: dict[Clip, int] = {}
        self._sounds = Sounds(mel_config.sample_rate, mel_config.minimum_samples, cache=cache)
        self._token_counts: dict[Clip, int] = {}
        self.unreadable: dict[Path, str] = {}  # what `readable` has said no to, and why
        self._mels: dict[Path, Tensor] = {}  # of whole clips; a crop differs each time
        self._windows: list[tuple[int, int]] | None = None  # (first frame, frames) of each clip, see in_windows

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def lengths(self) -> list[int]:
        """Frames of each sample, at most max_frames, as `BucketBatches` takes them.

        Reads the header of every file that `check` has not read; UserError where that fails.
        """
        if self._windows is not None:
            return [frames for _, frames in self._windows]
        return [min(self._frames(clip, self.samples_of(clip)), self.max_frames) for clip in self.clips]

    def in_windows(self) -> ClipDataset:
        """The same clips, where each window of a clip longer than `max_frames` is a sample of its own.

        A clip is cut into the fewest windows that fit, of equal length up to a frame. So each of its frames is in one
        window, and no window is shorter than half of `max_frames`. A clip that fits is one window. Errors as `lengths`.
        """
        cut = copy.copy(self)  # the decoded sounds, their lengths and the features' sources are shared
        cut.clips, cut._windows = [], []
        for clip in self.clips:
            total = self._frames(clip, self.samples_of(clip))
            count = -(-total // self.max_frames)
            edges = [total * number // count for number in range(count + 1)]
            cut.clips += [clip] * count
            cut._windows += [(start, stop - start) for start, stop in itertools.pairwise(edges)]
        return cut

    def samples_of(self, clip: Clip) -> int:
        """Samples of a whole clip at the rate of the mels."""
        return self._sounds.length(clip)

    def drop(self, reasons: Mapping[Clip, str]) -> list[Skipped]:
        """Take clips out of the set; returns them as skipped, for these reasons."""
        if not reasons:
            return []
        skipped = [Skipped(clip.path, clip.source, reasons[clip]) for clip in self.clips if clip in reasons]
        self.clips = [clip for clip in self.clips if clip not in reasons]
        return skipped

    @property
    def token_lengths(self) -> list[int]:
        """The largest number of tokens that each sample can have; reads those that `check` has not read."""
        longest = []
        for clip, frames in zip(self.clips, self.lengths):
            if clip not in self._token_counts:
                self._tokens(clip)
            count, total = self._token_counts[clip], self._frames(clip, self.samples_of(clip))
            # A crop's first and last token may be cut in two: see the class.
            longest.append(count if frames == total else min(count, count * frames // total + 2))
        return longest

    def check(self, max_share: float, *, memory: Path | None = None, progress: bool = False) -> list[Skipped]:
        """Drop the clips that cannot be read, and return them with the reasons.

        It reads headers, texts and token files. It decodes sound if the header does not give its length (MP3), and in
        data sets of at most 64 MiB and 1,000 clips. Elsewhere a silent or damaged file is found when it is first used,
        and `load_batch` replaces it.

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
        reasons = reasons_of(self.clips, self._each(self.clips, lambda clip: self._examine(clip, verdicts), progress))
        verdicts.save()
        fine = [clip for clip in self.clips if clip not in reasons]
        if len(fine) <= SMALL_CLIPS and sum(4 * self.samples_of(clip) for clip in fine) <= SMALL_BYTES:
            waveforms = self._each(fine, self._read_whole, progress)
            reasons |= reasons_of(fine, waveforms)
            for clip, waveform in zip(fine, waveforms):
                if isinstance(waveform, Tensor):
                    self._sounds.keep(clip.path, waveform)
        total = len(self.clips)
        skipped = self.drop(reasons)
        check_share(skipped, total, max_share, "cannot be read")
        return skipped

    def readable(self, index: int) -> bool:
        """Whether clip `index` can be decoded and has its features; a warning names it the first time if not."""
        clip = self.clips[index]
        if clip.path not in self.unreadable:
            try:
                self._sounds.whole(clip)
                self._features(clip, 0.0, 0.0)
            except UserError as error:
                self.unreadable[clip.path] = str(error)
                _log.warning("%s: %s; another clip stands in", clip.source, error)
        return clip.path not in self.unreadable

    def item(self, index: int, generator: torch.Generator | None) -> Sample:
        """The sample of clip or window `index`; `generator` decides the crop and the prompt length.

        Without a generator the crop begins with the clip, and there is no prompt. A window is not cropped.

        Raises:
            UserError: the clip, its tokens or its features cannot be read.
        """
        clip = self.clips[index]
        tokens, vocabulary = self._tokens(clip)
        total = self._frames(clip, self.samples_of(clip))
        frames = min(total, self.max_frames)
        start = 0
        if self._windows is not None:
            start, frames = self._windows[index]
        elif total > frames and generator is not None:
            start = int(torch.randint(total - frames + 1, (), generator=generator))
        if total > frames:
            first = self.mel_config.first_sample(start)
            waveform = self._sounds.part(clip, first, first + self.mel_config.samples(frames))
            count = tokens.shape[0]
            tokens = tokens[count * start // total : -(-count * (start + frames) // total)]
        else:
            waveform = self._sounds.whole(clip)
            total = frames = self._frames(clip, waveform.shape[0])
            if isinstance(self.mel_config, LatentGrid):
                waveform = waveform[: self.mel_config.samples(frames)]  # the codec may have rounded the length down
        low, high = self.prompt_share
        share = 0.0
        if generator is not None:
            share = low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
        return {
            "mel": self._modelled(clip, waveform, start, frames, whole=total == frames),
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
        if clip.domain not in self._extracted_tokens:
            check_text_vocabulary(clip, name, self.vocabularies[name])

    def _tokens(self, clip: Clip) -> tuple[Tensor, int]:
        name = self._vocabulary_of[clip.domain]
        number = self.vocabulary_names.index(name)
        try:
            text = encode_text(clip.text)
        except UserError as error:
            raise UserError(f"{clip.path}: {error}") from error
        if clip.tokens is not None:
            tokens = read_tokens(clip.tokens, self.vocabularies[name], clip.token_pack)
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

        results = threaded(result, clips, min(16, os.cpu_count() or 1))
        return list(bar(results, len(clips)) if progress else results)

    def _examine(self, clip: Clip, verdicts: Verdicts) -> None:
        """Note the number of samples and tokens of a clip.

        Raises:
            UserError: they cannot be read.
        """
        self._frames(clip, self._sounds.length(clip, verdicts))
        if clip.tokens is None:
            self._tokens(clip)
            return
        kind = f"tokens {self.vocabularies[self._vocabulary_of[clip.domain]]}"
        file = None if clip.token_pack is None else clip.token_pack.file
        known = verdicts.find(clip.tokens, kind, 1, file)
        if known is None:
            self._tokens(clip)
            verdicts.remember(clip.tokens, kind, self._token_counts[clip], file=file)
        else:
            encode_text(clip.text)
            self._token_counts[clip] = known[0]

    def _frames(self, clip: Clip, samples: int) -> int:
        """Frames of a whole clip. UserError where its latents do not fit its duration."""
        if isinstance(self.mel_config, MelConfig):
            return self.mel_config.frames(samples)
        if clip not in self._latent_counts:
            count = self._latents.count(clip, self.sounds.get(clip.path))
            check_count(clip.latents or clip.path, count, self.mel_config, samples)
            self._latent_counts[clip] = count
        return self._latent_counts[clip]

    def latents_of(self, clip: Clip) -> Tensor:
        """The whole latents of a clip [T, C], as the codec made them."""
        return self._latents.read(clip, self.sounds.get(clip.path), 0, self._frames(clip, self.samples_of(clip)))

    def _read_whole(self, clip: Clip) -> Tensor:
        """The decoded sound, of a clip whose latents can be read too."""
        if isinstance(self.mel_config, LatentGrid):
            self.latents_of(clip)
        return self._sounds.decode(clip)

    def _modelled(self, clip: Clip, waveform: Tensor, start: int, frames: int, whole: bool) -> Tensor:
        """Normalised latents or log-mel of a crop. The mel of a whole clip is cached."""
        if isinstance(self.mel_config, LatentGrid):
            latents = self._latents.read(clip, self.sounds.get(clip.path), start, start + frames)
            return self.mel_config.normalised(latents)
        path = clip.path
        assert self._log_mel is not None
        if path in self._mels:
            return self._mels[path]
        mel = self._log_mel(waveform)
        if whole and self._sounds.reserve(mel.nbytes):
            self._mels[path] = mel
        return mel
