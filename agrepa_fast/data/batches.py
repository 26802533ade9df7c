"""Clips to fixed-shape batches: mel [B, T, M], mask and prompt [B, T], tokens [B, S, K], audio [B, n].

T is one of a few bucket lengths. What batch number `step` holds depends only on (seed, step), so a run
resumes exactly from its step number, whatever the number of worker processes.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .audio import read_audio
from .manifest import Clip
from .mel import LogMel, MelConfig
from .tokens import BYTE_VOCABULARY, encode_text, read_tokens

# Decoded waveforms and mels of whole clips kept in memory, per process: 1 GiB is 3 hours of sound at 24 kHz.
CACHE_BYTES = 1 << 30
TOKEN_MULTIPLE = 16
MAX_RESTARTS = 3


@dataclass
class Batch:
    """One batch of B samples. T is the bucket's length in frames, n = mel_config.samples(T)."""

    mel: Tensor  # [B, T, M] float32, zero where not mask
    mask: Tensor  # [B, T] bool, True = real frame
    prompt: Tensor  # [B, T] bool, True = reference-mel frames, a prefix of the crop
    tokens: Tensor  # [B, S, K] int64, zero padded
    token_lengths: Tensor  # [B] int64, 0 for an empty text
    vocabulary: Tensor  # [B] int64, index into the dataset's vocabulary_names
    domain: Tensor  # [B] int64, index into domains
    domains: tuple[str, ...]
    audio: Tensor  # [B, n] float32, waveform of the crop, zero padded
    audio_lengths: Tensor  # [B] int64, samples
    clips: list[Clip]
    indices: Tensor  # [B] int64, index of the clip in the dataset
    starts: Tensor  # [B] int64, the clip's mel frame where the crop begins
    skipped: list[Skipped] = dataclasses.field(default_factory=list)  # clips that others of the batch stand in for

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for asynchronous copies. Needs a CUDA device."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed: dict[str, Any] = {
            name: change(value) if isinstance(value, Tensor) else value for name, value in values.items()
        }
        return Batch(**changed)


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
        tokens = encode_text(clip.text) if clip.tokens is None else read_tokens(clip.tokens, self.vocabularies[name])
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


