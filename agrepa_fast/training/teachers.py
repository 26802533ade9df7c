"""The teachers of a configuration: live ones, and cached features that stand in for one."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..errors import UserError
from ..teachers.base import Teacher
from ..teachers.cache import CachedTeacher, FeatureKey
from ..teachers.registry import build_teacher
from .config import RunConfig, TeacherConfig


def build_teachers(config: RunConfig, first: Path, device: torch.device) -> dict[str, Teacher | CachedTeacher]:
    """The teachers of `alignment.teachers` by name; live ones on `device`.

    Args:
        first: a clip of the run. Cached features are looked for beside it.

    Raises:
        UserError: a teacher cannot be built, or its cached features are missing, were made by another teacher or
            with other options, or are pooled where frames are aligned.
    """
    return {
        name: _cached(name, teacher, config, first)
        if teacher.cached
        else build_teacher(teacher.source, **teacher.options).to(device)
        for name, teacher in config.alignment.teachers.items()
    }


def _cached(name: str, teacher: TeacherConfig, config: RunConfig, first: Path) -> CachedTeacher:
    """The features that this teacher, with exactly these options, has left beside the clips."""
    options = dict(teacher.options)
    revision, layer = str(options.pop("revision", "")), str(options.pop("layer", ""))
    preprocessing = json.dumps(options, sort_keys=True) if options else ""
    cached = CachedTeacher(name, FeatureKey(teacher.source, revision, layer, preprocessing), first)
    if config.alignment.pool is None and not cached.rate:
        raise UserError(f"alignment.teachers.{name}: its cached features are pooled; alignment.pool=null needs frames")
    return cached
