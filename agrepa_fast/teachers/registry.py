"""Teachers by name: the built-in ones, registered ones, and folders or hub names of transformers models."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .base import LayeredTeacher, Teacher


def _spectral() -> Teacher:
    from .spectral import SpectralTeacher

    return SpectralTeacher()


# Sources of a run's configuration that are the network itself: no teacher of audio may take their names.
SELF_SOURCES = ("layersync", "self-flow")

_FACTORIES: dict[str, Callable[..., Teacher]] = {"spectral": _spectral}


def register_teacher(name: str, factory: Callable[..., Teacher]) -> None:
    """Make `build_teacher(name, **options)` call `factory(**options)`.

    Raises:
        ValueError: the name is taken, empty, or could be read as a path or a hub model (it holds a slash).
    """
    if not name or "/" in name or os.sep in name:
        raise ValueError(f"a teacher's name is one word without slashes, got {name!r}")
    if name in _FACTORIES or name in SELF_SOURCES:
        raise ValueError(f"a teacher named {name!r} is registered already")
    _FACTORIES[name] = factory


def is_registered(name: str) -> bool:
    """Whether `register_teacher` has been called with this name, or it is built in."""
    return name in _FACTORIES


def check_source(name: str) -> None:
    """Refuse a name that `build_teacher` cannot know: not registered, no folder, no file, and no name on the hub.

    Raises:
        UserError: names the nearest teacher."""
    path = Path(name).expanduser()
    if not (is_registered(name) or path.suffix == ".pt" or path.is_dir() or _is_hub_name(name)):
        raise UserError(_unknown(name))


def build_teacher(name_or_path: str | Path, **options: Any) -> Teacher:
    """Build a frozen teacher.

    Args:
        name_or_path: a registered name ("spectral", or yours), the folder of a transformers model, the name of
            one on the hub ("openai/whisper-large-v3"), or a BEATs checkpoint (.pt). A registered name wins over a
            folder of that name.
        options: handed to the teacher; for transformers models `layer`, `revision` and `dtype`.

    Raises:
        UserError: unknown name, no such folder, an option the teacher does not take, unusable weights.
    """
    name = str(name_or_path)
    check_source(name)
    factory = _FACTORIES.get(name)
    if factory is None:
        path = Path(name).expanduser()
        if path.suffix == ".pt":
            from .beats import BeatsTeacher

            factory = BeatsTeacher
        else:
            from .encoders import TransformersTeacher

            factory = TransformersTeacher
        options = {"model": str(path) if path.exists() else name, **options}
    _check_options(name, factory, options)
    return factory(**options).freeze()


def build_teachers(wanted: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, Teacher]:
    """Teachers by name from {name: (source, options)}. Those that differ in `layer` alone share one encoder.

    Raises:
        UserError: as `build_teacher`.
    """
    teachers: dict[str, Teacher] = {}
    shared: dict[str, Teacher] = {}
    for name, (source, options) in wanted.items():
        rest = {option: value for option, value in options.items() if option != "layer"}
        one = shared.get(same := repr((source, sorted(rest.items()))))
        if one is not None and isinstance(one, LayeredTeacher):
            teachers[name] = one.at_layer(options.get("layer"))
        else:
            teachers[name] = shared[same] = build_teacher(source, **options)
    return teachers


def _is_hub_name(name: str) -> bool:
    owner, slash, model = name.partition("/")
    return bool(owner and slash and model) and "/" not in model and owner not in (".", "..", "~")


def _unknown(name: str) -> str:
    if "/" in name or os.sep in name:
        return f"teacher {name!r}: no such folder; give the folder that holds config.json and model.safetensors"
    if name in SELF_SOURCES:
        return f"teacher {name!r}: it is the network that is trained, and hears no audio: choose another one"
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
