"""Cached features: what comes back, the int8 form's error, and every mismatch of the key refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file

from agrepa_fast.errors import UserError
from agrepa_fast.teachers.cache import FeatureKey, dequantise, feature_path, read_features, write_features

KEY = FeatureKey("openai/whisper-tiny", revision="abc", layer="3", preprocessing="torchaudio", rate=50.0)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pooled", [False, True])
def test_what_is_written_comes_back(tmp_path: Path, dtype, pooled) -> None:
    key = replace(KEY, rate=0.0) if pooled else KEY
    features = randn(*([8] if pooled else [5, 8])).to(dtype)
    path = feature_path(tmp_path / "clip.01.wav", "speech")
    assert path.name == "clip.01.speech.safetensors"
    write_features(path, features, key)
    found, scale = read_features(path, key)
    assert found.dtype == dtype
    assert torch.equal(found, features)
    assert scale is None
    assert torch.equal(dequantise(found, scale), features.float())


def test_int8_is_within_half_a_step_of_each_frame(tmp_path: Path) -> None:
    features = randn(6, 8) * torch.tensor([1e-6, 1.0, 1e4, 3.0, 0.0, 0.1])[:, None]
    write_features(tmp_path / "a.safetensors", features, KEY, int8=True)
    found, scale = read_features(tmp_path / "a.safetensors", KEY)
    assert found.dtype == torch.int8
    assert found.abs().amax(1).tolist() == [127, 127, 127, 127, 0, 127]
    step = features.abs().amax(1) / 127
    assert ((dequantise(found, scale) - features).abs() <= step[:, None] * 0.5001).all()


@pytest.mark.parametrize(
    "field, other", [("teacher", "x"), ("revision", "def"), ("layer", ""), ("preprocessing", "soxr"), ("rate", 25.0)]
)
def test_another_key_is_refused(tmp_path: Path, field, other) -> None:
    path = tmp_path / "a.safetensors"
    write_features(path, randn(5, 8), KEY)
    with pytest.raises(UserError, match=rf"a.safetensors: made with {field} .*, this run has {other!r}"):
        read_features(path, replace(KEY, **{field: other}))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.safetensors: no cached features here"):
        read_features(tmp_path / "none.safetensors", KEY)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"not one")
    with pytest.raises(UserError, match=r"torn.safetensors: not a feature file"):
        read_features(torn, KEY)
    plain = tmp_path / "plain.safetensors"
    save_file({"features": randn(5, 8)}, plain)
    with pytest.raises(UserError, match=r"plain.safetensors: not a feature file"):
        read_features(plain, KEY)


def test_features_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"features: expected floating \[frames, width\], got torch.float32 \[8\]"):
        write_features(path, randn(8), KEY)
    with pytest.raises(ValueError, match="features: not finite"):
        write_features(path, randn(5, 8) / 0, KEY)
    assert not path.exists()
    with pytest.raises(UserError, match=r"nowhere"):
        write_features(tmp_path / "nowhere" / "a.safetensors", randn(5, 8), KEY)


def test_features_that_became_nan_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for int8 in (False, True):
        write_features(path, torch.ones(5, 8), KEY, int8=int8)
        with safetensors.safe_open(str(path), "pt") as file:
            metadata = file.metadata()
        tensors = safetensors.torch.load_file(path)
        tensors["scale" if int8 else "features"][2] = float("nan")
        safetensors.torch.save_file(tensors, path, metadata)
        with pytest.raises(UserError, match=r"a\.safetensors: holds features that are not finite: extract them again"):
            read_features(path, KEY)
