"""What `import agrepa_fast` needs and loads, and where `agrepa_fast.kernels` comes from, in fresh processes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

# What a base install (torch and numpy alone) may lack. Triton is missing wherever torch comes without CUDA.
OPTIONAL = (
    "triton",
    "torchaudio",
    "soundfile",
    "transformers",
    "yaml",
    "matplotlib",
    "safetensors",
    "tensorboard",
    "tqdm",
    "scipy",
    "xformers",
)

BLOCK = f"""
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""

ATTRIBUTE = """
import torch
import agrepa_fast as ag
import agrepa_fast.kernels, agrepa_fast.cli

torch.manual_seed(0)
model = ag.DiT(ag.DiTConfig(depth=3, width=16, heads=2, mels=4, cond=0, dropout=0.0))
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.2)
# Block 1 adds nothing to the stream, so its score is the floor and the others stand above.
for linear in (model.branches[2].out, model.branches[3].down):
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
inputs = {"x_t": torch.randn(2, 6, 4), "t": torch.tensor([0.2, 0.7])}
print(*ag.attribute_layers(model, inputs).mean.tolist())
print((1e-4 / model(**inputs).square().mean(dim=(1, 2)).sqrt()).mean().item())
"""


def test_a_base_install_scores_layers(run_python: Callable[..., str], tmp_path: Path) -> None:
    first, still, last, floor = map(float, run_python(BLOCK + ATTRIBUTE, cwd=tmp_path).split())
    assert still == pytest.approx(floor, rel=1e-3)  # sqrt(0 + 1e-8) over the velocity's rms
    assert min(first, last) > 10 * floor


def test_the_import_stays_light(run_python: Callable[..., str], tmp_path: Path) -> None:
    """torch._dynamo alone costs a second or two, which every `agrepa --help` would pay."""
    heavy = {*OPTIONAL, "torch._dynamo", "torch._inductor", "sympy"}
    code = f"""
import sys, torch, numpy
before = set(sys.modules)
import agrepa_fast
print(*sorted({heavy!r} & (set(sys.modules) - before)))
"""
    assert run_python(code, cwd=tmp_path) == ""


WHERE = """
import agrepa_fast, agrepa_fast.kernels
print(agrepa_fast.__file__)
print(agrepa_fast.kernels.__file__)
"""


def test_a_plain_checkout_finds_its_kernels(
    run_python: Callable[..., str], root: Path, dependency_folders: list[Path], tmp_path: Path
) -> None:
    """`-S` leaves out the .pth files, and with them the finder of an editable install."""
    out = run_python(WHERE, cwd=tmp_path, flags=("-S",), path=[root, *dependency_folders])
    assert out.splitlines() == [str(root / "agrepa_fast" / "__init__.py"), str(root / "kernels" / "__init__.py")]


def test_the_installed_package_finds_its_kernels(run_python: Callable[..., str], tmp_path: Path) -> None:
    package, kernels = map(Path, run_python(WHERE, cwd=tmp_path).splitlines())
    assert kernels in (package.parent.parent / "kernels" / "__init__.py", package.parent / "kernels" / "__init__.py")


def test_no_top_level_kernels_is_installed(run_python: Callable[..., str], root: Path, tmp_path: Path) -> None:
    assert "agrepa-fast" not in metadata.packages_distributions().get("kernels", [])
    code = "import importlib.util\nspec = importlib.util.find_spec('kernels')\nprint(spec.origin if spec else '')"
    origin = run_python(code, cwd=tmp_path, flags=("-I",))  # as installed: neither the folder here nor PYTHONPATH
    assert not Path(origin or "/").is_relative_to(root / "kernels")


def test_transformers_runs_from_the_repository_root(run_python: Callable[..., str], root: Path) -> None:
    """There `import kernels`, which transformers tries, finds our folder in place of Hugging Face's package."""
    code = """
import importlib.util
import torch, transformers
from transformers import HubertConfig, HubertModel, LlamaModel, WhisperModel

config = HubertConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
    num_conv_pos_embeddings=2, num_conv_pos_embedding_groups=2, conv_dim=(8,) * 7,
)
print(importlib.util.find_spec("kernels").origin)
print(*HubertModel(config).eval()(torch.zeros(1, 1040)).last_hidden_state.shape)
"""
    # HuBERT's frames: floor((n - 400) / 320) + 1.
    assert run_python(code, cwd=root).splitlines() == [str(root / "kernels" / "__init__.py"), "1 3 8"]
