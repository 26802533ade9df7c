"""The machine of a result: versions, device, git revision, and the card's clocks, power and energy (NVML).

All of it only reads; the card's settings are never changed.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from agrepa_fast import __version__
from agrepa_fast.training.nvml import Nvml

PACKAGES = ("torch", "triton", "numpy", "liger-kernel", "xformers", "captum", "nvidia-ml-py")


def checkout() -> Path | None:
    """The root of the checkout that this package runs from; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() and (root / "bench").is_dir() else None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and git revision; see schema.json, "environment"."""
    return {
        "agrepa_fast": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "driver": Nvml(device).driver(),
        "device": device_name(device),
        "device_type": device.type,
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "git": revision(checkout()),
    }


def conditions(device: torch.device) -> dict[str, Any]:
    """What may change during a run: load of the host; clocks, temperature and power of the card."""
    nvml = Nvml(device)
    return {
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "sm_mhz": nvml.clock("SM"),
        "memory_mhz": nvml.clock("MEM"),
        "celsius": nvml.celsius(),
        "watts": nvml.watts(),
        "throttle": nvml.throttle(),
    }


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's model and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def revision(root: Path | None) -> dict[str, Any]:
    """{"revision": commit or None, "dirty": whether tracked files differ from it, or None if unknown}."""
    if root is None:
        return {"revision": None, "dirty": None}
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"revision": commit, "dirty": None if commit is None or changed is None else bool(changed)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
