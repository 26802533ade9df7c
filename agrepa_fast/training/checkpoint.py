"""Checkpoints: a folder `step_00000600` with everything that a run needs to go on.

- model.safetensors, ema.safetensors: network and token conditioner; heads.safetensors: alignment heads.
- state.pt: the rest of the training state, as tensors and plain containers only (see `state`).
- config.yaml, and manifest.json with the number of the format and the size and SHA-256 of each file.

A checkpoint is written under another name, flushed to disk and renamed, so it is whole or absent. The manifest shows
what a disk has damaged later; a run then goes on from the checkpoint before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import UserError, writing
from .config import RunConfig, dump_config, load_config
from .sharding import scattered
from .state import FORMAT, READABLE, check_format, check_state

WEIGHTS = ("model", "ema", "heads")
FILES = (*(f"{name}.safetensors" for name in WEIGHTS), "state.pt", "config.yaml")
MANIFEST = "manifest.json"
MANIFEST_BYTES = 1 << 20  # a longer manifest is not ours


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: state dicts by name (see WEIGHTS), the training state, the configuration.

    damaged: for each newer checkpoint of the run that was skipped, why.
    """

    path: Path
    weights: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    config: RunConfig
    damaged: tuple[str, ...] = ()


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
    """Write the checkpoint `folder/step_NNNNNNNN`. Only a whole checkpoint ever has that name.

    Raises:
        UserError: it cannot be written (a full disk, say); earlier checkpoints are untouched.
    """
    target = folder / f"step_{step:08d}"
    building = folder / f".{target.name}.{os.getpid()}"
    safetensors = _safetensors()
    name = ""
    try:
        _sweep(folder)
        building.mkdir(parents=True)
        for part, tensors in weights.items():
            name = f"{part}.safetensors"
            # Cloned: safetensors refuses tensors that share memory.
            copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
            safetensors.torch.save_file(copies, building / name)
        name = "state.pt"
        _save_state(dict(state), building / name)
        name = "config.yaml"
        (building / name).write_text(dump_config(config), encoding="utf-8")
        name = MANIFEST
        write_manifest(building)
        for file in building.iterdir():
            name = file.name
            _flush(file)
        name = ""
        _flush(building)
        if target.exists():
            # A folder cannot be replaced in one move; `find_checkpoint` knows the names it has in between.
            os.rename(target, folder / f".{target.name}.old")
        os.rename(building, target)
        _flush(folder)
        _sweep(folder)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        # The last two are how torch and safetensors report a failed write.
        shutil.rmtree(building, ignore_errors=True)
        where = f"{name}: " if name else ""
        raise UserError(
            f"{target}: cannot write the checkpoint ({where}{_reason(error)}); earlier ones are kept"
        ) from error
    return target


class _Recorder:
    """A file that keeps the first OSError of a write, which torch.save replaces by a failed assertion."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save_state(state: dict[str, Any], path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        recorder = _Recorder(file)
        try:
            torch.save(state, cast(BinaryIO, recorder))
        except RuntimeError as error:
            raise recorder.error or error from error


def _reason(error: Exception) -> str:
    """The reason of a failed write. safetensors puts the error's number into its text; it is taken from there."""
    number = re.search(r"os error (\d+)", str(error))
    return getattr(error, "strerror", None) or (os.strerror(int(number[1])) if number else _first_line(error))


def _sweep(folder: Path) -> None:
    """Tidy up after a process that ended during a write or a removal: keep whole checkpoints, delete the rest."""
    for path in sorted(folder.glob(".step_*")):
        whole = _whole_name(path)
        if whole.exists() or _flaw(path) is not None:
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, whole)


def _whole_name(path: Path) -> Path:
    return path.with_name(path.name.removeprefix(".").partition(".")[0])


