"""The teachers of a configuration: live ones, and extracted features that stand in for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..data.dataset import ClipDataset
from ..data.features import FeatureSource
from ..data.skipped import Skipped, check_share
from ..errors import UserError
from ..teachers.base import Teacher
from ..teachers.cache import FilesBesideAudio, feature_path
from ..teachers.registry import build_teachers as build_live
from ..teachers.shards import store_name
from ..teachers.store import StoredFeatures
from .config import RunConfig, TeacherConfig
from .extracted import feature_key, features_root, open_named_store
from .identity import colliding


def build_teachers(
    config: RunConfig, datasets: Sequence[ClipDataset], device: torch.device
) -> tuple[dict[str, Teacher | FeatureSource], list[Skipped]]:
    """The teachers of `alignment.teachers` by name, live ones on `device`; and the clips that are left out.

    Teachers that are the network itself (`self_targets`) are left out: they hear nothing.

    Extracted features are read with the samples of the datasets from now on. A clip whose features a store lacks is
    left out like one whose sound cannot be read.

    Raises:
        UserError: a teacher cannot be built, or its features are missing, were made by another teacher or with other
            options, or are pooled where frames are aligned; or more clips lack them than data.unreadable_share.
    """
    wanted = {name: teacher for name, teacher in config.alignment.teachers.items() if teacher.own is None}
    first = datasets[0].clips[0].path
    sources = {name: _extracted(name, teacher, config, first) for name, teacher in wanted.items() if teacher.cached}
    live = build_live({name: (t.source, t.options) for name, t in wanted.items() if not t.cached})
    skipped: list[Skipped] = []
    for dataset in datasets:
        skipped += _without_features(dataset, sources, config.data.unreadable_share)
        dataset.sources = dict(sources)
    teachers: dict[str, Teacher | FeatureSource] = {}
    for name in wanted:
        teachers[name] = sources[name] if name in sources else live[name].to(device)
    return teachers, skipped


def _without_features(dataset: ClipDataset, sources: Mapping[str, FeatureSource], share: float) -> list[Skipped]:
    stores = {name: source for name, source in sources.items() if isinstance(source, StoredFeatures)}
    if not stores:
        return []
    reasons = {path: alike(path, first) for path, first in colliding(dataset.clips, dataset.sounds).items()}
    for name, source in stores.items():
        for clip in dataset.clips:
            sound = dataset.sounds[clip.path]
            if source.speaks_for(clip) and sound not in source.store:
                reasons[clip.path] = f"no features of teacher {name!r}: {source.store.missing(sound)}"
    total = len(dataset)
    skipped = dataset.drop({clip: reasons[clip.path] for clip in dataset.clips if clip.path in reasons})
    if skipped:
        check_share(skipped, total, share, "have no features")
    return skipped


def alike(path: Path, first: Path) -> str:
    """Why the features of a file that `identity.colliding` found would not be its own."""
    return f"its beginning, middle and end are those of {first}, whose sound differs: its features cannot be told apart"


def _extracted(name: str, teacher: TeacherConfig, config: RunConfig, first: Path) -> FeatureSource:
    """The features that this teacher, with exactly these options, has left in a store or beside the clips."""
    place = f"alignment.teachers.{name}"
    key = feature_key(teacher)
    root = features_root(config)
    stores = [root / store_name(key, config.mel.sample_rate, pooled=pooled) for pooled in (False, True)]
    existing = [folder for folder in stores if (folder / "store.json").exists()]
    if config.alignment.pool is None and existing == stores[1:]:
        raise UserError(f"{place}: its cached features are pooled; alignment.pool=null needs frames")
    if existing:
        return StoredFeatures(open_named_store(existing[0], teacher.source, place), teacher.domains)
    if not feature_path(first, name).exists():
        raise UserError(f"{place}: no features in {stores[0]}: run agrepa extract CONFIG --teacher {name}")
    beside = FilesBesideAudio(name, key, first, teacher.domains)
    if config.alignment.pool is None and not beside.rate:
        raise UserError(f"{place}: its cached features are pooled; alignment.pool=null needs frames")
    return beside
