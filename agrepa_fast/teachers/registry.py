"""Teachers by name: the built-in ones, registered ones, and folders or hub names of transformers models."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from .base import Teacher


def _spectral() -> Teacher:
    from .spectral import SpectralTeacher

    return SpectralTeacher()


_FACTORIES: dict[str, Callable[..., Teacher]] = {"spectral": _spectral}


def register_teacher(name: str, factory: Callable[..., Teacher]) -> None:
    """Make `build_teacher(name, **options)` call `factory(**options)`.

    Raises:
        ValueError: the name is taken, empty, or could be read as a path or a hub model (it holds a slash).
    """
    if not name or "/" in name or os.sep in name:
        raise ValueError(f"a teacher's name is one word without slashes, got {name!r}")
    if name in _FACTORIES:
        raise ValueError(f"a teacher named {name!r} is registered already")
    _FACTORIES[name] = factory


def build_teacher(name_or_path: str | Path, **options: Any) -> Teacher:
    """Build a frozen teacher.

    Args:
        name_or_path: a registered name ("spectral", or yours), the folder of a transformers model, or the
            name of one on the hub ("openai/whisper-large-v3"). A registered name wins over a folder of that
            name.
        options: handed to the teacher; for transformers models `layer`, `revision` and `dtype`.

    Raises:
        UserError: unknown name, no such folder, an option the teacher does not take, unusable weights.
    """
    name = str(name_or_path)
    factory = _FACTORIES.get(name)
    if factory is None:
        folder = Path(name).expanduser()
        if not folder.is_dir() and not _is_hub_name(name):
            raise UserError(_unknown(name))
        from .encoders import TransformersTeacher

        factory = TransformersTeacher
        options = {"model": str(folder) if folder.is_dir() else name, **options}
    _check_options(name, factory, options)
    return factory(**options).freeze()


def _is_hub_name(name: str) -> bool:
    owner, slash, model = name.partition("/")
    return bool(owner and slash and model) and "/" not in model and owner not in (".", "..", "~")


def _unknown(name: str) -> str:
    if "/" in name or os.sep in name:
        return f"teacher {name!r}: no such folder; give the folder that holds config.json and model.safetensors"
    near = difflib.get_close_matches(name, _FACTORIES, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"unknown teacher {name!r}: {guess}registered are {', '.join(sorted(_FACTORIES))}; "
        "for a transformers model give its folder or its hub name (owner/name)"
    )


def _check_options(name: str, factory: Callable[..., Teacher], options: dict[str, Any]) -> None:
    # Options come from the user's configuration: a wrong one is a line to read, not a TypeError.
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise UserError(f"teacher {name!r}: {error}") from error
