"""The device and the versions that a run uses, and the text of `agrepa doctor`."""

from __future__ import annotations

import platform
import re
from importlib import metadata

import torch

from .. import __version__
from ..data.libraries import import_torchaudio
from ..errors import UserError
from ..fields import shown
from ..ops.dispatch import explain

PACKAGES = ("torch", "triton", "torchaudio", "transformers", "xformers", "soundfile", "safetensors", "numpy")

# What each extra of pyproject.toml brings for users.
USES = {
    "audio": ("torchaudio", "soundfile"),
    "train": ("PyYAML", "tqdm", "matplotlib", "safetensors", "nvidia-ml-py"),
    "tensorboard": ("tensorboard",),
    "teachers": ("transformers", "safetensors"),
    "tokens": ("s3tokenizer",),
    "datasets": ("datasets",),
    "xformers": ("xformers",),
    "wer": ("jiwer", "pocketsphinx"),
    "mos": ("speechmos", "librosa", "onnxruntime", "requests"),
    "speaker": ("Resemblyzer",),
    "bench": ("pytest", "pytest-benchmark", "nvidia-ml-py", "captum", "nnsight"),
}


def pick_device(name: str | None, option: str = "train.device") -> torch.device:
    """The device of that name. None and "auto": CUDA where there is one, else the CPU.

    Raises:
        UserError: no such device here; begins with `option`.
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name) is None:
        raise UserError(f"{option}: expected auto, cpu, cuda or cuda:N, got {shown(name)}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{option}: no {name} here ({torch.cuda.device_count()} CUDA devices); use cpu")
    return device


def doctor() -> str:
    """A page of text: versions, devices, what each optional part needs, and the path the ops take."""
    lines = ["versions", *(f"  {name:<14}{version}" for name, version in versions().items()), "", "devices"]
    lines.append(f"  cpu           {platform.machine()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        lines.append(f"  cuda:{index}        {p.name}, sm{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append("  cuda          none")
    lines += ["", "ops", *(f"  {line}" for line in explain()), ""]
    lines.append("uses")
    for use, packages in USES.items():
        missing = [name for name in packages if metadata_version(name) is None]
        state = f"missing {', '.join(missing)}: pip install 'agrepa-fast[{use}]'" if missing else "ready"
        if not missing and "torchaudio" in packages:
            try:
                import_torchaudio()
            except UserError as error:
                state = str(error)
        lines.append(f"  {use:<14}{state}")
    return "\n".join(lines)


def metadata_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of Python, this package and the packages that are installed."""
    always = {"python": platform.python_version(), "agrepa-fast": __version__}
    return always | {name: metadata_version(name) or "not installed" for name in PACKAGES}
