"""The pictures of stored runs show what is stored, and the docs say what it says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from agrepa_fast.bench import figures, runs
from agrepa_fast.report.probes import read_probes, stability

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "bench" / "results" / "training" / "scd-demo.json"


def test_the_docs_say_what_the_stored_run_says():
    run = json.loads(STORED.read_text(encoding="utf-8"))
    probes = read_probes(run["probes"])
    last, rows = probes[-1], stability(probes)[1:]
    rhos = [rho for rho, _ in rows]
    speech, audio = (last.domains[name] for name in ("speech", "audio"))
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "attribution.md").read_text(encoding="utf-8"))
    said = [
        f"from step {probes[0].step:.0f} to step {last.step:.0f}",
        f"rank correlation of {min(rhos):.2f} to {max(rhos):.2f}",
        f"{speech.spearman:.2f} for speech (95 % interval {speech.low:.2f} to {speech.high:.2f})",
        f"{audio.spearman:.2f} for audio ({audio.low:.2f} to {audio.high:.2f})",
        f"same three layers in {last.certainty:.0%} of".replace("%", " %"),
        f"share {last.overlap[last.clips.index(16)]:.0%} of".replace("%", " %"),
        f"this much ({last.agreement[last.clips.index(32)]:.0%})".replace("%", " %"),
        f"took {last.share:.0%} of the run's time".replace("%", " %"),
    ]
    assert [sentence for sentence in said if sentence not in text] == []
    assert [bool(changed) for _, changed in rows] == [True] + [False] * (len(rows) - 1)  # changed once, at the second


def test_a_stored_run_is_drawn_once(tmp_path):
    folder = tmp_path / "bench" / "results" / "training"
    folder.mkdir(parents=True)
    shutil.copy(STORED, folder / "one.json")
    picture = tmp_path / "docs" / "figures" / "run-one.png"
    assert runs.outdated(tmp_path, check=True) == [picture]
    assert not picture.exists()
    assert runs.outdated(tmp_path) == [picture]
    assert runs.outdated(tmp_path) == []
    assert figures.stored_digest(picture)
    (folder / "one.json").unlink()
    assert runs.outdated(tmp_path) == [picture]
    assert not picture.exists()


def test_only_the_probes_of_a_run_are_stored(tmp_path):
    log = [
        {"event": "start", "device": "cpu", "versions": {"torch": "2"}},
        {"event": "train", "step": 1},
        {"event": "probe", "step": 2, "foga": [1.0, 2.0]},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
    runs.store(tmp_path, tmp_path / "stored" / "x.json", "agrepa train demo")
    stored = json.loads((tmp_path / "stored" / "x.json").read_text(encoding="utf-8"))
    assert stored["command"] == "agrepa train demo"
    assert stored["probes"] == log[2:]
    assert stored["versions"] == {"torch": "2"}
