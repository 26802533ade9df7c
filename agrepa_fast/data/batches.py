"""Samples to fixed-shape batches: mel [B, T, M], mask and prompt [B, T], tokens [B, S, K], audio [B, n].

T is one of a few bucket lengths. Batch number `step` depends only on (seed, step), so a run resumes exactly from its
step number, with any number of worker processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .buckets import BucketBatches
from .dataset import ClipDataset, Sample
from .features import FeatureBatch, FeatureSource, collate_features
from .latents import LatentGrid
from .manifest import Clip
from .mel import MelConfig
from .skipped import Skipped

TOKEN_MULTIPLE = 16


@dataclass
class Batch:
    """One batch of B samples. T is the bucket's length in frames, n = mel_config.samples(T)."""

    mel: Tensor  # [B, T, M] float32, zero where not mask: mels, or normalised latents
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
    features: dict[str, FeatureBatch] = dataclasses.field(default_factory=dict)  # {teacher: extracted features}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for asynchronous copies. Needs a CUDA device."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: Batch = _mapped(self, change)
        features = {name: _mapped(features, change) for name, features in self.features.items()}
        return dataclasses.replace(changed, features=features)


def _mapped(holder: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass with its tensors changed."""
    values = {field.name: getattr(holder, field.name) for field in dataclasses.fields(holder)}
    changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(holder, **changed)


def collate(
    samples: Sequence[Sample],
    frames: int,
    domains: tuple[str, ...],
    mel_config: MelConfig | LatentGrid,
    tokens_at_least: int = 1,
    sources: Mapping[str, FeatureSource] | None = None,
) -> Batch:
    """Pad samples to `frames` frames, and their tokens to the longest, rounded up to a multiple of 16.

    sources: where the samples' features come from, by teacher.

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
        features={
            name: collate_features(
                [sample["features"][name] for sample in samples],
                source,
                mel_config.samples(frames) / mel_config.sample_rate,
            )
            for name, source in (sources or {}).items()
        },
    )


def _candidates(batches: BucketBatches, step: int, place: int) -> Iterator[int]:
    """The clip at a place of a batch, then those that may replace it, in order."""
    _, indices = batches.batch(step)
    yield from (*indices[place:], *indices[:place])
    others = batches.stand_ins(step)
    turn = place % max(1, len(others))
    yield from (*others[turn:], *others[:turn])


def load_batch(dataset: ClipDataset, batches: BucketBatches, step: int, seed: int) -> Batch:
    """Batch number `step`. Crop and prompt of a clip depend on (seed, step, index) alone.

    A clip that cannot be read is replaced by the next one of the batch, or if none of the batch can be read by another
    one of its bucket (`BucketBatches.stand_ins`). `Batch.skipped` names it.

    Raises:
        UserError: none of these can be read.
    """
    frames, indices = batches.batch(step)
    threads = torch.get_num_threads()
    # One thread, as in a worker process, so that sums have the same bits wherever this runs.
    torch.set_num_threads(1)
    try:
        samples: list[Sample] = []
        skipped: list[Skipped] = []
        for place, index in enumerate(indices):
            state = np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)
            for other in _candidates(batches, step, place):
                generator = torch.Generator().manual_seed(int(state[0]) >> 1)
                try:
                    samples.append(dataset.item(other, generator))
                    break
                except UserError as error:
                    clip = dataset.clips[other]
                    skipped.append(Skipped(clip.path, clip.source, str(error).removeprefix(f"{clip.path}: ")))
            else:
                raise UserError(f"batch {step}: none of its clips can be read; the first: {skipped[0].reason}")
        tokens = batches.tokens.get(frames, 1)
        batch = collate(samples, frames, dataset.domains, dataset.mel_config, tokens, dataset.sources)
        return dataclasses.replace(batch, skipped=list(dict.fromkeys(skipped)))
    finally:
        torch.set_num_threads(threads)
