"""SCD's tables and picture: the released columns, every number worked out by hand, and what the JSON brings back."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from matplotlib.colors import to_hex

from agrepa_fast.attribution.pictures import PALETTE
from agrepa_fast.attribution.scd import Stored, dissociations, plot_scd, read_scd, write_scd
from agrepa_fast.attribution.scores import LayerScores

USED = torch.tensor(
    [[4.0, 4.2, 1.0, 1.2], [3.0, 3.2, 2.0, 2.2], [2.0, 2.2, 3.0, 3.2], [1.0, 1.2, 4.0, 4.2]], dtype=torch.float64
)
HELD = torch.tensor([[0.1, 0.3], [0.4, 0.4], [0.2, 0.2], [0.8, 0.8]], dtype=torch.float64)
CKA = torch.tensor([0.5, 0.25, 0.125, 1.0])


def scores(domains=("speech", "speech", "audio", "audio")) -> LayerScores:
    t = torch.tensor([0.2, 0.6, 0.2, 0.6])
    return LayerScores((0, 1, 2, 3), USED, t=t, domains=domains, floor_by_sample=torch.full((4,), 2.5).double())


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_files_begin_with_the_released_columns(tmp_path):
    stored = [Stored("audio", "beats", HELD.flip(0), CKA, 5), Stored("speech", "whisper", HELD, CKA, 4)]
    found = write_scd(tmp_path, scores(), stored, k=2, step=2500, epoch=1.5)
    lines = (tmp_path / "foga_layers.csv").read_text().splitlines()
    assert lines[0] == "step,epoch,layer,speech_foga,audio_foga,foga,stderr,above_floor"
    foga = rows(tmp_path / "foga_layers.csv")
    assert [(row["step"], row["epoch"], row["layer"]) for row in foga] == [("2500", "1.5", str(n)) for n in range(4)]
    assert [float(row["speech_foga"]) for row in foga] == pytest.approx([4.1, 3.1, 2.1, 1.1])
    assert [float(row["audio_foga"]) for row in foga] == pytest.approx([1.1, 2.1, 3.1, 4.1])
    assert [float(row["foga"]) for row in foga] == pytest.approx([2.6] * 4)
    assert float(foga[0]["stderr"]) == pytest.approx(USED[0].std() / 2)
    assert [row["above_floor"] for row in foga] == ["1"] * 4
    lines = (tmp_path / "lasp_layers.csv").read_text().splitlines()
    assert lines[0] == "step,epoch,layer,sem_sim,evt_sim,sem_cka,evt_cka"
    similar = rows(tmp_path / "lasp_layers.csv")
    assert [float(row["sem_sim"]) for row in similar] == pytest.approx([0.2, 0.4, 0.2, 0.8])
    assert [float(row["evt_sim"]) for row in similar] == pytest.approx([0.8, 0.2, 0.4, 0.2])
    assert [float(row["sem_cka"]) for row in similar] == [0.5, 0.25, 0.125, 1.0]
    # FoG-A falls with depth where LASP rises: of the two highest one is shared.
    assert [(entry.domain, entry.teacher) for entry in found] == [("speech", "whisper"), ("audio", "beats")]
    speech = found[0].result
    assert (speech.most_used, speech.most_stored, speech.overlap) == ((0, 1), (3, 1), 0.5)
    # Ranks 4 3 2 1 against 1.5 3 1.5 4: Pearson's of these is -3 / sqrt(5 * 4.5).
    assert speech.spearman == pytest.approx(-3 / math.sqrt(22.5))
    assert (found[0].scored, found[0].fitted, found[0].held_out) == (2, 4, 2)
    table = rows(tmp_path / "scd.csv")
    assert [row["layer"] for row in table if row["domain"] == "speech" and row["most_stored"] == "1"] == ["1", "3"]
    assert [row["layer"] for row in table if row["domain"] == "speech" and row["most_used"] == "1"] == ["0", "1"]
    assert {(row["domain"], row["teacher"]) for row in table} == {("speech", "whisper"), ("audio", "beats")}
    assert read_scd(tmp_path / "scd.json") == found
    assert json.loads((tmp_path / "scd.json").read_text())["step"] == 2500


def test_the_map_of_layers_and_times_by_domain(tmp_path):
    write_scd(tmp_path, scores())
    table = rows(tmp_path / "foga_map.csv")
    values = {(row["domain"], row["layer"], row["t"]): float(row["foga"]) for row in table}
    assert len(values) == 2 * 4 * 2
    assert values["speech", "0", "0.2"] == 4.0
    assert values["speech", "3", "0.6"] == pytest.approx(1.2)
    assert values["audio", "0", "0.6"] == pytest.approx(1.2)
    as_json = json.loads((tmp_path / "foga_map.json").read_text())
    assert [entry["domain"] for entry in as_json] == ["speech", "audio"]
    assert as_json[0]["foga"] == USED[:, :2].tolist()
    assert as_json[0]["t"] == pytest.approx([0.2, 0.6])
    assert not (tmp_path / "scd.json").exists()  # nothing is known of what they store


def test_other_domains_keep_their_names(tmp_path):
    stored = [Stored("whale", "spectral", HELD, CKA, 4)]
    write_scd(tmp_path, scores(("whale", "whale", "audio", "audio")), stored, k=1)
    head = (tmp_path / "foga_layers.csv").read_text().splitlines()[0]
    assert head == "step,epoch,layer,audio_foga,whale_foga,foga,stderr,above_floor"
    assert (tmp_path / "lasp_layers.csv").read_text().splitlines()[0] == "step,epoch,layer,whale_sim,whale_cka"
    bare = LayerScores((0, 1, 2, 3), USED)
    write_scd(tmp_path, bare, [Stored("", "spectral", HELD, CKA, 4)], k=1)
    assert (tmp_path / "foga_layers.csv").read_text().splitlines()[0] == "step,epoch,layer,foga,stderr,above_floor"
    assert (tmp_path / "lasp_layers.csv").read_text().splitlines()[0] == "step,epoch,layer,all_sim,all_cka"


def test_a_rank_correlation_that_is_not_defined_survives_json(tmp_path):
    flat = LayerScores((0, 1, 2, 3), torch.ones(4, 2, dtype=torch.float64))
    write_scd(tmp_path, flat, [Stored("", "spectral", HELD, CKA, 4)], k=1)
    assert "NaN" not in (tmp_path / "scd.json").read_text()
    (entry,) = read_scd(tmp_path / "scd.json")
    assert math.isnan(entry.result.spearman)
    assert "not defined" in plot_scd([entry]).axes[0].get_title()


def test_the_picture_shows_the_numbers_and_fills_the_highest():
    stored = [Stored("speech", "whisper", HELD, CKA, 4), Stored("audio", "beats", HELD, CKA, 4)]
    speech, audio, speech_lasp, _ = plot_scd(dissociations(scores(), stored, k=2)).axes
    assert [bar.get_height() for bar in speech.patches] == pytest.approx([4.1, 3.1, 2.1, 1.1])
    assert [bar.get_alpha() for bar in speech.patches] == [1.0, 1.0, 0.35, 0.35]
    assert [bar.get_alpha() for bar in audio.patches] == [0.35, 0.35, 1.0, 1.0]
    line, *points = speech_lasp.lines
    assert line.get_ydata().tolist() == pytest.approx([0.2, 0.4, 0.2, 0.8])
    filled = [point.get_markerfacecolor() != "none" for point in points]
    assert filled == [False, True, False, True]
    assert to_hex(points[1].get_markerfacecolor()) == PALETTE[1]


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="'music'"):
        dissociations(scores(), [Stored("music", "x", HELD, CKA, 4)])
    with pytest.raises(ValueError, match=r"stored: expected \[4, clips\], got \[3, 2\]"):
        dissociations(scores(), [Stored("speech", "x", HELD[:3], CKA, 4)])
    branches = LayerScores((0, 0), torch.ones(2, 3), branches=("attn", "ff"))
    with pytest.raises(ValueError, match="whole layers, got branches"):
        write_scd(tmp_path, branches)
