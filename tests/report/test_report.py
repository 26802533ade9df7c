"""report.html says what the run folder says, loads nothing from outside, and survives missing parts."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agrepa_fast.attribution.scd import write_scd
from agrepa_fast.data.corpus import write_corpus
from agrepa_fast.errors import UserError
from agrepa_fast.report import read_log, write_report
from agrepa_fast.report.html import MISSING
from agrepa_fast.report.probes import plot_probes, read_probes, stability
from agrepa_fast.report.vitals import tables as vitals_tables

from .pages import KINDS, NOT_RECORDED, PROBED, SCORES, SECTIONS, STORED, TEXT, Page, entries, write_wav


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "night & day"
    (folder / "samples").mkdir(parents=True)
    for step in range(1, 8):
        write_wav(folder / "samples" / f"{step}.wav", 100 * step)
    write_wav(folder / "samples" / "reference.wav", 50)
    lines = "\n".join(json.dumps(entry) for entry in entries())
    (folder / "log.jsonl").write_text(lines + '\n{"event": "train", "step": 40, "flow_lo', encoding="utf-8")
    (folder / "config.yaml").write_text("model:\n  note: <b>&amp;\n", encoding="utf-8")
    selection = {"layers": [0, 2], "weights": [0.3, 0.7], "method": "foga", "metric": "squared", "step": 20}
    (folder / "selection.json").write_text(json.dumps(selection), encoding="utf-8")
    replace(SCORES, noise_by_sample=torch.full((4,), 0.03, dtype=torch.float64)).to_csv(folder / "foga.csv")
    write_scd(folder, SCORES, STORED, k=2, step=20)
    (folder / "evaluation").mkdir()
    method = {"seed": 0, "confidence": 0.95, "resamples": 1000, "prompt_seconds": 0, "speech": ["speech"]}
    evaluation = {"method": method, "targets": [{"kind": "folder", "path": "<night>"}], "notes": [], "metrics": []}
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(run) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_a_run_on_the_built_in_corpus_says_what_it_does_not_show(run, tmp_path):
    assert "not what alignment gains" not in (run / "report.html").read_text(encoding="utf-8")
    write_corpus(tmp_path / "corpus", speech=1, audio=1)
    assert "not what alignment gains" in write_report(tmp_path).read_text(encoding="utf-8")


def test_every_section_is_there_and_filled(page):
    assert set(page.sections) == SECTIONS
    assert [name for name, text in page.sections.items() if NOT_RECORDED in text] == []
    assert set(page.attribute("a", "href")) == {f"#{name}" for name in SECTIONS - {"summary"}}


def test_the_page_loads_nothing_from_outside(run, page):
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value.startswith(("data:", "#")), (tag, name, value[:60])
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}


def test_ids_are_unique_and_every_reference_in_a_picture_finds_its_target(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = [v[1:] for _, attributes in page.tags for k, v in attributes.items() if "href" in k and v[0] == "#"]
    clips = [attributes["clip-path"] for _, attributes in page.tags if "clip-path" in attributes]
    assert clips
    assert set(used) | {clip.removeprefix("url(#").removesuffix(")") for clip in clips} <= set(ids)


def test_text_from_the_run_is_escaped(run, page):
    assert TEXT in page.sections["samples"]
    assert "note: <b>&amp;" in page.sections["config"]
    assert "broken <3>" in page.sections["skipped"]
    raw = (run / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in raw
    assert "night &amp; day</h1>" in raw


def test_headline_figures_are_the_log_s(page):
    summary = page.sections["summary"]
    assert "1.765 → 0.4321" in summary  # first and last validation, four digits
    assert "last / first 0.245" in summary  # 0.4321 / 1.7654
    assert "0.0123 → 0.6543" in summary
    assert "0, 2" in summary
    assert "weights 0.30, 0.70" in summary
    assert "4,321" in summary
    assert "56 valid, 23 skipped" in summary
    assert "1 h 2 min" in summary
    assert "55.00" in summary  # median of 40, 50, 60, 70
    assert "1,000 frames/s" in summary


def test_tables_are_the_log_s(page):
    assert page.rows["loss"][1:] == [
        ["all domains", "1.765", "0.4321", "0.245", "0.4321 at 30"],
        ["speech", "1.500", "0.3000", "0.200", "0.3000 at 30"],
    ]
    # layer 10 was only measured in training; layers sort as numbers
    assert page.rows["cosine"][1:] == [
        ["speech", "3", "valid", "0.0123", "0.6543"],
        ["speech", "10", "train", "0.0000", "0.1500"],
    ]
    assert ["30", "0, 2", "0.7000, 0.3000", "2.500", ""] in page.rows["selection"]
    assert ["2", "0.7000"] in page.rows["selection"]


def test_foga_table_is_the_csv_s(page):
    header, first, second, third = page.rows["foga"]
    assert header == ["layer", "rank", "score", "audio", "speech", "weight"]
    # layer 0: 0.1 to 0.4, mean 0.25, deviation 0.1291, error 0.0645; audio 0.1 and 0.2: error 0.05
    assert first == ["0", "2", "0.2500 ± 0.065", "0.1500 ± 0.050", "0.3500 ± 0.050", "0.300"]
    assert second == ["1", "3", "0.02000 ± 0.0058", "0.02000 ± 0.010", "0.02000 ± 0.010", ""]
    assert third == ["2", "1", "0.7000 ± 0.12", "0.5000 ± 0.0", "0.9000 ± 0.0", "0.700"]
    assert [a.get("class") for tag, a in page.tags if tag == "tr"].count("chosen") == 2
    # the CSV does not hold the metric, the selection does
    assert "metric squared" in page.sections["foga"]


def test_vitals_are_the_log_s():
    log = [
        {"event": "start", "engine": "graph", "ranks": 2, "matmul_flops": 5e14},
        {"event": "probe", "step": 2, "share": 0.5},
        {"event": "probe", "step": 9, "share": 0.0123},
    ]
    for step, mfu in enumerate((0.2, 0.4, 0.3), start=1):
        rates = {"samples_per_second": 10.0 * step, "frames_per_second": 100.0, "mfu": mfu, "watts": 600.0 + step}
        losses = {"flow_loss_t/0-0.25": 2.0 / step, "flow_loss_t/0.25-0.5": 4.0}
        log.append(
            {"event": "train", "step": step, "memory_bytes": 1e9 * step, "skipped_steps": step, **rates, **losses}
        )
    log += [{"event": "gradients", "step": s, "gradient_cosine/3": v} for s, v in ((1, 0.5), (2, -0.25), (3, 0.125))]
    [rows] = Page(f'<section id="vitals">{vitals_tables(log)}</section>').rows.values()
    said = {row[0]: row[1:] for row in rows}
    assert said["samples per second, median"] == ["20.00"]
    assert said["MFU, median"][0].startswith("30.0% of 500 TFLOP/s")
    assert said["memory, first and last line"] == ["1.00 GB, 3.00 GB"]
    assert said["power, median"] == ["602.0 W"]
    assert said["steps dropped (gradients not finite)"] == ["3"]
    assert said["share of the run's time in probes, when the last one ended"] == ["1.23%"]
    assert (said["engine"], said["ranks"]) == (["graph"], ["2"])
    assert said["0-0.25"] == ["2.000", "0.6667"]
    assert said["0.25-0.5"] == ["4.000", "4.000"]
    assert said["3"] == ["0.500", "0.125", "-0.250 at 2"]
    assert vitals_tables([]) == ""
    start = {"event": "start", "matmul_flops": 5e14}
    assert "unknown: other work" in vitals_tables([start, {"event": "train", "step": 1, "mfu": 1.5}])


def test_samples_carry_their_sound_beside_the_reference(run, page):
    sounds = [base64.b64decode(src.removeprefix("data:audio/wav;base64,")) for src in page.attribute("audio", "src")]
    # the reference, then first and last step and two evenly spaced between them
    names = ["reference", "1", "3", "5", "7"]
    assert sounds == [(run / "samples" / f"{name}.wav").read_bytes() for name in names]
    assert "3 more steps" in page.sections["samples"]


def test_skipped_files_are_counted_and_the_first_twenty_listed(page):
    assert "23 files" in page.sections["skipped"]
    assert page.rows["skipped"][1:] == [[f"clip_{i:03}.wav", "a.csv", f"broken <{i}>"] for i in range(20)]


def test_environment_shows_versions_and_parameters(page):
    text = page.sections["versions"]
    for shown in ("9.8.7", "cpu", "1,234,567", "8,901", "234", "2025-01-02T03:04:05"):
        assert shown in text


def test_pictures_are_in_the_page_and_in_the_folder(run, page):
    labels = page.attribute("svg", "aria-label")
    assert len(labels) == 6
    for name in ("loss.png", "cosine.png", "foga.png", "foga_map.png", "scd.png", "probes.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in run.iterdir() if p.name.startswith(".")) == []


def test_probes_over_time(page):
    """Orders 0 1 2 and 0 2 1 have rho = 1 - 6 (0 + 1 + 1) / (3 (9 - 1)) = 0.5; one of two layers was replaced."""
    header, first, second, *sizes = page.rows["probes"]
    assert header[4] == "Spearman <speech>"
    assert first == ["20", "", "", "75%", "-1.00", "1.50", "25.0%"]
    assert second == ["30", "0.50", "50%", "62%", "", "2.50", "50.0%"]
    assert sizes[1:] == [["1", "25%", "60%"], ["2", "62%", "80%"], ["4", "100%", "100%"]]


@pytest.mark.parametrize("part", ["foga", "scd", "by_clips", "selection", "step"])
@pytest.mark.parametrize(
    "value", [None, [], {}, "x", [None], [{}], 1e400, {"clips": [3], "agreement": [1], "overlap": 2}]
)
def test_any_probe_of_a_log_is_drawn_or_left_out(run, part, value):
    log = [{"event": "probe", "step": step, **PROBED[0]} for step in (1, 2, 3)]
    log[1] = {**log[1], part: value}
    drawn = read_probes(log)
    assert [probe.step for probe in drawn if probe.step != 2] == [1, 3]
    assert len(stability(drawn)) == len(drawn)
    assert all(0 <= probe.certainty <= 1 or math.isnan(probe.certainty) for probe in drawn)
    plot_probes(drawn)


@pytest.mark.parametrize(
    ("foga", "rho", "lowest"), [([1.0, 1.0, 1.0], math.nan, -0.08), ([0.1, 0.5, 0.9], -1.0, -1.08)]
)
def test_a_correlation_below_0_or_not_defined_is_drawn(foga, rho, lowest):
    probes = read_probes([{"event": "probe", "step": 1, **PROBED[0]}, {"event": "probe", "step": 2, "foga": foga}])
    assert stability(probes)[1][0] == pytest.approx(rho, nan_ok=True)
    assert plot_probes(probes).axes[-3].get_ylim()[0] == pytest.approx(lowest)


def test_the_last_panels_say_how_many_clips_are_enough_and_what_the_probes_cost():
    """Of the last probe: shares by number of clips; of every probe: the share of the run's time, in per cent."""
    probes = read_probes([{"event": "probe", "step": 20 + 10 * n, **entry} for n, entry in enumerate(PROBED)])
    clips, cost = plot_probes(probes).axes[-2:]
    shared, same = clips.get_lines()
    assert [*zip(*same.get_data())] == [(1, 0.25), (2, 0.625), (4, 1.0)]
    assert shared.get_ydata().tolist() == [0.6, 0.8, 1.0]
    assert [label.get_text() for label in clips.get_xticklabels()] == ["1", "2", "4"]
    assert clips.get_xlabel() == "number of clips"
    assert [*zip(*cost.get_lines()[0].get_data())] == [(20, 25.0), (30, 50.0)]
    assert cost.get_ylabel() == "% of the run so far"
    assert cost.get_ylim()[0] == 0