def write_manifest(path: Path) -> None:
    """Record the format, and size and SHA-256 of every file of a checkpoint."""
    files = {file.name: _fingerprint(file) for file in sorted(path.iterdir()) if file.name != MANIFEST}
    manifest = {"format": FORMAT, "version": __version__, "files": files}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _fingerprint(file: Path) -> dict[str, int | str]:
    with open(file, "rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest, a JSON object.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is something else."""
    file = path / MANIFEST
    if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe would wait for a writer
        raise ValueError("not a regular file")
    with open(file, "rb") as content:
        text = content.read(MANIFEST_BYTES + 1)
    if len(text) > MANIFEST_BYTES:
        raise ValueError("too long")
    try:
        manifest = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(manifest, dict):
        raise ValueError("not an object")
    return manifest


def _flaw(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if they are as they were written.

    A checkpoint of another format counts as intact: `check_format` refuses it when it is read, and nobody deletes it.
    """
    try:
        manifest = _read_manifest(path)
        if manifest.get("format") not in READABLE:
            return None if _files(manifest) or "format" in manifest else f"{path / MANIFEST}: damaged"
        files = _files(manifest)
        if not set(FILES) <= set(files):
            return f"{path / MANIFEST}: damaged"
        for name, written in files.items():
            status = (path / name).stat()
            # The size first: it costs nothing, and most damage shows in it.
            size_fits = stat.S_ISREG(status.st_mode) and status.st_size == written["bytes"]
            if not size_fits or _fingerprint(path / name) != written:
                return f"{path / name}: damaged (not the bytes that were written)"
    except FileNotFoundError as error:
        return f"{error.filename}: no such file"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{path / MANIFEST}: damaged"
    return None


def _files(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The manifest's files; ValueError where that is not one or more plain names with an object each."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError("no files")
    for name, written in files.items():
        if name in (".", "..") or "/" in name or "\0" in name or not isinstance(written, dict):
            raise ValueError(name)
    return files


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}", path.name))


def is_checkpoint(path: Path) -> bool:
    """Whether a path means one checkpoint, intact or not, rather than a run's folder."""
    return bool(re.fullmatch(r"step_\d{8,}", path.name)) or any(os.path.lexists(path / name) for name in FILES[:-1])


def begun(run_dir: Path) -> bool:
    """Whether a run has a checkpoint. A damaged one counts; one that was never finished does not."""
    folder = run_dir / "checkpoints"
    return bool(checkpoints(folder)) or any(_flaw(path) is None for path in folder.glob(".step_*"))


def write_whole(path: Path, text: str) -> None:
    """Write a text file under another name and rename it, so that nobody ever reads a part of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)


def drop_old(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in checkpoints(folder)[:-keep]:
        # It is renamed first: a folder that is deleted in part must not have a checkpoint's name.
        going = path.with_name(f".{path.name}.old")
        os.rename(path, going)
        shutil.rmtree(going)


def find_checkpoint(path: str | Path) -> tuple[Path, tuple[str, ...]]:
    """Find a checkpoint: `path` itself, or the newest intact one of a run's folder.

    Returns its folder, and for each newer checkpoint that was skipped, why.

    Raises:
        UserError: there is none, or none is intact.
    """
    path = Path(path)
    if is_checkpoint(path):
        if flaw := _flaw(path):
            raise UserError(flaw)
        return path, ()
    damaged: list[str] = []
    folder = path / "checkpoints"
    # A name with a dot: whole, if the run ended between two renames. Under way, if it is running.
    for candidate in sorted([*checkpoints(folder), *folder.glob(".step_*")], key=_whole_name, reverse=True):
        flaw = _flaw(candidate)
        if flaw is None:
            return candidate, tuple(damaged)
        if candidate == _whole_name(candidate):
            damaged.append(flaw)
    if damaged:
        raise UserError(f"{path}: no checkpoint is intact: {'; '.join(damaged)}")
    raise UserError(f"{path}: neither a checkpoint nor a run with checkpoints/step_* in it")


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, or the newest intact one of a run. Nothing in it is executed.

    Raises:
        UserError: a file is missing, damaged, or not what its name says; names it.
    """
    folder, damaged = find_checkpoint(path)
    check_format(_read_manifest(folder), folder)
    weights = {name: read_weights(folder / f"{name}.safetensors") for name in WEIGHTS}
    file = folder / "state.pt"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{file}: not a training state ({_first_line(error)})") from None
    check_state(state, file)
    return Checkpoint(folder, weights, state, load_config(folder / "config.yaml"), damaged)


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
    expected = module.state_dict()
    for key, value in expected.items():
        if key not in tensors:
            raise UserError(f"{path}: no tensor {key!r}; is it a checkpoint of another configuration?")
        if value.shape != tensors[key].shape:
            raise UserError(f"{path}: {key} is {list(tensors[key].shape)}, the configuration needs {list(value.shape)}")
        if value.dtype != tensors[key].dtype:
            raise UserError(f"{path}: {key} is {tensors[key].dtype}, expected {value.dtype}")
    extra = [key for key in tensors if key not in expected]
    if extra:
        raise UserError(f"{path}: unexpected tensor {extra[0]!r}; is it a checkpoint of another configuration?")
    module.load_state_dict({key: scattered(tensors[key], value) for key, value in expected.items()})


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
