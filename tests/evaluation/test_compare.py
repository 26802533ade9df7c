"""Sets of recordings against each other: rows, domains, what is left out and why, differences, and the cache."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from agrepa_fast.data import verdicts
from agrepa_fast.errors import UserError
from agrepa_fast.evaluation.compare import compare
from agrepa_fast.evaluation.frechet import build_frechet
from agrepa_fast.evaluation.metric import Metric
from agrepa_fast.evaluation.recordings import Recording, Recordings, keyed, matched, read_set, read_sound, whole_files
from agrepa_fast.evaluation.tables import text


class Loudness(Metric):
    """The root mean square of a clip; a metric that can be worked out by hand."""

    key = title = tool = "loudness"
    columns = {"rms": "higher"}  # noqa: RUF012

    def __init__(self, **attributes) -> None:
        self.calls = 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def measure(self, waveform: Tensor, clip: Recording, reference: Tensor | None) -> Tensor:
        self.calls += 1
        if clip.key == "nan":
            return torch.tensor([math.nan])
        value = waveform.square().mean().sqrt()
        return (value if reference is None else value / reference.square().mean().sqrt()).reshape(1)


@pytest.fixture
def make(tmp_path):
    """make(name, {file: level}) -> a folder of square waves."""

    def folder(name: str, levels: dict[str, float], rate: int = 16_000):
        path = tmp_path / name
        path.mkdir()
        wave = np.where(np.arange(rate // 4) % 40 < 20, 1.0, -1.0)
        for file, level in levels.items():
            soundfile.write(path / f"{file}.wav", level * wave, rate, subtype="FLOAT")
        return path

    return folder


def as_set(path, name: str, kind: str = "folder", domains: dict[str, str] | None = None) -> Recordings:
    clips = keyed(read_set(path, "speech")[0])
    rows = whole_files(clips, name, kind)
    changed = [Recording(c.key, c.path, c.text, (domains or {}).get(c.key, c.domain)) for c in rows.clips]
    return Recordings(name, kind, tuple(changed))


def rows(table, **wanted):
    return [r for r in table["rows"] if all(r[key] == value for key, value in wanted.items())]


def test_means_by_domain_and_the_difference_to_the_first(make) -> None:
    domains = {"a": "speech", "b": "speech", "c": "audio"}
    reference = as_set(make("r", {"a": 0.1, "b": 0.2, "c": 0.6}), "reference", "reference", domains)
    first = as_set(make("x", {"a": 0.2, "b": 0.3, "c": 0.4}), "x", domains=domains)
    second = as_set(make("y", {"a": 0.3, "b": 0.4, "c": 0.5}), "y", domains=domains)
    [table] = compare([Loudness()], reference, [first, second], ["speech"])
    assert [(r["name"], r["domain"], r["clips"]) for r in table["rows"]] == [
        (name, domain, n) for name in ("reference", "x", "y") for domain, n in (("all", 3), ("audio", 1), ("speech", 2))
    ]
    value = {(r["name"], r["domain"]): r["values"]["rms"] for r in table["rows"]}
    assert value["x", "speech"]["value"] == pytest.approx(0.25, rel=1e-3)
    assert value["x", "audio"] == {"value": pytest.approx(0.4, rel=1e-3), "low": None, "high": None}
    assert rows(table, name="x", domain="audio")[0]["note"] == "one clip: no interval"
    [both] = rows(table, name="y", domain="all")
    assert both["differences"]["rms"]["value"] == pytest.approx(0.1, rel=1e-3)
    assert not rows(table, name="x", domain="all")[0]["differences"]
    json.dumps(table, allow_nan=False)
    shown = text({"metrics": [table]})
    assert "less the first" in shown
    assert "nan" not in shown


def test_paired_metrics_take_the_recording_of_the_same_name(make) -> None:
    reference = as_set(make("r", {"a": 0.1, "b": 0.2}), "reference", "reference")
    other = as_set(make("x", {"b": 0.1, "zz": 0.5, "a": 0.1}, rate=8000), "x")
    [table] = compare([Loudness(paired=True)], reference, [other], ["speech"])
    assert rows(table, kind="reference")[0]["note"] == "the recordings themselves"
    [row] = rows(table, name="x")
    assert (row["clips"], row["of"]) == (2, 3)
    assert row["values"]["rms"]["value"] == pytest.approx(0.75, rel=0.02)
    assert row["note"] == "left out 1: no reference recording has its name"
    [table] = compare([Loudness(paired=True)], None, [other], ["speech"])
    assert rows(table, name="x")[0]["note"] == "no recordings to compare with: give --reference"


def test_what_cannot_be_measured_is_named(make) -> None:
    folder = make("x", {"good": 0.1, "silent": 0.0, "nan": 0.1})
    (folder / "broken.wav").write_bytes(b"RIFF")
    (folder / "empty.wav").touch()
    [table, words] = compare([Loudness(), Loudness(needs_text=True)], None, [as_set(folder, "x")], ["speech"])
    [row] = table["rows"]
    assert (row["clips"], row["of"]) == (2, 5)  # a silent clip is a measurement: of silence
    assert row["values"]["rms"]["value"] == pytest.approx(0.05, rel=1e-3)
    assert "the measurement is not finite" in row["note"]
    assert "the file is empty (0 bytes)" in row["note"]
    [row] = words["rows"]
    assert (row["clips"], row["values"], row["note"]) == (0, {}, "left out 5: no text to compare with")


def test_metrics_of_speech_leave_other_domains_out(make) -> None:
    folder = make("x", {"a": 0.1, "b": 0.3})
    both = as_set(folder, "x", domains={"a": "speech", "b": "audio"})
    [table] = compare([Loudness(spoken=True)], None, [both], ["speech"])
    assert [(r["domain"], r["clips"]) for r in table["rows"]] == [("speech", 1)]
    [table] = compare([Loudness(spoken=True)], None, [both], ["german"])
    assert (table["rows"], "audio, speech" in table["problem"]) == ([], True)


def test_fad_of_few_clips(make) -> None:
    reference = as_set(make("r", {"a": 0.1, "b": 0.2, "c": 0.3}), "reference", "reference")
    one, two = as_set(make("x", {"a": 0.1}), "x"), as_set(make("y", {"a": 0.1, "b": 0.3}), "y")
    [table] = compare([build_frechet("spectral", torch.device("cpu"))], reference, [one, two], ["speech"])
    notes = {r["name"]: r["note"] for r in table["rows"]}
    assert notes["reference"] == "3 clips: too few for the distance between two halves"
    assert notes["x"] == "FAD needs two clips or more on both sides, got 1 and 3"
    assert rows(table, name="x")[0]["values"] == {}
    assert set(rows(table, name="y")[0]["values"]) == {"FAD"}
    assert "2 clips and 3 of the reference for 60 features" in notes["y"]


def test_the_reference_is_measured_once(make, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("AGREPA_CACHE", str(tmp_path / "cache"))
    folder = make("r", {"a": 0.1, "b": 0.2})
    reference = as_set(folder, "reference", "reference")

    def measured(fingerprint: str | None) -> tuple[int, float]:
        metric = Loudness(fingerprint=lambda: fingerprint)
        [table] = compare([metric], reference, [], ["speech"])
        return metric.calls, table["rows"][0]["values"]["rms"]["value"]

    assert measured("x") == (2, pytest.approx(0.15, rel=1e-3))
    assert measured("x") == (0, pytest.approx(0.15, rel=1e-3))
    assert measured("y")[0] == 2  # another model
    assert measured(None)[0] == measured(None)[0] == 2
    soundfile.write(folder / "a.wav", np.full(4000, 0.4), 16_000, subtype="FLOAT")  # another file
    assert measured("x") == (2, pytest.approx(0.3, rel=1e-3))
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-9])  # a damaged one is not believed
    assert measured("x") == (2, pytest.approx(0.3, rel=1e-3))
    monkeypatch.setattr(verdicts.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    monkeypatch.delenv("AGREPA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert measured("x")[0] == 2


def test_only_the_part_after_the_prompt_is_measured(make) -> None:
    folder = make("x", {"a": 0.5})
    clip = Recording("a", folder / "a.wav", "", "speech", start=0.1, seconds=0.05)
    assert read_sound(clip, 8000).shape == (400,)
    assert read_sound(clip, 8000, whole=True).shape == (1200,)
    with pytest.raises(UserError, match="ends before the measured part begins"):
        read_sound(Recording("a", folder / "a.wav", "", "speech", start=0.3), 8000)


def test_folders(make, tmp_path) -> None:
    for path, reason in ((tmp_path / "nosuch", "no such folder, list or run"), (tmp_path, "holds no sound files")):
        with pytest.raises(UserError, match=reason):
            read_set(path, "speech")
    inner = make("one", {"a": 0.1})
    (inner / "deep").mkdir()
    soundfile.write(inner / "deep" / "a.wav", np.ones(100), 16_000)
    with pytest.raises(UserError, match="has the name of"):
        keyed(read_set(inner, "speech")[0])
    partners = {"a": Recording("a", inner / "a.wav", "what a says", "german")}
    clips, listed = read_set(make("two", {"a": 0.1, "b": 0.1}), "audio")
    assert [(c.text, c.domain) for c in matched(keyed(clips), listed, partners, "two").clips] == [
        ("what a says", "german"),
        ("", "audio"),
    ]
    (tmp_path / "two" / "metadata.csv").write_text("audio_file|text\na.wav|own words\n")
    clips, listed = read_set(tmp_path / "two", "audio")
    [clip] = matched(keyed(clips), listed, partners, "two").clips
    assert (clip.text, clip.domain) == ("own words", "speech")
