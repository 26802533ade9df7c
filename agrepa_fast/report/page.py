"""report.html: what a run did, in one file that needs nothing beside it.

It is made from a run's folder alone (log.jsonl, config.yaml, foga.csv, scd.json, selection.json, samples/). Every
picture, sound and style is inside the page; the pictures are also written as PNG next to it.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from . import (
    config,
    cosine,
    evaluation,
    foga,
    html,
    loss,
    probes,
    samples,
    scd,
    selection,
    skipped,
    summary,
    versions,
    vitals,
)
from .folder import read_folder

SECTIONS = (
    ("loss", "Flow loss", loss.section),
    ("cosine", "Alignment", cosine.section),
    ("foga", "Layer contribution (FoG-A)", foga.section),
    ("scd", "What layers store (LASP) and what they use (FoG-A)", scd.section),
    ("probes", "Store and contribute over time", probes.section),
    ("selection", "Selected layers", selection.section),
    ("vitals", "Speed and health", vitals.section),
    ("samples", "Samples", samples.section),
    ("evaluation", "Evaluation", evaluation.section),
    ("skipped", "Skipped files", skipped.section),
    ("config", "Configuration", config.section),
    ("versions", "Environment", versions.section),
)


def write_report(run_dir: str | Path) -> Path:
    """Write report.html and its pictures (loss, cosine, foga, foga_map, scd, probes .png) into a run's folder.

    A section says so where the run has not recorded what it shows. Files are replaced as a whole: nobody reads half
    a report. Returns the path of report.html.

    Raises:
        UserError: no such folder, something cannot be written, or matplotlib is not installed.
    """
    run = read_folder(Path(run_dir))
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in SECTIONS)
    body = "".join(
        f'<section id="{key}"><h2>{escape(title)}</h2>{section(run)}</section>' for key, title, section in SECTIONS
    )
    tiles = f'<section id="summary" class="tiles">{summary.section(run)}</section>'
    status = "</p><p>".join(filter(None, [summary.status(run), escape(summary.remark(run.path))]))
    head = f'<p class="status">{status}</p><nav>{links}</nav>'
    return write_page(run.path / "report.html", "Training run", run.path.resolve().name, head, tiles + body)


def write_evaluation_page(folder: str | Path) -> Path:
    """Write evaluation.html beside the evaluation.json in a folder: its tables alone. Returns its path.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(folder)
    body = f'<section id="evaluation">{evaluation.tables(folder / evaluation.FILE)}</section>'
    return write_page(folder / "evaluation.html", "Evaluation", folder.resolve().parent.name, "", body)


def write_page(target: Path, kind: str, name: str, head: str, body: str) -> Path:
    """Write a page that needs nothing beside it; `head` and `body` are HTML. Returns its path."""
    name = escape(name)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # The browser itself holds the promise that the page loads nothing and runs nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:; media-src data:\">"
        f"<title>{name} · agrepa-fast</title><style>{html.CSS}</style></head><body><main>"
        f'<header><p class="kind">{kind}</p><h1>{name}</h1>{head}</header>{body}'
        "</main></body></html>\n"
    )
    # A name or text with half a surrogate pair must not cost the page.
    html.replace_file(target, page.encode("utf-8", errors="replace"))
    return target
