"""`Aligner` in other people's trainers: `hf` (transformers) and `lightning`. Plain loops need nothing of it."""

from __future__ import annotations

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """`integrations.hf` and `integrations.lightning`, imported when they are first used."""
    if name in ("hf", "lightning"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
