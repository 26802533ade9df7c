"""Pictures of stored training runs: docs/figures/run-NAME.png from bench/results/training/NAME.json.

`python -m agrepa_fast.bench.runs RUN bench/results/training/NAME.json COMMAND` stores the probes of a run's folder and
the command that made it; `agrepa bench report` draws the picture.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agrepa_fast.report import read_log
from agrepa_fast.report.log import current_timeline, last_entry
from agrepa_fast.report.probes import plot_probes, read_probes

from . import figures

VERSION = 5  # raise it when the drawing changes, so that stored pictures count as outdated


def store(run: Path, target: Path, command: str) -> None:
    """Write the probes of a run, the command that made it, and where it ran."""
    log = current_timeline(read_log(run / "log.jsonl"))
    start = last_entry(log, "start")
    facts = {
        "command": command,
        **{name: start.get(name) for name in ("versions", "device", "precision", "ranks", "clips", "domains")},
        "probes": [entry for entry in log if entry.get("event") == "probe"],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def outdated(root: Path, check: bool = False) -> list[Path]:
    """Draw the pictures of the stored runs that do not show what is stored; return them. `check` changes nothing."""
    changed = []
    stored = sorted((root / "bench" / "results" / "training").glob("*.json"))
    for path in stored:
        run = json.loads(path.read_text(encoding="utf-8"))
        picture, digest = root / "docs" / "figures" / f"run-{path.stem}.png", _digest(run)
        if figures.stored_digest(picture) != digest:
            changed.append(picture)
            if not check:
                figures.save(lambda run=run: plot_probes(read_probes(run["probes"])), digest, picture)  # type: ignore[misc]
    for picture in sorted((root / "docs" / "figures").glob("run-*")):
        if picture.stem.removeprefix("run-") not in {path.stem for path in stored}:
            changed.append(picture)
            if not check:
                picture.unlink()
    return changed


def _digest(run: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([VERSION, run["probes"]], sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("expected: python -m agrepa_fast.bench.runs RUN bench/results/training/NAME.json COMMAND")
    store(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
