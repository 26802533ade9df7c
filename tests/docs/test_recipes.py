"""docs/recipes: the plan on the page is what the command prints, and both configurations run at toy size."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from agrepa_fast import cli
from agrepa_fast.data.corpus import write_corpus
from agrepa_fast.data.manifest import read_manifest
from agrepa_fast.report import read_log
from agrepa_fast.teachers import beats
from agrepa_fast.training.checkpoint import load_checkpoint
from agrepa_fast.training.config import load_config

RECIPES = Path(__file__).resolve().parents[2] / "docs" / "recipes"
PAGE = (RECIPES / "ag-repa.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TOY = [
    *("mel.mels=16", "model.depth=3", "model.width=16", "model.heads=2", "model.token_width=8", "flow.points=3"),
    *("data.max_seconds=1.0", "data.buckets=2", "data.frames_per_batch=200", "data.workers=0"),
    *("probe.start=2", "probe.every=2", "probe.samples=4", "probe.t_grid=[0.2,0.7]", "probe.k=2"),
    *("train.steps=6", "train.log_every=2", "train.valid_every=6", "train.valid_samples=2", "train.samples=1"),
    *("train.checkpoint_every=2", "train.keep=9"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny Whisper, a tiny BEATs and a tiny BEATs tokenizer of random weights, and 12 clips."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    sizes |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 60}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    config = transformers.WhisperConfig(**sizes, **special, num_mel_bins=80)
    transformers.WhisperModel(config).save_pretrained(folder / "whisper")
    transformers.WhisperFeatureExtractor().save_pretrained(folder / "whisper")
    small = {"encoder_layers": 1, "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 16, "encoder_attention_heads": 2}
    small |= {"embed_dim": 8, "conv_pos": 4, "conv_pos_groups": 2}
    weights = dict(beats.Beats(beats.FIELDS | small).state_dict())
    torch.save({"cfg": small, "model": weights}, folder / "beats.pt")
    for number, shape in ((0, (16, 16)), (2, (4, 16))):
        weights |= {f"quantize_layer.{number}.weight": torch.randn(shape)}
        weights |= {f"quantize_layer.{number}.bias": torch.randn(shape[0])}
    weights["quantize.embedding.weight"] = torch.nn.functional.normalize(torch.randn(40, 4), dim=-1)
    torch.save({"cfg": small, "model": weights}, folder / "tokenizer.pt")
    write_corpus(folder / "clips", speech=6, audio=6)
    return folder


def toy(models: Path, *changes: str) -> list[str]:
    return [
        *TOY,
        f"alignment.teachers.speech.source={models / 'whisper'}",
        f"alignment.teachers.audio.source={models / 'beats.pt'}",
        *changes,
    ]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_the_plan_on_the_page_is_what_the_command_prints(capsys, monkeypatch):
    blocks = FENCED.findall(PAGE)
    number = next(n for n, (_, text) in enumerate(blocks) if "--plan" in text)
    monkeypatch.chdir(RECIPES.parents[1])
    assert cli.main(blocks[number][1].split()[1:]) == 0
    assert capsys.readouterr().out == blocks[number + 1][1]


def test_every_command_of_the_page_names_options_and_fields_that_exist():
    commands = [
        line for kind, text in FENCED.findall(PAGE) if kind == "bash" for line in text.replace("\\\n", "").splitlines()
    ]
    agrepa = [line.partition("#")[0].split()[1:] for line in commands if line.startswith("agrepa ")]
    assert len(agrepa) > 8
    for words in agrepa:
        cli.parser().parse_known_args(words)
        if words[0] in ("train", "extract"):
            changes = [word for word in words[1:] if "=" in word and "." in word.partition("=")[0]]
            source = words[1] if not words[1].startswith("-") else "ag-repa-single.yaml"
            load_config(RECIPES / Path(source).name if source.endswith(".yaml") else source, changes)


def test_the_single_topology_in_two_phases(models, capsys):
    tokens = f"{{speech: 'beats:{models / 'tokenizer.pt'}', audio: 'beats:{models / 'tokenizer.pt'}'}}"
    config = str(RECIPES / "ag-repa-single.yaml")
    changes = toy(models, f"data.train=[{models / 'clips'}]", f"data.tokens={tokens}")
    assert cli.main(["extract", config, *changes, "--teacher", "speech", "audio", "--pool"]) == 0
    assert cli.main(["extract", config, *changes, "--tokens", "beats"]) == 0
    assert cli.main(["train", config, *changes, "train.name=phase1", "alignment.weight=0"]) == 0
    log = read_log(Path("runs/phase1/log.jsonl"))
    assert [event["step"] for event in log if event["event"] == "probe"] == [2, 4]
    assert all(event["align_weight"] == 0 for event in log if event["event"] == "train")
    chosen = json.loads(Path("runs/phase1/selection.json").read_text())

    Path("runs/phase2/checkpoints").mkdir(parents=True)
    shutil.copytree("runs/phase1/checkpoints/step_00000002", "runs/phase2/checkpoints/step_00000002")
    frozen = ["train.name=phase2", "alignment.weight=1", "alignment.selection=runs/phase1/selection.json"]
    assert cli.main(["train", "--resume", "runs/phase2", *frozen]) == 0
    end = load_checkpoint("runs/phase2")
    assert end.state["step"] == 6
    kept = end.state["selection"]
    for teacher in ("speech", "audio"):
        assert kept["teachers"][teacher]["layers"] == chosen["teachers"][teacher]["layers"]
        assert kept["teachers"][teacher]["weights"] == pytest.approx(chosen["teachers"][teacher]["weights"])
    log = read_log(Path("runs/phase2/log.jsonl"))
    aligned = [event for event in log if event["event"] == "train"]
    assert [(event["step"], event["align_weight"]) for event in aligned] == [(4, 1.0), (6, 1.0)]
    assert all(event["bitc_loss"] > 0 for event in aligned)


def test_the_dual_topology_in_one_run(models, tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for number, clip in enumerate(read_manifest(models / "clips")):
        tokens = tmp_path / f"{number}.npy"
        np.save(tokens, np.stack([rng.integers(0, 4096, 30), rng.integers(0, 1024, 30)], 1))
        row = {"audio_file": str(clip.path), "text": clip.text, "domain": clip.domain, "tokens": str(tokens)}
        rows.append(json.dumps(row))
    (tmp_path / "list.jsonl").write_text("\n".join(rows))
    config = str(RECIPES / "ag-repa-dual.yaml")
    changes = toy(models, "data.train=[list.jsonl]", "data.allow_outside=true", "train.name=dual")
    assert cli.main(["extract", config, *changes, "--teacher", "speech", "audio", "--int8"]) == 0
    assert cli.main(["train", config, *changes]) == 0
    log = read_log(Path("runs/dual/log.jsonl"))
    assert [event["step"] for event in log if event["event"] == "probe"] == [2, 4]
    assert load_checkpoint("runs/dual").weights["ema"].keys() == load_checkpoint("runs/dual").weights["model"].keys()
    last = [event for event in log if event["event"] == "train"][-1]
    assert last["align_weight"] == 1.0
    assert {key.split("/")[1] for key in last if key.startswith("cosine/")} == {"speech", "audio"}
