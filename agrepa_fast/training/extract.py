"""Extract the features of a run's clips into stores, under the keys by which the run finds them again.

A store's plan says which clips go into which shard (`teachers.shards`). Each shard is computed whole, always from the
same batches, and appears under its name when it is done: an extraction that was killed goes on with the shards that
are missing, and ends with the bytes of one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..data.audio import read_audio
from ..data.clip import Clip
from ..data.skipped import Skipped, check_share
from ..errors import UserError, writing
from ..imports import import_module
from ..teachers.base import Teacher
from ..teachers.cache import FeatureKey
from ..teachers.passes import encode_clips
from ..teachers.registry import build_teachers
from ..teachers.shards import (
    DTYPES,
    Encoded,
    StoreInfo,
    create_store,
    encode,
    make_plan,
    publish_plan,
    sweep,
    write_shard,
)
from ..teachers.store import Store
from ..teachers.tokenizers import build_tokenizer, split_source
from .clips import load_data
from .config import RunConfig
from .environment import pick_device
from .extracted import feature_key, features_root, token_key, weights_digest
from .identity import colliding
from .teachers import alike

BATCH_SECONDS = 240.0  # of sound in one pass of a teacher, padding included
BATCH_CLIPS = 32
READERS = 4  # threads that decode the next batch while the teacher works


@dataclass(frozen=True)
class Filled:
    """What a store has of the run's clips."""

    folder: Path
    clips: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class _Sound:
    """One sound of the run: a clip that has it, and its samples at the rate of the mels."""

    clip: Clip
    samples: int


@dataclass
class _Target:
    """A store to fill: with what, and which shards of its plans are missing."""

    teacher: Teacher
    folder: Path
    info: StoreInfo
    sounds: dict[int, _Sound]
    missing: dict[str, list[int]] = field(default_factory=dict)


