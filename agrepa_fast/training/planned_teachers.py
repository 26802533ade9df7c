"""Widths, frame rates and weights of a run's teachers, as far as possible without reading their weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..teachers.encoders import without_weights
from ..teachers.registry import build_teacher, is_registered
from ..teachers.shards import read_info, store_name
from .config import RunConfig, TeacherConfig
from .extracted import feature_key, features_root

# Names of published models: width and frames per second.
PUBLISHED = {
    r"whisper-tiny": (384, 50.0),
    r"whisper-base": (512, 50.0),
    r"whisper-small": (768, 50.0),
    r"whisper-medium": (1024, 50.0),
    r"whisper-large": (1280, 50.0),
    r"(hubert|wavlm|wav2vec2)-base": (768, 50.0),
    r"(hubert|wavlm|wav2vec2)-large": (1024, 50.0),
    r"mert-v1-95m": (768, 75.0),
    r"beats.*\.pt": (768, 6.25),
}


@dataclass(frozen=True)
class PlannedTeacher:
    """What a plan needs of a teacher. parameters: None where they are not known."""

    width: int
    rate: float
    parameters: int | None
    bytes: int | None  # of the weights on the device


def plan_teachers(config: RunConfig, *, elsewhere: bool) -> dict[str, PlannedTeacher]:
    """Each teacher of a run by its name, without those that are the network itself.

    elsewhere: the run is planned for another machine, so that a teacher that is not here is looked up in `PUBLISHED`.

    Raises:
        UserError: a teacher is unknown, or cannot be built from what is here.
    """
    planned = {}
    for name, teacher in config.alignment.teachers.items():
        if teacher.own is not None:
            continue  # the network itself
        try:
            planned[name] = _extracted(teacher, config) or _plan(teacher, elsewhere)
        except UserError as error:
            raise UserError(f"alignment.teachers.{name}: {error}") from error
    return planned


def _extracted(teacher: TeacherConfig, config: RunConfig) -> PlannedTeacher | None:
    """From the store of its frames; None where there is no such store, or the teacher is to run live."""
    folder = features_root(config) / store_name(feature_key(teacher), config.mel.sample_rate, pooled=False)
    if not teacher.cached or not (folder / "store.json").exists():
        return None
    info = read_info(folder)
    return PlannedTeacher(info.width, info.key.rate, None, None)


def _plan(config: TeacherConfig, elsewhere: bool) -> PlannedTeacher:
    source = config.source
    path = Path(source).expanduser()
    if not is_registered(source) and not path.exists():
        for pattern, (width, rate) in PUBLISHED.items():
            if re.search(pattern, source.lower()):
                if not elsewhere and path.suffix == ".pt":
                    break
                return PlannedTeacher(width, rate, None, None)
        if elsewhere:
            raise UserError(
                f"{source!r} is neither here nor a published model whose size is known: give a folder with its "
                "config.json"
            )
    folder = path.is_dir() and (path / "config.json").is_file()
    teacher = without_weights(path, **config.options) if folder else build_teacher(source, **config.options)
    weights = list(teacher.encoder.parameters())
    size = sum(p.numel() * p.element_size() for p in weights)
    return PlannedTeacher(teacher.width, float(teacher.rate), sum(p.numel() for p in weights), size)
