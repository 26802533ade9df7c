"""Pieces of report.html: pictures, players, tables, numbers, and the page's style. All text comes out escaped."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..attribution.pictures import INK
from ..errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = '<p class="missing">not recorded in this run</p>'


def picture(path: Path, figure: Figure, label: str) -> str:
    """Saves `figure` as the PNG `path` and returns it as SVG in the page's own text colour and font."""
    import matplotlib

    png, vector = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=150)
    replace_file(path, png.getvalue())
    # Text stays text; a fixed salt keeps the ids, and so the whole page, the same at every writing.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(vector, format="svg", dpi=150, transparent=True, metadata=empty)
    svg = vector.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    # Several pictures share one page, and an id may occur once.
    for mark in (' id="', "url(#", 'href="#'):
        svg = svg.replace(mark, f"{mark}{path.stem}-")
    svg = svg.replace(INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return f'<figure class="picture">{svg}</figure>'


def player(run_dir: Path, name: str, label: str) -> str:
    path = (run_dir / name).resolve()
    caption = f"<span>{escape(label)}</span>"
    # A log says which files are read into the page; nothing outside the run belongs in it.
    if not path.is_relative_to(run_dir.resolve()):
        return f'<div class="clip">{caption}<p class="missing">{escape(name)} is not in the run folder</p></div>'
    if path.suffix == ".npy":
        return f'<div class="clip">{caption}<p class="note">latents, in {escape(name)}</p></div>'
    try:
        sound = base64.b64encode(path.read_bytes()).decode("ascii")
    except (OSError, ValueError):
        return f'<div class="clip">{caption}<p class="missing">{escape(name)} cannot be read</p></div>'
    source = f"data:audio/wav;base64,{sound}"
    return f'<div class="clip">{caption}<audio controls preload="metadata" src="{source}"></audio></div>'


def tile(title: str, value: str, note: str) -> str:
    shown = f'<p class="value">{value}</p>' if value else '<p class="value missing">not recorded</p>'
    return f'<div class="tile"><p class="name">{title}</p>{shown}<p class="note">{note}</p></div>'


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    chosen: Sequence[bool] = (),
    text_columns: int = 1,
) -> str:
    """A table of ready HTML cells; the first `text_columns` columns are words, the others numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ["" if i < text_columns else ' class="number"' for i in range(len(cells))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells))

    marks = [' class="chosen"' if mark else "" for mark in chosen] or [""] * len(rows)
    body = "".join(f"<tr{mark}>{line(row, 'td')}</tr>" for mark, row in zip(marks, rows, strict=True))
    head = f"<thead><tr>{line(header, 'th')}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def facts(pairs: Iterable[tuple[Any, Any]]) -> str:
    rows = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(shown(value))}</dd>" for key, value in pairs)
    return f"<dl>{rows}</dl>" if rows else ""


def span(values: Sequence[float]) -> str:
    if not values:
        return ""
    return significant(values[0]) if len(values) == 1 else f"{significant(values[0])} &rarr; {significant(values[-1])}"


def significant(value: float, digits: int = 4) -> str:
    """`value` with so many significant digits."""
    return f"{value:#.{digits}g}".rstrip(".")


def count(value: float) -> str:
    return f"{round(value):,}"


def duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def shown(value: Any) -> str:
    """A value of unknown kind as text: numbers like the others of the page, the rest as JSON or as it is."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return significant(value)
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return words(value)


def words(value: Any) -> str:
    return "" if value is None else str(value)


def replace_file(path: Path, content: bytes) -> None:
    """Writes `content` beside `path` and moves it there in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); check the folder and its free space") from error


CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1d2129; --quiet: #667080;
  --line: #e1e4ea; --accent: #b83f77; --wash: #fbeef4; }
@media (prefers-color-scheme: dark) { :root { --page: #121418; --card: #1a1d23; --ink: #e4e7ec;
  --quiet: #939cab; --line: #2c313a; --accent: #e57fae; --wash: #33222c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 36px 24px 72px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; font-weight: 650; letter-spacing: -0.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 14px; font-weight: 650; }
h3 { font-size: 14px; margin: 22px 0 8px; font-weight: 650; }
p { margin: 0 0 10px; }
section > :last-child { margin-bottom: 0; }
.kind { color: var(--quiet); margin: 0; font-size: 13px; }
.status { color: var(--quiet); margin: 4px 0 14px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13.5px; margin-bottom: 22px; }
nav a { color: var(--quiet); text-decoration: none; border-bottom: 1px solid var(--line); }
nav a:hover { color: var(--accent); border-color: var(--accent); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px;
  margin-bottom: 18px; }
section.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1px; padding: 0; overflow: hidden;
  background: var(--line); }
@media (max-width: 760px) { section.tiles { grid-template-columns: repeat(2, 1fr); } }
.tile { background: var(--card); padding: 15px 20px 12px; }
.tile p { margin: 0; }
.tile .name { color: var(--quiet); font-size: 13px; }
.tile .value { font-size: 22px; font-weight: 600; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; }
.tile .value.missing { font-size: 15px; font-weight: 400; padding: 5px 0; letter-spacing: 0; }
.note, .quiet { color: var(--quiet); font-size: 13px; font-variant-numeric: tabular-nums; }
.tile .note { min-height: 20px; }
.missing { color: var(--quiet); font-style: italic; }
.picture { margin: 0 0 14px; color: var(--ink); }
.picture svg { display: block; width: 100%; height: auto; }
.picture svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { color: var(--quiet); font-weight: 500; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th, td { padding: 5px 22px 5px 8px; vertical-align: top; }
td { border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
tbody tr:last-child td { border-bottom: 0; }
th.number, td.number { text-align: right; white-space: nowrap; }
tr.chosen td { background: var(--wash); }
tr.chosen td:first-child, tr.chosen td:last-child { color: var(--accent); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 24px; margin: 12px 0 0;
  font-size: 13.5px; }
dt { color: var(--quiet); }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.card { border-top: 1px solid var(--line); padding: 14px 0 6px; }
.card:first-of-type { border-top: 0; padding-top: 0; }
.words { max-width: 75ch; overflow-wrap: anywhere; }
.pill { font-size: 12px; border: 1px solid var(--line); border-radius: 99px; padding: 1px 9px;
  margin-right: 10px; color: var(--quiet); }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(178px, 1fr)); gap: 10px 14px; }
.clip span { display: block; font-size: 13px; color: var(--quiet); }
.clip audio { width: 100%; height: 36px; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--quiet); }
pre { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto;
  margin: 12px 0 0; tab-size: 2; }
@media print { section { break-inside: avoid; } nav { display: none; } }
"""
