"""Every damage of a store of extracted features is one line, on the command line, and never a run on other features."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
from safetensors import safe_open

from agrepa_fast.cli import main
from agrepa_fast.training.extract import Extraction


@pytest.fixture(scope="module")
def stores(manifest, tmp_path_factory):
    """{int8: the root of a store} of the corpus."""
    from agrepa_fast.training.config import load_config

    from .conftest import TINY

    roots = {}
    for int8 in (False, True):
        roots[int8] = tmp_path_factory.mktemp("stores") / "features"
        config = load_config("demo", [*TINY, f"data.train=[{manifest}]", f"data.features={roots[int8]}"])
        Extraction(config, ["spectral"], int8=int8).run(lambda seconds: None)
    return roots


def shard_of(folder):
    [path] = (path for path in folder.glob("*-*.safetensors") if ".plan." not in path.name)
    return path


def facts(**changes):
    def damage(folder):
        path = folder / "store.json"
        found = json.loads(path.read_text())
        key = found["key"] | changes.pop("key", {})
        path.write_text(json.dumps(found | changes | {"key": key}))

    return damage


def tensors(change):
    def damage(folder):
        path = shard_of(folder)
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata()
        held = safetensors.torch.load_file(path)
        change(held)
        safetensors.torch.save_file({name: value.contiguous() for name, value in held.items()}, path, metadata)

    return damage


def cut(path, count):
    path.write_bytes(path.read_bytes()[:count])


BROKEN = "a broken shard"
DAMAGES = {
    "empty shard": (lambda folder: cut(shard_of(folder), 0), BROKEN),
    "cut header": (lambda folder: cut(shard_of(folder), 20), BROKEN),
    "cut features": (lambda folder: cut(shard_of(folder), -100), BROKEN),
    "other bytes": (lambda folder: shard_of(folder).write_bytes(b"\x7f" * 3000), BROKEN),
    "no shard": (lambda folder: shard_of(folder).unlink(), "extract its features"),
    "other dtype": (tensors(lambda held: held.update(features=held["features"].half())), BROKEN),
    "other width": (tensors(lambda held: held.update(features=held["features"][:, :7])), BROKEN),
    "one dimension": (tensors(lambda held: held.update(features=held["features"].flatten())), BROKEN),
    "fewer frames": (tensors(lambda held: held.update(features=held["features"][:-3])), BROKEN),
    "no clips": (tensors(lambda held: held.pop("clips")), BROKEN),
    "turned ends": (tensors(lambda held: held.update(ends=held["ends"].flip(0))), BROKEN),
    "nan": (tensors(lambda held: held["features"].fill_(float("nan"))), "features that are not finite"),
    "infinite": (tensors(lambda held: held["features"].fill_(float("inf"))), "features that are not finite"),
    "no json": (lambda folder: cut(folder / "store.json", 5), "store.json: damaged"),
    "no facts": (lambda folder: (folder / "store.json").unlink(), "run agrepa extract CONFIG --teacher spectral"),
    "said int8": (facts(dtype="int8"), BROKEN),
    "said width": (facts(width=7), BROKEN),
    "said another rate": (facts(audio_rate=24000), "store.json is of another store"),
    "said another teacher": (facts(key={"teacher": "hubert"}), r"is of another store (hubert-"),
    "said another layer": (facts(key={"layer": "3"}), "is of another store (spectral-layer3-"),
    "said pooled": (facts(key={"rate": 0.0}), "is of another store"),
    "said nan": (facts(key={"rate": float("nan")}), "store.json: damaged"),
    "int8 nan": (tensors(lambda held: held["scale"].fill_(float("nan"))), "features that are not finite"),
    "int8 fewer scales": (tensors(lambda held: held.update(scale=held["scale"][:-1])), BROKEN),
    "int8 no scales": (tensors(lambda held: held.pop("scale")), BROKEN),
}


@pytest.mark.filterwarnings("ignore:.*broken shard")
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_store_is_one_line(kind, stores, tiny, tmp_path, capsys):
    damage, message = DAMAGES[kind]
    root = tmp_path / "features"
    shutil.copytree(stores[kind.startswith("int8")], root)
    [folder] = root.iterdir()
    damage(folder)
    changes = (f"data.features={root}", "alignment.teachers.spectral.cached=true", "data.unreadable_share=0")
    assert main(["train", "demo", *tiny(*changes), "train.steps=2", "train.samples=0", "probe.start=1"]) == 2
    error = capsys.readouterr().err
    [line] = [line for line in error.splitlines() if line.startswith("agrepa: error: ")]
    assert message in line
    assert folder.name in line
    assert "Traceback" not in error
