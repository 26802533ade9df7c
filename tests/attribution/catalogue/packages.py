"""Classes of packages that are installed without what their trainers and apps import."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
import typing
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from torch import nn


def folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is missing: make test installs it"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


@functools.cache
def f5_tts(file: str, name: str) -> type[nn.Module]:
    """A backbone of f5-tts; `f5_tts.model` would import its trainer, and librosa for a mel of its own."""
    package = types.ModuleType("f5_tts.model")
    package.__path__ = [str(folder("f5_tts") / "model")]
    stand_ins = {"f5_tts.model": package, "librosa": MagicMock(), "librosa.filters": MagicMock()}
    with pytest.MonkeyPatch.context() as patch:
        for module_name, module in stand_ins.items():
            patch.setitem(sys.modules, module_name, module)
        return getattr(importlib.import_module(f"f5_tts.model.backbones.{file}"), name)


def voicebox_stand_ins() -> dict[str, types.ModuleType]:
    """What voicebox-pytorch imports and its network does not need: codecs, samplers and run-time type checks."""
    missing = "torchode torchdiffeq audiolm_pytorch spear_tts_pytorch gateloop_transformer vocos naturalspeech2_pytorch"
    parts = "aligner utils utils.tokenizer naturalspeech2_pytorch"
    names = [*missing.split(), *(f"naturalspeech2_pytorch.{part}" for part in parts.split()), "beartype.door"]
    beartype = types.ModuleType("beartype")
    beartype.beartype = lambda function: function  # type: ignore[attr-defined]
    return {**{name: MagicMock() for name in names}, "beartype": beartype, "beartype.typing": typing}


@functools.cache
def voicebox(name: str) -> type[nn.Module]:
    """A class of voicebox-pytorch."""
    with pytest.MonkeyPatch.context() as patch:
        for module_name, module in voicebox_stand_ins().items():
            patch.setitem(sys.modules, module_name, module)
        return getattr(importlib.import_module("voicebox_pytorch.voicebox_pytorch"), name)