def test_store_against_contribute(page):
    """Speech: FoG-A 0.7, 0.02, 0.9 by layer halves; LASP means 0.2, 0.4, 0.2. Two of the three are on top of each."""
    facts, speech, audio, header, *by_layer = page.rows["scd"]
    assert facts[:4] == ["domain", "teacher", "clips", "most used"]
    assert speech[:6] == ["speech", "<speech>", "2 / 7 / 2", "2, 0", "1, 0", "50%"]
    assert audio[:6] == ["audio", "<audio>", "2 / 7 / 2", "2, 0", "1, 0", "50%"]
    assert header == ["layer", *(f"{domain} {kind}" for domain in ("speech", "audio") for kind in KINDS)]
    assert [row[:4] for row in by_layer] == [
        ["0", "0.3500", "0.2000", "0.5000"],
        ["1", "0.02000", "0.4000", "0.2500"],
        ["2", "0.9000", "0.2000", "0.1250"],
    ]


def test_the_noise_floor_is_said(page):
    assert "would score 0.030 (measured); not above it: 1." in page.sections["foga"]


def test_writing_again_replaces_the_page_with_the_same_page(run):
    before = (run / "report.html").read_bytes()
    write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_a_failed_write_leaves_the_old_page(run, monkeypatch):
    before = (run / "report.html").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agrepa_fast.report.html.os.replace", full)
    with pytest.raises(UserError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert [p.name for p in run.iterdir() if p.name.startswith(".")] == []


def test_an_empty_folder_says_what_is_missing(tmp_path):
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert set(page.sections) == SECTIONS
    for name in SECTIONS - {"summary"}:
        assert NOT_RECORDED in page.sections[name], name
    assert page.sections["summary"].count("not recorded") == 6
    assert NOT_RECORDED in MISSING


def test_each_teacher_s_selection_is_shown(tmp_path):
    """Two teachers, one of them with weights by flow time; layers and weights are told apart everywhere."""
    by_time = {"layers": [1, 2], "weights": [0.6, 0.4], "weighting": "by-time", "t_grid": [0.25, 0.5]}
    by_time["scores"] = [[3.0, 1.0], [1.0, 1.0]]
    teachers = {"<voice>": {"layers": [0, 2], "weights": [0.334, 0.118], "weighting": "score"}, "sound": by_time}
    probe = {"event": "probe", "step": 20, "selection": {"teachers": teachers}, "seconds": 2.5}
    broken = {"event": "probe", "step": 30, "selection": {"teachers": {"sound": 3}}, "seconds": 2.5}
    lines = [json.dumps(entry) for entry in (probe, broken)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "selection.json").write_text(json.dumps({"teachers": teachers, "step": 20}), encoding="utf-8")
    SCORES.to_csv(tmp_path / "foga.csv")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    rows = page.rows["selection"]
    assert ["2", "0.1180"] in rows
    assert ["layer", "weight", "at t 0.25", "at t 0.5"] in rows
    assert ["1", "0.6000", "0.7500", "0.5000"] in rows
    probes = [row[:3] for row in rows if row[0] in ("20", "30")]
    assert probes == [
        ["20", "<voice>: 0, 2; sound: 1, 2", "<voice>: 0.3340, 0.1180; sound: 0.6000, 0.4000"],
        ["30", "sound: ", "sound: "],
    ]
    header, *table = page.rows["foga"]
    assert header[-2:] == ["weight <voice>", "weight sound"]
    assert [row[-2:] for row in table] == [["0.334", ""], ["", "0.600"], ["0.118", "0.400"]]
    assert "<voice>: 0, 2; sound: 1, 2" in page.sections["summary"]


def test_broken_files_are_named_and_the_rest_still_shown(tmp_path):
    (tmp_path / "foga.csv").write_text("layer,branch,sample,t,domain,score\n0,,0,0.5,speech,abc\n", encoding="utf-8")
    (tmp_path / "scd.json").write_text('{"domains": [{"domain": 3}]}', encoding="utf-8")
    (tmp_path / "selection.json").write_text('{"layers": [1, 2], "weights": [1.0]}', encoding="utf-8")
    log = [
        {"event": "start", "clips": 3, "versions": "none"},
        {"event": "valid", "step": 5, "flow_loss": "high", "flow_loss/audio": float("nan"), "cosine/": 1.0},
        {"event": "sample", "step": 5, "path": "../secret.wav", "text": None},
        {"event": "sample", "step": 6, "path": "samples/gone.wav", "text": None},
        {"event": "interrupted", "step": 6},
    ]
    (tmp_path.parent / "secret.wav").write_bytes(b"not for the page")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert "foga.csv:2" in page.sections["foga"]
    assert "scd.json cannot be shown" in page.sections["scd"]
    assert "2 layers but 1 weights" in page.sections["selection"]
    assert NOT_RECORDED in page.sections["loss"]
    assert NOT_RECORDED in page.sections["cosine"]
    assert "../secret.wav is not in the run folder" in page.sections["samples"]
    assert "samples/gone.wav cannot be read" in page.sections["samples"]
    assert page.attribute("audio", "src") == []
    assert "Interrupted at step 6" in text


def test_a_resumed_run_counts_no_skipped_file_twice_and_drops_the_overwritten_steps(tmp_path):
    skipped = {"event": "skipped", "path": "a.wav", "source": "s", "reason": "r"}
    log = [
        {"event": "start"},
        skipped,
        {"event": "valid", "step": 10, "flow_loss": 2.0},
        {"event": "valid", "step": 20, "flow_loss": 77.0},
        {"event": "start"},
        {"event": "resume", "step": 10},
        skipped,
        {"event": "valid", "step": 20, "flow_loss": 0.5},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert "2.000 → 0.5000" in page.sections["summary"]
    assert "1 file could" in page.sections["skipped"]
    assert "resumed once" in text
    assert all("77.0" not in cell for row in page.rows["loss"] for cell in row)


def test_cosines_of_different_layers_are_not_compared(tmp_path):
    log = [
        {"event": "valid", "step": 1, "cosine/speech/1": 0.1, "cosine/speech/2": 0.9},
        {"event": "valid", "step": 2, "cosine/speech/1": 0.3, "cosine/speech/7": 0.7},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "0.1000 → 0.3000" in page.sections["summary"]
    assert "mean over 1 teacher/layer pair" in page.sections["summary"]


def test_missing_run_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "nothing")


def test_read_log_drops_a_torn_last_line_only(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"event": "start"}\n{"event": "tra{"event": "resume"}\n\n[1]\n{"event": "end", "text": "\xc3')
    assert read_log(path) == [
        {"event": "start"},
        {"event": "unreadable", "line": 2},
        {"event": "unreadable", "line": 4},
    ]
    path.write_bytes(b'{"event": "start"}\n{"event": "end"}')  # whole, only its newline is missing
    assert read_log(path) == [{"event": "start"}, {"event": "end"}]
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        read_log(tmp_path / "gone.jsonl")


def test_unreadable_lines_are_named_in_the_page(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"event": "start"}\nrubbish\n{"event": "end", "step": 3}\n')
    assert "left out: line 2" in write_report(tmp_path).read_text(encoding="utf-8")


# --- curves -------------------------------------------------------------------------------------------------
