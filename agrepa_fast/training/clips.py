"""The clips of a run: read the manifests, hold a share out, drop unreadable files, make fixed validation batches."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.batches import Batch, collate
from ..data.corpus import write_corpus
from ..data.dataset import ClipDataset, Sample, TokenSource
from ..data.manifest import Clip, read_manifest
from ..data.skipped import Skipped
from ..data.threads import many_objects
from ..data.verdicts import verdict_file
from ..errors import UserError, writing
from .config import RunConfig
from .distributed import gather, rank
from .extracted import stored_tokens
from .identity import Known, by_identity, compare, drop_duplicates, held_out, identify, list_digest, record
from .latents import latent_source, with_latents, without_latents

BUILTIN = "builtin"


@dataclass(frozen=True)
class Split:
    """The clips to train on and the clips to hold out, each sorted by identity.

    duplicates: how many rows repeat others. notes: lines for the user about duplicates and changes.
    """

    train: list[Known]
    valid: list[Known]
    duplicates: int
    notes: tuple[str, ...]

    @property
    def record(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the split: {"train", "valid"}: [n, 3] int64, as `identity.record` makes them."""
        return {"train": record(self.train), "valid": record(self.valid)}


@dataclass(frozen=True)
class RunData:
    """Training and validation sets, the files that cannot be read, and the split."""

    train: ClipDataset
    valid: ClipDataset
    skipped: list[Skipped]
    split: Split

    @property
    def digest(self) -> str:
        """Digest of the clips in use, in their order; the same on all ranks."""
        in_use = [set(self.train.clips), set(self.valid.clips)]
        lists = (self.split.train, self.split.valid)
        return list_digest(*([known for known in part if known.clip in used] for part, used in zip(lists, in_use)))


def read_clips(specs: Sequence[str], run_dir: Path, config: RunConfig) -> list[Clip]:
    """The clips of manifests and folders; "builtin" writes the built-in corpus into the run's folder."""
    clips = []
    for spec in specs:
        if spec == BUILTIN:
            with writing(run_dir / "corpus"):
                spec = str(write_corpus(run_dir / "corpus", seed=config.train.seed))
        clips += read_manifest(spec, allow_outside=config.data.allow_outside)
    return with_latents(clips, config)


def split_clips(
    config: RunConfig,
    run_dir: Path,
    recorded: Mapping[str, Tensor] | None = None,
    accept_changes: bool = False,
) -> Split:
    """Read the manifests, drop duplicates, and hold clips out (by `identity.held_out`, or those of `data.valid`).

    A held-out sound is never trained on. `recorded` is the split of the checkpoint that a run resumes from: a clip that
    it knows, by sound or by path, stays on its side.

    Raises:
        UserError: a manifest that does not fit; or clips that differ from `recorded`, unless accept_changes.
    """
    listed = identify(read_clips(config.data.train, run_dir, config))
    apart = identify(read_clips(config.data.valid, run_dir, config))
    clips, repeated = drop_duplicates(listed)
    apart, repeated_apart = drop_duplicates(apart)
    repeated += repeated_apart
    notes = []
    if repeated:
        again, first = repeated[0]
        notes.append(
            f"{len(repeated)} of {len(clips) + len(apart) + len(repeated)} listed clips are duplicates and dropped: "
            f"{again.clip.source} ({again.clip.path.name}) repeats {first.clip.source}, ..."
        )
    held = {known.identity.sound for known in apart} or held_out(clips, config.data.valid_share)
    if apart:
        both = sum(known.identity.sound in held for known in clips)
        if both:
            notes.append(f"{both} clips of data.train are in data.valid too: they are held out, and not trained on")
        clips = [known for known in clips if known.identity.sound not in held] + apart
    if recorded is not None:
        changes = compare(torch.cat([recorded["train"], recorded["valid"]]), record(clips))
        if changes and not accept_changes:
            raise UserError(
                f"data: the clips are not those that this run has seen: {changes}; give it the same clips, "
                "or go on with these by --accept-data-changes"
            )
        if changes:
            notes.append(f"the clips are not those that the run began with: {changes}; known ones keep their side")
        held = _kept_sides(clips, held, recorded)
    parts: tuple[list[Known], list[Known]] = ([], [])
    for known in by_identity(clips):
        parts[known.identity.sound in held].append(known)
    return Split(*parts, len(repeated), tuple(notes))


def _kept_sides(clips: Sequence[Known], held: set[int], recorded: Mapping[str, Tensor]) -> set[int]:
    """The sounds to hold out: those that `recorded` holds out, and of the new ones those in `held`."""
    sides = [{column: set(part[:, column].tolist()) for column in (0, 2)} for part in recorded.values()]
    train, valid = (dict(zip(recorded, sides))[name] for name in ("train", "valid"))
    kept = set()
    for known in clips:
        sound, place = known.identity.sound, known.identity.place
        for column, value in ((0, sound), (2, place)):
            if value in valid[column] or value in train[column]:
                belongs = value in valid[column]
                break
        else:
            belongs = sound in held
        if belongs:
            kept.add(sound)
    return kept