class Extraction:
    """The extraction of some teachers' features of a run's clips.

    Args:
        names: teachers of the run. tokenizers: "s3", "beats", as data.tokens has them. part: (i, n), this process's
            shards: those whose number is i modulo n. int8: store int8 with a scale for each frame, else float32.
            pool: store the mean of each clip's frames. verify: read the shards that are there whole, and extract those
            again whose checksum does not fit.

    Raises:
        UserError: an unknown teacher, a store that was made another way, clips that do not fit the configuration.
    """

    def __init__(
        self,
        config: RunConfig,
        names: Sequence[str],
        tokenizers: Sequence[str] = (),
        *,
        part: tuple[int, int] = (0, 1),
        int8: bool = False,
        pool: bool = False,
        verify: bool = False,
    ) -> None:
        wanted = config.alignment.teachers
        for name in names:
            if name not in wanted:
                raise UserError(f"--teacher {name}: the configuration has {', '.join(wanted)} (alignment.teachers)")
            if wanted[name].own is not None:
                raise UserError(
                    f"--teacher {name}: its source {wanted[name].source} is the network itself, whose states change in "
                    "each step: there is nothing to extract"
                )
        self.config, self.part, self.pool = config, part, pool
        self.verify = verify
        self.device = pick_device(config.train.device)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        for module in config.train.imports:
            import_module(module, "train.imports")
        self.sounds, self.skipped = run_sounds(config)
        self._paths = {sound.clip.path for sound in self.sounds.values()}
        self.broken: list[str] = []  # shards and plans that cannot be read
        self.pending = 0  # shards that are left to other processes
        chosen = {name: wanted[name] for name in names}
        teachers = build_teachers({name: (teacher.source, teacher.options) for name, teacher in chosen.items()})
        self.targets: dict[str, _Target] = {}
        for name, teacher in teachers.items():
            key = feature_key(chosen[name], 0.0 if pool else float(teacher.rate))
            dtype = "int8" if int8 else "float32"
            self.targets[name] = self._target(teacher, key, dtype, chosen[name].source, chosen[name].domains)
        for name in tokenizers:
            # The domains of each file with this tokenizer.
            files: dict[str, list[str]] = {}
            for domain, source in config.data.tokens.items():
                if split_source(source)[0] == name:
                    files.setdefault(source, []).append(domain)
            if not files:
                raise UserError(f"--tokens {name}: data.tokens has no {name}:FILE for any domain")
            for source, domains in files.items():
                tokenizer = build_tokenizer(source)
                key = token_key(source, float(tokenizer.rate))
                self.targets[source] = self._target(tokenizer, key, "int32", split_source(source)[1], domains)

    def _target(self, teacher: Teacher, key: FeatureKey, dtype: str, source: str, domains: Sequence[str]) -> _Target:
        teacher = teacher.to(self.device)
        info = StoreInfo(key, self.config.mel.sample_rate, weights_digest(source), dtype, teacher.width)
        sounds = {digest: s for digest, s in self.sounds.items() if not domains or s.clip.domain in domains}
        if not sounds:
            raise UserError(f"{key.teacher}: no clip is of its domains ({', '.join(domains)})")
        target = _Target(teacher, create_store(features_root(self.config), info), info, sounds)
        self._plan(target)
        return target

    def _plan(self, target: _Target) -> None:
        """Find the missing shards; publish a plan for clips that no plan has."""
        sweep(target.folder)
        store = Store(target.folder, verify=self.verify)
        self.broken += store.broken.values()
        plans = store.plans
        planned: set[int] = set()
        for plan in plans:
            for shard, clips in plan.shards():
                # A shard is left to its plan if it is there, or if this run has all that is needed to make it.
                if shard in store.complete or all(digest in target.sounds for digest in clips):
                    planned.update(clips)
        frame = target.info.width * DTYPES[target.info.dtype].itemsize + 4 * (target.info.dtype == "int8")
        new = {}
        for digest, sound in target.sounds.items():
            if digest not in planned and digest not in store:
                seconds = sound.samples / self.config.mel.sample_rate
                new[digest] = frame * max(1, math.ceil(seconds * target.info.key.rate))
        if new:
            plans = [*plans, make_plan(new)]
            publish_plan(target.folder, plans[-1])
        index, count = self.part
        for plan in plans:
            for number, (shard, clips) in enumerate(plan.shards()):
                if shard in store.complete or not all(digest in target.sounds for digest in clips):
                    continue
                if number % count == index:
                    target.missing[shard] = clips
                else:
                    self.pending += 1

    @property
    def seconds(self) -> float:
        """Of sound that is yet to be extracted by this process."""
        samples = 0
        for shard, names in self._jobs().items():
            target = self.targets[names[0]]
            samples += sum(target.sounds[digest].samples for digest in target.missing[shard])
        return samples / self.config.mel.sample_rate

    def _jobs(self) -> dict[str, list[str]]:
        """{missing shard: names}. Teachers with the same plan read the sound of a shard once."""
        jobs: dict[str, list[str]] = {}
        for name, target in self.targets.items():
            for shard in target.missing:
                jobs.setdefault(shard, []).append(name)
        return jobs

    def run(self, progress: Callable[[float], object] = lambda seconds: None) -> dict[str, Filled]:
        """Extract what is missing, and return what each store has of the run's clips then.

        progress: is told the seconds of each batch. Clips without features are in `skipped` afterwards.

        Raises:
            UserError: more clips have no features than data.unreadable_share, or a shard cannot be written.
        """
        for shard, names in self._jobs().items():
            self._shard(shard, names, progress)
            self._check_share()
        filled = {}
        for name, target in self.targets.items():
            store = Store(target.folder)
            self._skip(name, {digest: reason for digest, reason in store.skipped.items() if digest in target.sounds})
            sounds = [sound for digest, sound in target.sounds.items() if digest in store]
            seconds = sum(sound.samples for sound in sounds) / self.config.mel.sample_rate
            size = sum(path.stat().st_size for path in target.folder.glob("*.safetensors"))
            filled[name] = Filled(target.folder, len(sounds), seconds, size)
        self._check_share()
        return filled

    def _skip(self, name: str, reasons: Mapping[int, str]) -> None:
        for digest, reason in reasons.items():
            clip = self.targets[name].sounds[digest].clip
            item = Skipped(clip.path, clip.source, reason)
            if item not in self.skipped:
                self.skipped.append(item)

    def _check_share(self) -> None:
        skipped = list({item.path: item for item in self.skipped}.values())
        if skipped:
            total = len({item.path for item in skipped} | self._paths)
            check_share(skipped, total, self.config.data.unreadable_share, "have no features")

    def _shard(self, shard: str, names: Sequence[str], progress: Callable[[float], object]) -> None:
        clips = self.targets[names[0]].missing[shard]
        sounds = self.targets[names[0]].sounds
        rows: dict[str, dict[int, Encoded]] = {name: {} for name in names}
        skipped: dict[str, dict[int, str]] = {name: {} for name in names}
        for batch, waveforms in self._read(clips, sounds):
            heard = {digest: wave for digest, wave in zip(batch, waveforms) if isinstance(wave, Tensor)}
            for digest, wave in zip(batch, waveforms):
                if not isinstance(wave, Tensor):
                    reason = str(wave).removeprefix(f"{sounds[digest].clip.path}: ")
                    for name in names:
                        skipped[name][digest] = reason
            for name, found in self._encode(names, list(heard.values())).items():
                for digest, row in zip(heard, found, strict=True):
                    if isinstance(row, str):
                        skipped[name][digest] = row
                    else:
                        rows[name][digest] = encode(self.targets[name].info, row)
            progress(sum(sounds[digest].samples for digest in batch) / self.config.mel.sample_rate)
        for name in names:
            kept = [digest for digest in clips if digest in rows[name]]
            target = self.targets[name]
            write_shard(target.folder / shard, target.info, kept, [rows[name][d] for d in kept], skipped[name])
            self._skip(name, skipped[name])

    def _read(
        self, clips: Sequence[int], sounds: Mapping[int, _Sound]
    ) -> Iterator[tuple[list[int], list[Tensor | UserError]]]:
        """Batches of clips of like length with their waveforms, read ahead by threads."""
        config = self.config.mel

        def read(digest: int) -> Tensor | UserError:
            try:
                clip = sounds[digest].clip
                return read_audio(clip.path, config.sample_rate, minimum_samples=config.minimum_samples, pack=clip.pack)
            except UserError as error:
                return error.with_traceback(None)

        batches = _batches(clips, {digest: sounds[digest].samples / config.sample_rate for digest in clips})
        with ThreadPoolExecutor(READERS) as pool:
            ahead: list[Future[Tensor | UserError]] = []
            for number, batch in enumerate(batches):
                now = ahead or [pool.submit(read, digest) for digest in batch]
                following = batches[number + 1] if number + 1 < len(batches) else []
                ahead = [pool.submit(read, digest) for digest in following]
                yield batch, [future.result() for future in now]

    def _encode(self, names: Sequence[str], clips: list[Tensor]) -> dict[str, list[Tensor | str]]:
        """For each teacher the features [frames, W] of each clip, or the reason why it has none."""
        kin: dict[int, dict[str, Teacher]] = {}
        for name in names:
            teacher = self.targets[name].teacher
            kin.setdefault(id(teacher.encoder), {})[name] = teacher
        found = {}
        for teachers in kin.values() if clips else ():
            for name, rows in self._try(teachers, clips).items():
                found[name] = [row if isinstance(row, str) else self._whole(row) for row in rows]
        return found

    def _try(self, teachers: dict[str, Teacher], clips: list[Tensor]) -> Mapping[str, Sequence[Tensor | str]]:
        try:
            return encode_clips(teachers, clips, self.config.mel.sample_rate, self.device)
        except UserError as error:
            if len(clips) == 1:
                return {name: [str(error)] for name in teachers}
            # One of the clips is at fault.
            each = [self._try(teachers, [clip]) for clip in clips]
            return {name: [row for rows in each for row in rows[name]] for name in teachers}

    def _whole(self, row: Tensor) -> Tensor | str:
        """Features as they are stored, pooled where that is asked for."""
        if self.pool:
            row = row.mean(0, keepdim=True) if len(row) else row.new_zeros(1, row.shape[1])
        return row if bool(row.isfinite().all()) else "its features are not finite"


