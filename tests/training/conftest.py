"""A tiny run: 12 clips of the built-in corpus, a network of 3 x 16."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from agrepa_fast.data.corpus import write_corpus
from agrepa_fast.training.checkpoint import load_checkpoint
from agrepa_fast.training.config import RunConfig, load_config
from agrepa_fast.training.state import FORMAT

TINY = [
    "mel.mels=16",
    "model.depth=3",
    "model.width=16",
    "model.heads=2",
    "model.dropout=0.1",
    "model.token_width=8",
    "data.max_seconds=1.0",
    "data.buckets=2",
    "data.frames_per_batch=126",
    "probe.start=3",
    "probe.samples=2",
    "probe.t_grid=[0.2,0.7]",
    "probe.k=2",
    "alignment.ramp=2",
    "alignment.decay_start=0.7",
    "flow.points=3",
    "train.steps=8",
    "train.log_every=2",
    "train.valid_every=4",
    "train.valid_samples=2",
    "train.checkpoint_every=4",
    "train.samples=1",
    "train.name=tiny",
]


@pytest.fixture(scope="session")
def manifest(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("clips") / "corpus", speech=6, audio=6)


@pytest.fixture
def clips(manifest, tmp_path) -> Path:
    """A copy of the corpus that a test may damage; returns its metadata.csv."""
    shutil.copytree(manifest.parent, tmp_path / "clips")
    return tmp_path / "clips" / "metadata.csv"


@pytest.fixture
def tiny(manifest, tmp_path):
    """tiny(*overrides) -> list of overrides for `agrepa train demo`, or the configuration."""

    def overrides(*changes: str) -> list[str]:
        return [*TINY, f"data.train=[{manifest}]", f"train.out={tmp_path / 'runs'}", *changes]

    return overrides


@pytest.fixture
def tiny_config(tiny):
    def config(*changes: str) -> RunConfig:
        return load_config("demo", tiny(*changes))

    return config


@pytest.fixture
def training_state():
    """training_state(step) -> what state.pt holds after so many steps, of a model without parameters."""

    def state(step: int) -> dict:
        return {
            "format": FORMAT,
            "version": "0.0.0",
            "step": step,
            "steps": 100,
            "optimizer": {"state": {}, "param_groups": []},
            "skipped": [0.0, 0.0, 0.0],
            "seconds": 1.0,
            "probe_seconds": 0.0,
            "log_bytes": 0,
            "device": "cpu",
            "generator": torch.get_rng_state(),
            "rng": [[torch.get_rng_state(), None]],
            "selection": None,
            "scores": None,
            "average": None,
            "probed": -1,
            "clips": {name: torch.zeros(1, 3, dtype=torch.int64) for name in ("train", "valid")},
        }

    return state


def _state_bits(run_dir) -> dict:
    """Everything trained, flat: weights, EMA, heads, optimizer, random state."""
    checkpoint = load_checkpoint(run_dir)
    flat = {f"{name}.{key}": value for name, part in checkpoint.weights.items() for key, value in part.items()}
    for number, entry in checkpoint.state["optimizer"]["state"].items():
        flat |= {f"optimizer.{number}.{key}": value for key, value in entry.items()}
    return flat | {"rng": checkpoint.state["rng"][0][0], "generator": checkpoint.state["generator"]}


def _assert_same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert different == []


@pytest.fixture
def state_bits():
    """state_bits(run_dir) -> {name: tensor}."""
    return _state_bits


@pytest.fixture
def assert_same_bits():
    """assert_same_bits(bits, bits)."""
    return _assert_same_bits