def load_data(
    config: RunConfig,
    run_dir: Path,
    recorded: Mapping[str, Tensor] | None = None,
    accept_changes: bool = False,
    *,
    with_tokens: bool = True,
) -> RunData:
    """Read, split (`split_clips`) and check the clips. Every rank must call it.

    with_tokens: False leaves out the tokens and latents that data.tokens and data.latents name, which may have to be
        extracted yet.

    Raises:
        UserError: nothing to train on, too many unreadable files, a manifest that does not fit, clips that are not
            the recorded ones, ranks that do not have the same clips.
    """
    with many_objects():
        split = split_clips(config, run_dir, recorded, accept_changes)
        domains = _domains([*split.train, *split.valid])
        skipped: list[Skipped] = []
        tokens = stored_tokens(config) if with_tokens else dict.fromkeys(config.data.tokens, NoTokens(config))
        if not with_tokens:
            config = without_latents(config)
        train = _dataset(split.train, config, domains, skipped, tokens)
        if not split.valid:
            raise UserError("data.train: too few clips to hold any out for validation; give data.valid")
        data = RunData(train, _dataset(split.valid, config, domains, skipped, tokens), skipped, split)
    check_ranks(data)
    return data


def load_held_out(
    config: RunConfig, run_dir: Path, recorded: Mapping[str, Tensor], specs: Sequence[str] = ()
) -> tuple[ClipDataset, list[Skipped]]:
    """The clips that a run holds out, or those of the given manifests; and the files that cannot be read.

    Raises:
        UserError: a manifest that does not fit, too many unreadable files.
    """
    skipped: list[Skipped] = []
    if specs:
        clips, _ = drop_duplicates(identify(read_clips(specs, run_dir, config)))
        return _dataset(clips, config, _domains(clips), skipped, stored_tokens(config)), skipped
    split = split_clips(config, run_dir, recorded, accept_changes=True)
    domains = _domains([*split.train, *split.valid])
    return _dataset(split.valid, config, domains, skipped, stored_tokens(config)), skipped


def _domains(clips: Sequence[Known]) -> tuple[str, ...]:
    return tuple(sorted({known.clip.domain for known in clips}))


class NoTokens:
    """Stands in for tokens that are not extracted yet: an empty sequence for every clip."""

    def __init__(self, config: RunConfig) -> None:
        self.streams = len(next(iter(config.data.vocabularies.values())))

    def read(self, clip: Clip, sound: int | None) -> Tensor:
        return torch.zeros(0, self.streams, dtype=torch.int64)


def _dataset(
    clips: Sequence[Known],
    config: RunConfig,
    domains: tuple[str, ...],
    skipped: list[Skipped],
    tokens: Mapping[str, TokenSource],
) -> ClipDataset:
    """The clips that can be read; the others go to `skipped`."""
    dataset = ClipDataset(
        [known.clip for known in clips],
        config.grid,
        max_frames=config.max_frames,
        vocabularies=config.data.vocabularies,
        vocabulary_of=config.data.vocabulary_of,
        prompt_share=config.data.prompt_share,
        domains=domains,
        sounds={known.clip.path: known.identity.sound for known in clips},
        tokens=tokens,
        latents=latent_source(config),
    )
    memory = verdict_file(clip.path for clip in dataset.clips)
    skipped.extend(dataset.check(config.data.unreadable_share, memory=memory, progress=rank() == 0))
    return dataset


def check_ranks(data: RunData) -> None:
    """Ranks with other clips would train on other batches than the plan says, and end at other steps.

    Raises:
        UserError: on every rank, with the numbers of clips of two ranks that differ.
    """
    facts = gather((data.digest, len(data.train), len(data.valid), len(data.skipped)))
    for number, (digest, train, valid, skipped) in enumerate(facts):
        if digest != facts[0][0]:
            raise UserError(
                f"data: the ranks have different clips: rank 0 {facts[0][1]} to train on, {facts[0][2]} held out and "
                f"{facts[0][3]} unreadable, rank {number} {train}, {valid} and {skipped}; "
                "give every rank the same manifests and files"
            )


def spread(dataset: ClipDataset, count: int) -> list[int]:
    """Indices of up to `count` clips whose sound can be decoded, one domain after the other.

    Raises:
        UserError: there is none.
    """
    queues = [[i for i, clip in enumerate(dataset.clips) if clip.domain == domain] for domain in dataset.domains]
    turns = (queue[place] for place in range(max(map(len, queues))) for queue in queues if place < len(queue))
    indices = list(itertools.islice(filter(dataset.readable, turns), count))
    if not indices and count:
        first = next(iter(dataset.unreadable.values()), "")
        raise UserError(f"data: none of {len(dataset)} clips can be decoded and has its features; the first: {first}")
    return indices


def fixed_batches(
    dataset: ClipDataset, indices: Sequence[int], config: RunConfig, *, one_shape: bool = False
) -> list[Batch]:
    """The given clips in batches that are the same every time: crop and prompt depend on the seed and the clip.

    one_shape: make a single batch, padded to the longest bucket that it needs.
    """
    by_bucket: dict[int, list[Sample]] = defaultdict(list)
    for index in indices:
        sample = dataset.item(index, torch.Generator().manual_seed(config.train.seed * 1_000_003 + index))
        length = sample["mel"].shape[0]
        by_bucket[min(bucket for bucket in config.bucket_frames if bucket >= length)].append(sample)
    if one_shape:
        samples = [sample for bucket in sorted(by_bucket) for sample in by_bucket[bucket]]
        return [collate(samples, max(by_bucket), dataset.domains, dataset.mel_config, sources=dataset.sources)]
    batches = []
    for frames in sorted(by_bucket):
        size = max(1, config.data.frames_per_batch // frames)
        samples = by_bucket[frames]
        batches += [
            collate(samples[i : i + size], frames, dataset.domains, dataset.mel_config, sources=dataset.sources)
            for i in range(0, len(samples), size)
        ]
    return batches