class BucketBatches:
    """Which clips make up batch number `step`, for any step, from (seed, step) alone.

    lengths: frames of each clip. Each clip goes into the shortest of `buckets` that holds it, and every batch
    of a bucket of T frames has B = max(1, frames_per_batch // T) clips, so there are as many shapes as
    buckets. An epoch covers every clip; the last batch of a bucket is filled from the bucket's beginning.
    balance: every domain (domains: one name per clip) is drawn equally often over an epoch and spread evenly
    through the batches of each bucket, the clips of smaller domains several times; one batch holds what its
    bucket holds, so short clips of one domain make batches of that domain.
    tokens: of each clip; a bucket's batches are all padded to its clips' most, so that their shapes are one.
    Of `world_size` ranks, all get the same bucket at each step and different parts of its order.

    ValueError when a clip is longer than the longest bucket, or for sizes that make no sense.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        buckets: Sequence[int],
        frames_per_batch: int,
        seed: int,
        domains: Sequence[str] | None = None,
        balance: bool = False,
        tokens: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not len(lengths):
            raise ValueError("lengths is empty")
        if not len(buckets) or min(buckets) < 1 or frames_per_batch < 1:
            raise ValueError(f"need positive buckets and frames_per_batch, got {buckets}, {frames_per_batch}")
        if max(lengths) > max(buckets):
            raise ValueError(f"a clip of {max(lengths)} frames fits no bucket, the longest is {max(buckets)}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside a world of {world_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if balance and domains is None:
            raise ValueError("balance needs the domain of each clip")
        if domains is not None and len(domains) != len(lengths):
            raise ValueError(f"{len(domains)} domains for {len(lengths)} clips")
        if tokens is not None and len(tokens) != len(lengths):
            raise ValueError(f"{len(tokens)} token counts for {len(lengths)} clips")
        self.seed = seed
        self.frames_per_batch = frames_per_batch
        self.rank, self.world_size = rank, world_size
        names = np.array(domains if balance and domains is not None else ["all"] * len(lengths))
        largest = max(np.count_nonzero(names == name) for name in set(names))
        sizes = np.array(sorted(set(buckets)))
        bucket_of = np.searchsorted(sizes, np.asarray(lengths))
        # (frames, [(clips of one domain, how many to draw of them in an epoch)])
        self._buckets: list[tuple[int, list[tuple[np.ndarray, int]]]] = []
        for number, frames in enumerate(sizes.tolist()):
            groups = []
            for name in sorted(set(names)):
                members = np.flatnonzero((bucket_of == number) & (names == name))
                if len(members):
                    draws = round(len(members) * largest / np.count_nonzero(names == name))
                    groups.append((members, max(draws, len(members))))
            if groups:
                self._buckets.append((frames, groups))
        # {frames: tokens}
        self.tokens: dict[int, int] = {}
        if tokens is not None:
            counts = np.asarray(tokens)
            self.tokens = {f: max(int(counts[members].max()) for members, _ in g) for f, g in self._buckets}
        self.steps_per_epoch = sum(
            -(-sum(draws for _, draws in groups) // (self.batch_size(frames) * world_size))
            for frames, groups in self._buckets
        )
        self._epoch = -1
        self._plan: list[tuple[int, np.ndarray]] = []

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Every (clips per batch, frames) that occurs."""
        return [(self.batch_size(frames), frames) for frames, _ in self._buckets]

    def batch_size(self, frames: int) -> int:
        """Clips per batch and rank in the bucket of `frames` frames."""
        return max(1, self.frames_per_batch // frames)

    def batch(self, step: int) -> tuple[int, tuple[int, ...]]:
        """Batch number `step` of this rank: its bucket in frames and the indices of its clips."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._plan, self._epoch = self._plan_epoch(epoch), epoch
        frames, indices = self._plan[position]
        return frames, tuple(indices[self.rank :: self.world_size].tolist())

    def _plan_epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """The batches of all ranks together, in order: the same on every rank."""
        rng = np.random.default_rng([self.seed, epoch])
        plan = []
        for frames, groups in self._buckets:
            drawn, place = [], []
            for members, draws in groups:
                whole, rest = divmod(draws, len(members))
                extra = rng.permutation(members)[:rest]
                drawn.append(np.concatenate([*(rng.permutation(members) for _ in range(whole)), extra]))
                # Each domain evenly over 0 to 1, so that every stretch of the order has the same mix.
                place.append((np.arange(draws) + rng.random(draws)) / draws)
            order = np.concatenate(drawn)[np.argsort(np.concatenate(place), kind="stable")]
            size = self.batch_size(frames) * self.world_size
            batches = -(-len(order) // size)
            # np.resize repeats from the beginning.
            plan += [(frames, chunk) for chunk in np.resize(order, (batches, size))]
        return [plan[position] for position in rng.permutation(len(plan))]


def collate(
    samples: Sequence[Sample], frames: int, domains: tuple[str, ...], mel_config: MelConfig, tokens_at_least: int = 1
) -> Batch:
    """Samples padded to `frames` frames; tokens to the longest, rounded up to a multiple of 16.

    ValueError when a sample is longer than `frames`.
    """
    count = len(samples)
    longest = max(1, tokens_at_least, *(sample["tokens"].shape[0] for sample in samples))
    tokens = torch.zeros(
        count,
        -(-longest // TOKEN_MULTIPLE) * TOKEN_MULTIPLE,
        samples[0]["tokens"].shape[1],
        dtype=torch.int64,
    )
    mel = torch.zeros(count, frames, mel_config.mels)
    audio = torch.zeros(count, mel_config.samples(frames))
    for row, sample in enumerate(samples):
        length = sample["mel"].shape[0]
        if length > frames:
            raise ValueError(f"{sample['clip'].path} has {length} frames, the bucket {frames}")
        mel[row, :length] = sample["mel"]
        audio[row, : sample["audio"].shape[0]] = sample["audio"]
        tokens[row, : sample["tokens"].shape[0]] = sample["tokens"]
    position = torch.arange(frames)
    real = torch.tensor([sample["mel"].shape[0] for sample in samples])
    prompt = torch.tensor([sample["prompt"] for sample in samples])
    return Batch(
        mel=mel,
        mask=position < real[:, None],
        prompt=position < prompt[:, None],
        tokens=tokens,
        token_lengths=torch.tensor([sample["tokens"].shape[0] for sample in samples]),
        vocabulary=torch.tensor([sample["vocabulary"] for sample in samples]),
        domain=torch.tensor([domains.index(sample["clip"].domain) for sample in samples]),
        domains=domains,
        audio=audio,
        audio_lengths=torch.tensor([sample["audio"].shape[0] for sample in samples]),
        clips=[sample["clip"] for sample in samples],
        indices=torch.tensor([sample["index"] for sample in samples]),
        starts=torch.tensor([sample["start"] for sample in samples]),
    )


def load_batch(dataset: ClipDataset, batches: BucketBatches, step: int, seed: int) -> Batch:
    """Batch number `step`. Crop and prompt of a clip come from (seed, step, index) and nothing else.

    For a clip that cannot be read (any more) the next one of the batch stands in; `Batch.skipped` names it.
    UserError when none of the batch can be read.
    """
    frames, indices = batches.batch(step)
    threads = torch.get_num_threads()
    # One thread, as in a worker process: the sums, and so the bits, do not depend on where this runs.
    torch.set_num_threads(1)
    try:
        samples: list[Sample] = []
        skipped: list[Skipped] = []
        for place, index in enumerate(indices):
            state = np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)
            for other in (*indices[place:], *indices[:place]):
                generator = torch.Generator().manual_seed(int(state[0]) >> 1)
                try:
                    samples.append(dataset.item(other, generator))
                    break
                except UserError as error:
                    clip = dataset.clips[other]
                    skipped.append(Skipped(clip.path, clip.source, str(error).removeprefix(f"{clip.path}: ")))
            else:
                raise UserError(f"batch {step}: none of its clips can be read; the first: {skipped[0].reason}")
        batch = collate(samples, frames, dataset.domains, dataset.mel_config, batches.tokens.get(frames, 1))
        return dataclasses.replace(batch, skipped=list(dict.fromkeys(skipped)))
    finally:
        torch.set_num_threads(threads)


class _Steps(torch.utils.data.Dataset):
    """Batches by step number, for the DataLoader's worker processes."""

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
    """The loader's batches. A dead worker is found when a batch is asked for, within five seconds.

    The handler that the DataLoader sets for SIGCHLD would raise in whatever the main thread is doing just then, in
    the middle of an optimizer step for instance."""
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

    A worker that dies (out of memory, killed) costs a restart of all: `notice` is told, and the batches go on where
    they were. The random state of the calling process is neither used nor changed.

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
            # Otherwise the loader draws its base seed from the global generator.
            generator=torch.Generator(),
        )
        read = _workers(loader)
        while step < stop:
            try:
                batch = next(read)
            except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
                # The last three: what fetching a batch from a worker that has died since meets.
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
