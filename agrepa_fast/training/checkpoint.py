"""Checkpoints: a folder `step_000600` with weights as safetensors, the rest of the state apart, the config beside.

model.safetensors, ema.safetensors (network and token conditioner), heads.safetensors (alignment heads),
state.pt (step, optimizer, schedule, random state, selection; tensors and plain containers only), config.yaml.
A checkpoint is written under another name, flushed to disk and renamed: it is whole or absent.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .config import RunConfig, dump_config, load_config

WEIGHTS = ("model", "ema", "heads")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back: state dicts by name (see WEIGHTS), the training state, the configuration."""

    path: Path
    weights: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    config: RunConfig


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError("safetensors is not installed: pip install 'agrepa-fast[train]'") from error
    return safetensors


def save_checkpoint(
    folder: Path,
    step: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    config: RunConfig,
) -> Path:
    """Write `folder/step_NNNNNNNN`; nothing but a whole checkpoint ever has that name.

    Raises:
        UserError: it cannot be written (a full disk, say); earlier checkpoints are untouched.
    """
    target = folder / f"step_{step:08d}"
    building = folder / f".{target.name}.{os.getpid()}"
    safetensors = _safetensors()
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        for name, tensors in weights.items():
            # Cloned: safetensors refuses tensors that share memory.
            own = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
            safetensors.torch.save_file(own, building / f"{name}.safetensors")
        torch.save(dict(state), building / "state.pt")
        (building / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        for file in building.iterdir():
            _flush(file)
        _flush(building)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(building, target)
        _flush(folder)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        # The last two are how torch and safetensors report a failed write.
        shutil.rmtree(building, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{target}: cannot write the checkpoint ({reason}); earlier ones are kept") from error
    return target


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}", path.name))


def drop_old(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint's folder, or the newest checkpoint of a run's folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / "state.pt").is_file():
        return path
    found = checkpoints(path / "checkpoints")
    if not found:
        raise UserError(f"{path}: neither a checkpoint nor a run with checkpoints/step_* in it")
    return found[-1]


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, or the newest one of a run. Nothing in it is executed.

    Raises:
        UserError: a file is missing, damaged, or not what its name says; names it.
    """
    folder = find_checkpoint(path)
    weights = {name: read_weights(folder / f"{name}.safetensors") for name in WEIGHTS}
    file = folder / "state.pt"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except Exception as error:
        raise UserError(f"{file}: damaged, or not a training state ({_first_line(error)})") from None
    return Checkpoint(folder, weights, state, load_config(folder / "config.yaml"))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        UserError: no such file, or not safetensors (a pickle, say: those are never loaded).
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return _safetensors().torch.load_file(path)
    except Exception as error:
        raise UserError(f"{path}: not a safetensors file ({_first_line(error)}); pickles are not loaded") from None


def restore(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Load a state dict into a module of the same shapes.

    Raises:
        UserError: names the first key that is missing, unexpected or of another shape.
    """
    own = module.state_dict()
    for key, value in own.items():
        if key not in tensors:
            raise UserError(f"{path}: no tensor {key!r}; is it a checkpoint of another configuration?")
        if value.shape != tensors[key].shape:
            raise UserError(f"{path}: {key} is {list(tensors[key].shape)}, the configuration needs {list(value.shape)}")
    extra = [key for key in tensors if key not in own]
    if extra:
        raise UserError(f"{path}: unexpected tensor {extra[0]!r}; is it a checkpoint of another configuration?")
    module.load_state_dict(dict(tensors))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
