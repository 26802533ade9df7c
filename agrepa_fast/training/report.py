"""report.html: what a run did, in one file that needs nothing beside it.

Reads a run folder (log.jsonl, config.yaml, foga.csv, selection.json, samples/) and writes report.html with
every picture, sound and style inside, and the pictures as PNG next to it.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..attribution.report import INK, plot_layer_t_map, plot_scores, unit_weight
from ..attribution.scores import LayerScores, read_scores
from ..errors import UserError
from .plots import (
    COSINE,
    DOMAIN_LOSS,
    current_timeline,
    keys_under,
    number,
    plot_cosines,
    plot_losses,
    series,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Log = list[dict[str, Any]]

MISSING = '<p class="missing">not recorded in this run</p>'
SKIPPED_SHOWN = 20
PROBES_SHOWN = 12
PROMPTS_SHOWN = 12
STEPS_PER_PROMPT = 4


@dataclass(frozen=True)
class Selection:
    """selection.json: layers with their weights, and what else the file says about how they were chosen."""

    layers: tuple[int, ...]
    weights: tuple[float, ...]
    facts: dict[str, Any]


def read_log(path: Path) -> Log:
    """The entries of a log.jsonl, in order.

    A last line that a crash cut short is dropped. Any other line that is not a JSON object comes back as
    `{"event": "unreadable", "line": n}`, n counted from 1, so that one bad line does not cost the report.
    Raises `UserError` where the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read the log ({error.strerror}); give a run's log.jsonl") from error
    log: Log = []
    for count, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            log.append(entry)
        elif count < len(lines):  # every complete line ends with a newline, so the last piece is a torn one
            log.append({"event": "unreadable", "line": count})
    return log


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir`/report.html and its pictures (loss, cosine, foga, foga_map .png); returns its path.

    What the run has not recorded is said so in its section. Files are replaced whole, so a reader never sees
    half a report. Raises `UserError` where the folder does not exist or matplotlib is not installed.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder; give the folder that holds log.jsonl")
    log_path = run_dir / "log.jsonl"
    whole_log = read_log(log_path) if log_path.exists() else []
    log = current_timeline(whole_log)
    selection, selection_problem = _read_selection(run_dir / "selection.json")
    scores, scores_problem = _read_scores(run_dir / "foga.csv")
    if scores is not None and selection is not None and isinstance(selection.facts.get("metric"), str):
        scores = replace(scores, metric=selection.facts["metric"])  # the CSV does not say which one it holds
    skipped = _skipped(whole_log)

    sections = [
        ("loss", "Flow loss", _loss_section(run_dir, log)),
        ("cosine", "Alignment", _cosine_section(run_dir, log)),
        ("foga", "Layer contribution (FoG-A)", scores_problem or _foga_section(run_dir, scores, selection)),
        ("selection", "Selected layers", _selection_section(log, selection, selection_problem)),
        ("samples", "Samples", _samples_section(run_dir, log)),
        ("skipped", "Skipped files", _skipped_section(whole_log, skipped)),
        ("config", "Configuration", _config_section(run_dir / "config.yaml")),
        ("versions", "Environment", _versions_section(whole_log)),
    ]
    name = escape(run_dir.resolve().name)
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{escape(title)}</h2>{content}</section>' for key, title, content in sections
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # The browser itself holds the promise that the page loads nothing and runs nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:; media-src data:\">"
        f"<title>{name} · agrepa-fast</title><style>{CSS}</style></head><body><main>"
        f'<header><p class="kind">Training run</p><h1>{name}</h1>'
        f'<p class="status">{_status(log, whole_log)}</p>'
        f"<nav>{links}</nav></header>"
        f'<section id="summary" class="tiles">{_summary(log, selection, len(skipped))}</section>{body}'
        "</main></body></html>\n"
    )
    target = run_dir / "report.html"
    # A name or text with half a surrogate pair must not cost the page.
    _replace(target, page.encode("utf-8", errors="replace"))
    return target


# --- sections -----------------------------------------------------------------------------------------------


def _summary(log: Log, selection: Selection | None, skipped: int) -> str:
    start = _last(log, "start")
    clips = _group(start, "clips")
    tiles = []

    event, steps, values = _first_recorded(log, "flow_loss")
    title = "Valid flow loss" if event == "valid" else "Train flow loss" if event else "Flow loss"
    note = ""
    if len(values) > 1:
        ratio = f"last / first {_figure(values[-1] / values[0], 3)}" if values[0] else "first is zero"
        note = f"{ratio}, step {_count(steps[0])} to {_count(steps[-1])}"
    elif values:
        note = f"step {_count(steps[0])}"
    tiles.append(_tile(title, _span(values), note))

    first, last, shared, event = _mean_cosines(log)
    note = f"{event}, mean over {shared} teacher/layer pair{'s' if shared != 1 else ''}" if shared else ""
    tiles.append(_tile("Raw cosine", f"{first:.4f} &rarr; {last:.4f}" if shared else "", note))

    layers = ", ".join(str(layer) for layer in selection.layers) if selection else ""
    weights = ", ".join(f"{weight:.2f}" for weight in selection.weights) if selection else ""
    tiles.append(_tile("Selected layers", escape(layers), f"weights {weights}" if weights else ""))

    train, valid = number(clips.get("train")), number(clips.get("valid"))
    counts = [f"{_count(valid)} valid"] if valid is not None else []
    if counts or skipped:
        counts.append(f"{_count(skipped)} skipped")
    tiles.append(_tile("Training clips", _count(train) if train is not None else "", ", ".join(counts)))

    seconds = number(_last(log, "end").get("seconds"))
    step = _last_step(log)
    tiles.append(
        _tile(
            "Time",
            _duration(seconds) if seconds is not None else "",
            f"{_count(step)} steps" if step is not None else "",
        )
    )

    speed, frames = (
        series(log, "train", "samples_per_second")[1],
        series(log, "train", "frames_per_second")[1],
    )
    note = "median"
    if len(frames):
        note += f", {_count(median(frames))} frames/s"
    tiles.append(_tile("Samples per second", _figure(median(speed)) if len(speed) else "", note if len(speed) else ""))
    return "".join(tiles)


def _loss_section(run_dir: Path, log: Log) -> str:
    keys = ["flow_loss", *keys_under(log, DOMAIN_LOSS)]
    if not any(len(series(log, event, key)[0]) for event in ("train", "valid") for key in keys):
        return MISSING
    rows = []
    for key in keys:
        steps, values = series(log, "valid", key)
        if len(values):
            best = int(values.argmin())
            rows.append(
                [
                    escape(key.removeprefix(DOMAIN_LOSS)) if key != "flow_loss" else "all domains",
                    _figure(values[0]),
                    _figure(values[-1]),
                    _figure(values[-1] / values[0], 3) if values[0] else "",
                    f"{_figure(values[best])} <span class='quiet'>at {_count(steps[best])}</span>",
                ]
            )
    table = _table(["valid flow loss", "first", "last", "last / first", "lowest"], rows) if rows else ""
    return _picture(run_dir / "loss.png", plot_losses(log), "Flow loss over the training steps") + table


def _cosine_section(run_dir: Path, log: Log) -> str:
    rows = []
    for key in keys_under(log, COSINE):
        teacher, _, layer = key.removeprefix(COSINE).rpartition("/")
        event = "valid" if len(series(log, "valid", key)[1]) else "train"
        values = series(log, event, key)[1]
        if len(values):
            rows.append([escape(teacher), escape(layer), event, f"{values[0]:.4f}", f"{values[-1]:.4f}"])
    if not rows:
        return MISSING
    table = _table(["teacher", "layer", "measured in", "first cosine", "last cosine"], rows, text_columns=3)
    return _picture(run_dir / "cosine.png", plot_cosines(log), "Raw cosine by teacher and layer") + table


def _foga_section(run_dir: Path, scores: LayerScores | None, selection: Selection | None) -> str:
    if scores is None:
        return MISSING
    parts = [
        '<p class="note">Change of the predicted velocity when one layer is switched off, relative to the '
        f"velocity; {_count(scores.by_sample.shape[1])} samples, metric {escape(scores.metric)}, layers "
        "counted from 0. Whiskers and &plusmn; are one standard error.</p>",
        _picture(run_dir / "foga.png", plot_scores(scores, selection), "FoG-A score of every layer"),
    ]
    if scores.t is None:
        parts.append('<p class="missing">score by layer and t: not recorded in this run</p>')
    else:
        picture = plot_layer_t_map(scores)
        parts.append(_picture(run_dir / "foga_map.png", picture, "FoG-A score by layer and flow time"))
    return "".join(parts) + _foga_table(scores, selection)


def _foga_table(scores: LayerScores, selection: Selection | None) -> str:
    domains = scores.by_domain() if len(scores.by_domain()) > 1 else {}
    columns = [(part.mean, part.stderr) for part in (scores, *domains.values())]
    means = scores.mean.nan_to_num(float("-inf"))
    rows, chosen = [], []
    for unit, name in enumerate(scores.names):
        weight = unit_weight(name, selection)
        cells = [escape(name), _count(1 + int((means > means[unit]).sum()))]
        for mean, stderr in columns:
            spread = float(stderr[unit])
            error = f" <span class='quiet'>&plusmn; {_figure(spread, 2)}</span>" if math.isfinite(spread) else ""
            cells.append(_figure(float(mean[unit])) + error)
        rows.append([*cells, "" if weight is None else f"{weight:.3f}"])
        chosen.append(weight is not None)
    unit_title = "branch" if any("." in name for name in scores.names) else "layer"
    header = [unit_title, "rank", "score", *map(escape, domains), "weight"]
    return _table(header, rows, chosen)


def _selection_section(log: Log, selection: Selection | None, problem: str) -> str:
    parts = [problem]
    if selection is not None:
        rows = [[str(layer), f"{weight:.4f}"] for layer, weight in zip(selection.layers, selection.weights)]
        parts.append(_table(["layer", "weight"], rows))
        parts.append(_facts(selection.facts.items()))
    probes = [entry for entry in log if entry.get("event") == "probe"]
    if probes:
        rows = []
        for probe in probes[-PROBES_SHOWN:]:
            choice = _group(probe, "selection")
            layers, weights = choice.get("layers"), choice.get("weights")
            rows.append(
                [
                    _shown(probe.get("step")),
                    escape(", ".join(map(str, layers))) if isinstance(layers, list) else "",
                    escape(", ".join(_shown(weight) for weight in weights)) if isinstance(weights, list) else "",
                    _shown(probe.get("seconds")),
                    _shown(probe.get("block_evaluations")),
                ]
            )
        older = len(probes) - len(rows)
        parts.append(f"<h3>Probes</h3>{_table(['step', 'layers', 'weights', 'seconds', 'block evaluations'], rows)}")
        if older:
            parts.append(f'<p class="note">{_count(older)} earlier probes are in log.jsonl.</p>')
    return "".join(parts) or MISSING


def _samples_section(run_dir: Path, log: Log) -> str:
    prompts: dict[tuple[str, str, str], dict[Any, str]] = {}
    for entry in log:
        if entry.get("event") == "sample" and isinstance(entry.get("path"), str):
            prompt = (_text(entry.get("text")), _text(entry.get("domain")), _text(entry.get("reference")))
            step = number(entry.get("step"))
            prompts.setdefault(prompt, {})[step] = entry["path"]
    if not prompts:
        return MISSING
    cards = []
    for (text, domain, reference), by_step in list(prompts.items())[:PROMPTS_SHOWN]:
        # The first and the newest always, and evenly spaced ones between: progress can be heard.
        steps = sorted(by_step, key=lambda step: -1.0 if step is None else step)
        count = min(STEPS_PER_PROMPT, len(steps))
        picked = [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count - 1)] + [steps[-1]]
        clips = [_player(run_dir, reference, "reference")] if reference else []
        clips += [
            _player(run_dir, by_step[step], f"step {_count(step)}" if step is not None else "sample") for step in picked
        ]
        left = len(steps) - len(picked)
        note = f'<p class="note">{_count(left)} more steps are in the run folder.</p>' if left else ""
        label = f'<span class="pill">{escape(domain)}</span>' if domain else ""
        words = escape(text) if text else '<span class="missing">no text</span>'
        cards.append(
            f'<div class="card"><p class="words">{label}{words}</p>'
            f'<div class="clips">{"".join(clips)}</div>{note}</div>'
        )
    left = len(prompts) - len(cards)
    if left:
        cards.append(f'<p class="note">Samples of {_count(left)} more texts are in the run folder.</p>')
    return "".join(cards)


def _skipped_section(whole_log: Log, skipped: Sequence[dict[str, Any]]) -> str:
    if not _last(whole_log, "start") and not skipped:
        return MISSING
    if not skipped:
        return "<p>No file was skipped.</p>"
    rows = [
        [
            escape(_text(entry.get("path"))),
            escape(_text(entry.get("source"))),
            escape(_text(entry.get("reason"))),
        ]
        for entry in skipped[:SKIPPED_SHOWN]
    ]
    one = len(skipped) == 1
    shown = f"; the first {SKIPPED_SHOWN} are shown, all are in log.jsonl" if len(skipped) > SKIPPED_SHOWN else ""
    lead = f"<p>{_count(len(skipped))} file{'' if one else 's'} could not be used{shown}.</p>"
    return lead + _table(["file", "source", "reason"], rows, text_columns=3)


def _config_section(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return MISSING
    return f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"


def _versions_section(log: Log) -> str:
    start = _last(log, "start")
    first = next((entry for entry in log if entry.get("event") == "start"), {})
    facts: list[tuple[str, Any]] = [("started", first.get("time")), ("device", start.get("device"))]
    for group, suffix in (("parameters", " parameters"), ("domains", " clips")):
        facts += [(f"{key}{suffix}", value) for key, value in _group(start, group).items()]
    facts += [(key, value) for key, value in _group(start, "versions").items()]
    return _facts(pair for pair in facts if pair[1] is not None) or MISSING


def _status(log: Log, whole_log: Log) -> str:
    state = next(
        (entry for entry in reversed(log) if entry.get("event") in ("start", "resume", "interrupted", "end")),
        {},
    )
    step = _last_step(log)
    where = f" at step {_count(step)}" if step is not None else ""
    if state.get("event") == "end":
        words = f"Finished{where}"
    elif state.get("event") == "interrupted":
        words = f"Interrupted{where}; it can be resumed"
    elif log:
        words = f"No end recorded; last entry{where}" if where else "No end recorded"
    else:
        words = "No log recorded"
    resumes = sum(entry.get("event") == "resume" for entry in whole_log)
    if resumes:
        words += f", resumed {'once' if resumes == 1 else f'{resumes} times'}"
    unreadable = [entry.get("line") for entry in whole_log if entry.get("event") == "unreadable"]
    if unreadable:
        lines = ", ".join(str(line) for line in unreadable[:5]) + (", ..." if len(unreadable) > 5 else "")
        words += f". Unreadable in log.jsonl, left out: line{'s' if len(unreadable) > 1 else ''} {lines}"
    return escape(words)


# --- what the run folder holds ------------------------------------------------------------------------------


def _read_scores(path: Path) -> tuple[LayerScores | None, str]:
    """The scores, or None and (where the file is there but broken) a paragraph that says what is wrong."""
    if not path.exists():
        return None, ""
    try:
        return read_scores(path), ""
    except (ValueError, OSError) as error:
        return None, f'<p class="missing">{escape(str(error))}</p>'


def _read_selection(path: Path) -> tuple[Selection | None, str]:
    if not path.exists():
        return None, ""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        layers, weights = tuple(facts.pop("layers")), tuple(float(weight) for weight in facts.pop("weights"))
        if len(layers) != len(weights):
            raise ValueError(f"{len(layers)} layers but {len(weights)} weights")
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        return None, f'<p class="missing">{escape(f"{path.name} cannot be shown: {reason}")}</p>'
    return Selection(layers, weights, facts), ""


def _skipped(log: Log) -> list[dict[str, Any]]:
    """The skipped files once each: a resumed run names them again."""
    by_path: dict[str, dict[str, Any]] = {}
    for entry in log:
        if entry.get("event") == "skipped":
            by_path.setdefault(_text(entry.get("path")), entry)
    return list(by_path.values())


def _last(log: Log, event: str) -> dict[str, Any]:
    return next((entry for entry in reversed(log) if entry.get("event") == event), {})


def _group(entry: dict[str, Any], key: str) -> dict[str, Any]:
    """The dict under `key`; empty where the entry has none."""
    value = entry.get(key)
    return value if isinstance(value, dict) else {}


def _last_step(log: Log) -> float | None:
    return next((step for entry in reversed(log) if (step := number(entry.get("step"))) is not None), None)


def _first_recorded(log: Log, key: str) -> tuple[str, list[float], list[float]]:
    """Event, steps and values of `key`: from the validation where it was run, else from training."""
    for event in ("valid", "train"):
        steps, values = series(log, event, key)
        if len(values):
            return event, steps.tolist(), values.tolist()
    return "", [], []


def _mean_cosines(log: Log) -> tuple[float, float, int, str]:
    """First and last mean cosine over the pairs that both entries hold, how many pairs, and in which event.

    Layers may change while training: a mean over different pairs would not be comparable.
    """
    for event in ("valid", "train"):
        entries = [
            {key: value for key in entry if key.startswith(COSINE) and (value := number(entry[key])) is not None}
            for entry in log
            if entry.get("event") == event
        ]
        entries = [entry for entry in entries if entry]
        if entries:
            shared = sorted(entries[0].keys() & entries[-1].keys())
            if shared:
                first, last = (sum(entry[key] for key in shared) / len(shared) for entry in (entries[0], entries[-1]))
                return first, last, len(shared), event
    return math.nan, math.nan, 0, ""


# --- pieces of the page -------------------------------------------------------------------------------------


def _picture(path: Path, figure: Figure, label: str) -> str:
    """Saves `figure` as the PNG `path` and returns it as SVG in the page's own text colour and font."""
    import matplotlib

    png, vector = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=150)
    _replace(path, png.getvalue())
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


def _player(run_dir: Path, name: str, label: str) -> str:
    path = (run_dir / name).resolve()
    caption = f"<span>{escape(label)}</span>"
    # A log says which files are read into the page; nothing outside the run belongs in it.
    if not path.is_relative_to(run_dir.resolve()):
        return f'<div class="clip">{caption}<p class="missing">{escape(name)} is not in the run folder</p></div>'
    try:
        sound = base64.b64encode(path.read_bytes()).decode("ascii")
    except (OSError, ValueError):
        return f'<div class="clip">{caption}<p class="missing">{escape(name)} cannot be read</p></div>'
    source = f"data:audio/wav;base64,{sound}"
    return f'<div class="clip">{caption}<audio controls preload="metadata" src="{source}"></audio></div>'


def _tile(title: str, value: str, note: str) -> str:
    shown = f'<p class="value">{value}</p>' if value else '<p class="value missing">not recorded</p>'
    return f'<div class="tile"><p class="name">{title}</p>{shown}<p class="note">{note}</p></div>'


def _table(
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


def _facts(pairs: Iterable[tuple[Any, Any]]) -> str:
    rows = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(_shown(value))}</dd>" for key, value in pairs)
    return f"<dl>{rows}</dl>" if rows else ""


def _span(values: Sequence[float]) -> str:
    if not values:
        return ""
    return _figure(values[0]) if len(values) == 1 else f"{_figure(values[0])} &rarr; {_figure(values[-1])}"


def _figure(value: float, digits: int = 4) -> str:
    """`value` with so many significant digits."""
    return f"{value:#.{digits}g}".rstrip(".")


def _count(value: float) -> str:
    return f"{round(value):,}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _shown(value: Any) -> str:
    """A value of unknown kind as text: numbers like the others of the page, the rest as JSON or as it is."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return _figure(value)
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return _text(value)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _replace(path: Path, content: bytes) -> None:
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
summary { cursor: pointer; color: var(--quiet); }
pre { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto;
  margin: 12px 0 0; tab-size: 2; }
@media print { section { break-inside: avoid; } nav { display: none; } }
"""