def run_sounds(config: RunConfig) -> tuple[dict[int, _Sound], list[Skipped]]:
    """The sounds of a run's clips by digest, in training or held out, and the clips that cannot be read.

    Raises:
        UserError: as `load_data`.
    """
    run_dir = Path(config.train.out) / config.train.name
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    data = load_data(config, run_dir, with_tokens=False)
    skipped = list(data.skipped)
    sounds: dict[int, _Sound] = {}
    clips = [*data.train.clips, *data.valid.clips]
    same = colliding(clips, {**data.train.sounds, **data.valid.sounds})
    for dataset in (data.train, data.valid):
        for clip in dataset.clips:
            if clip.path in same:
                skipped.append(Skipped(clip.path, clip.source, alike(clip.path, same[clip.path])))
            else:
                sounds.setdefault(dataset.sounds[clip.path], _Sound(clip, dataset.samples_of(clip)))
    return sounds, skipped


def _batches(clips: Sequence[int], seconds: Mapping[int, float]) -> list[list[int]]:
    """Clips of like length together; at most BATCH_CLIPS and, padded, BATCH_SECONDS in a batch."""
    batches: list[list[int]] = []
    for digest in sorted(clips, key=lambda digest: (seconds[digest], digest)):
        last = batches[-1] if batches else []
        # The clips come by length: this one is the longest so far.
        if last and len(last) < BATCH_CLIPS and (len(last) + 1) * seconds[digest] <= BATCH_SECONDS:
            last.append(digest)
        else:
            batches.append([digest])
    return batches
