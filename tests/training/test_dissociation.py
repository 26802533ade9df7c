"""What a run's probe says about what its layers store: LASP of the clips it holds out, against the parts by hand."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from agrepa_fast.attribution.stored import lasp, linear_cka, pooled_hidden
from agrepa_fast.models.flow import probe_inputs
from agrepa_fast.teachers.registry import build_teacher
from agrepa_fast.training.clips import fixed_batches, load_data, spread
from agrepa_fast.training.dissociation import stored_by_layer
from agrepa_fast.training.objective import Backbone
from agrepa_fast.training.start import start_run

DEVICE = torch.device("cpu")


@pytest.fixture
def halves(clips):
    """The changes that hold out three clips of each domain."""
    header, *rows = clips.read_text().splitlines()  # the domains take turns
    valid = clips.with_name("valid.csv")
    clips.write_text("\n".join([header, *rows[:6]]))
    valid.write_text("\n".join([header, *rows[6:]]))
    return f"data.train=[{clips}]", f"data.valid=[{valid}]"


@pytest.fixture
def config(tiny_config, halves):
    return tiny_config(*halves, "probe.t_grid=[0.7,0.2,0.5]")


@pytest.fixture
def backbone(config):
    torch.manual_seed(0)
    model = Backbone(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def test_lasp_and_cka_of_each_domain_by_hand(config, backbone, tmp_path):
    data = load_data(config, tmp_path).valid
    teacher = build_teacher("spectral")
    found = stored_by_layer(backbone, {"spectral": teacher}, data, config, DEVICE)
    assert backbone.training
    assert [(entry.domain, entry.teacher, entry.fitted) for entry in found] == [
        ("audio", "spectral", 2),
        ("speech", "spectral", 2),
    ]
    [batch] = fixed_batches(data, spread(data, 16), config, one_shape=True)
    assert batch.mel.shape[0] == 6
    with torch.no_grad():
        cond, _ = backbone.eval().condition(batch)
        inputs = probe_inputs(batch.mel, cond, batch.mask, [0.5], torch.Generator().manual_seed(config.train.seed))
        hidden = pooled_hidden(backbone.network, inputs)
        features, valid = teacher(batch.audio, batch.audio_lengths, config.mel.sample_rate)
    pooled = torch.stack([frames[mask].mean(0) for frames, mask in zip(features, valid)])
    for number, entry in enumerate(found):
        rows = [i for i, domain in enumerate(batch.domain.tolist()) if domain == number]
        fitted = torch.tensor([True, False, True])
        torch.testing.assert_close(entry.lasp, lasp(hidden[:, rows], pooled[rows], fitted), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(entry.cka, linear_cka(hidden[:, rows], pooled[rows]), rtol=1e-4, atol=1e-6)


def test_a_run_writes_the_tables_and_shows_them(tiny_config, halves):
    run_dir = start_run(tiny_config(*halves)).run()
    with open(run_dir / "lasp_layers.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:5] == ["step", "epoch", "layer", "sem_sim", "evt_sim"]
    assert [(row["step"], row["layer"]) for row in rows] == [("3", "0"), ("3", "1"), ("3", "2")]
    assert all(-1 <= float(row["sem_sim"]) <= 1 for row in rows)
    head = (run_dir / "foga_layers.csv").read_text(encoding="utf-8").splitlines()[0]
    assert head.startswith("step,epoch,layer,speech_foga,audio_foga,")
    assert [entry["domain"] for entry in json.loads((run_dir / "scd.json").read_text())["domains"]] == [
        "speech",
        "audio",
    ]
    assert 'aria-label="FoG-A and LASP of every layer, by domain"' in (run_dir / "report.html").read_text()
    assert (run_dir / "scd.png").exists()


def test_too_few_clips_of_a_domain_are_left_out(tiny_config, backbone, tmp_path):
    config = tiny_config()  # one or two clips of each domain held out
    data = load_data(config, tmp_path).valid
    assert stored_by_layer(backbone, {"spectral": build_teacher("spectral")}, data, config, DEVICE) == []


@pytest.mark.parametrize("changes", [["model.depth=1", "probe.k=1"], ["probe.samples=1"]])
def test_a_run_goes_on_where_there_is_little_to_compare(tiny_config, halves, changes):
    """One layer has no order, and a probe of one clip scores one domain of two."""
    run_dir = start_run(tiny_config(*halves, "train.steps=4", "probe.start=2", "probe.every=1", *changes)).run()
    assert (run_dir / "report.html").is_file()
    assert len((run_dir / "foga_layers.csv").read_text().splitlines()) == (2 if "probe.k=1" in changes else 4)
