"""A run's clips: manifests read, a share held out, unreadable files set aside, fixed validation batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data.batches import Batch, collate
from ..data.corpus import write_corpus
from ..data.dataset import ClipDataset, Sample, Skipped
from ..data.manifest import Clip, read_manifest
from ..errors import UserError
from .config import RunConfig

BUILTIN = "builtin"


@dataclass(frozen=True)
class RunData:
    """Training and validation sets, and the files that could not be read."""

    train: ClipDataset
    valid: ClipDataset
    skipped: list[Skipped]


def read_clips(specs: Sequence[str], run_dir: Path, config: RunConfig) -> list[Clip]:
    """The clips of manifests and folders; "builtin" writes the built-in corpus into the run's folder."""
    clips = []
    for spec in specs:
        if spec == BUILTIN:
            spec = str(write_corpus(run_dir / "corpus", seed=config.train.seed))
        clips += read_manifest(spec, allow_outside=config.data.allow_outside)
    return clips


def load_data(config: RunConfig, run_dir: Path) -> RunData:
    """Read, split and check the clips.

    The split depends on the seed and the list alone, so that a resumed run has the same one.

    Raises:
        UserError: nothing to train on, too many unreadable files, a manifest that does not fit.
    """
    train = read_clips(config.data.train, run_dir, config)
    if config.data.valid:
        valid = read_clips(config.data.valid, run_dir, config)
    else:
        train, valid = hold_out(train, config.data.valid_share, config.train.seed)
    domains = tuple(sorted({clip.domain for clip in train + valid}))
    skipped: list[Skipped] = []

    def read(clips: list[Clip]) -> ClipDataset:
        dataset = ClipDataset(
            clips,
            config.mel,
            max_frames=config.max_frames,
            vocabularies=config.data.vocabularies,
            vocabulary_of=config.data.vocabulary_of,
            prompt_fraction=config.data.prompt_share,
            domains=domains,
        )
        skipped.extend(dataset.check(config.data.unreadable_share))
        return dataset

    train_set = read(train)
    if not valid:
        raise UserError("data.train: too few clips to hold any out for validation; give data.valid")
    return RunData(train_set, read(valid), skipped)


def hold_out(clips: Sequence[Clip], share: float, seed: int) -> tuple[list[Clip], list[Clip]]:
    """Split off `share` of each domain's clips, at least one where there are two; (rest, held out)."""
    by_domain = defaultdict(list)
    for index, clip in enumerate(clips):
        by_domain[clip.domain].append(index)
    held: set[int] = set()
    for number, domain in enumerate(sorted(by_domain)):
        members = by_domain[domain]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        order = np.random.default_rng([seed, number]).permutation(len(members))
        held |= {members[i] for i in order[:count]}
    return (
        [clip for i, clip in enumerate(clips) if i not in held],
        [clip for i, clip in enumerate(clips) if i in held],
    )


def spread(dataset: ClipDataset, count: int) -> list[int]:
    """Indices of up to `count` clips, taken from the domains in turn."""
    queues = [[i for i, clip in enumerate(dataset.clips) if clip.domain == domain] for domain in dataset.domains]
    turns = [queue[place] for place in range(max(map(len, queues))) for queue in queues if place < len(queue)]
    return turns[:count]


def fixed_batches(
    dataset: ClipDataset, indices: Sequence[int], config: RunConfig, *, one_shape: bool = False
) -> list[Batch]:
    """The given clips in batches that are the same every time: crop and prompt come from the seed and the clip.

    one_shape: a single batch, padded to the longest bucket it needs."""
    by_bucket: dict[int, list[Sample]] = defaultdict(list)
    for index in indices:
        sample = dataset.item(index, torch.Generator().manual_seed(config.train.seed * 1_000_003 + index))
        length = sample["mel"].shape[0]
        by_bucket[min(bucket for bucket in config.bucket_frames if bucket >= length)].append(sample)
    if one_shape:
        samples = [sample for bucket in sorted(by_bucket) for sample in by_bucket[bucket]]
        return [collate(samples, max(by_bucket), dataset.domains, dataset.mel_config)]
    batches = []
    for frames in sorted(by_bucket):
        size = max(1, config.data.frames_per_batch // frames)
        samples = by_bucket[frames]
        batches += [
            collate(samples[i : i + size], frames, dataset.domains, dataset.mel_config)
            for i in range(0, len(samples), size)
        ]
    return batches
