"""What a run runs on: device by name, versions of what matters."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from .. import __version__
from ..errors import UserError

PACKAGES = ("torch", "triton", "torchaudio", "transformers", "xformers", "soundfile", "safetensors", "numpy")


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"train.device: expected auto, cpu or cuda, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"train.device: no {name} here ({torch.cuda.device_count()} CUDA devices); use cpu")
    return device


def versions() -> dict[str, str]:
    """Versions of Python, this package and the packages that are installed."""
    found = {"python": platform.python_version(), "agrepa-fast": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
