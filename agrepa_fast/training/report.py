"""report.html: what a run did, in one file that needs nothing beside it.

Reads a run folder (log.jsonl, config.yaml, foga.csv, scd.json, selection.json, samples/) and writes report.html with
every picture, sound and style inside, and the pictures as PNG next to it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from ..attribution.report import plot_layer_t_map, plot_scores, unit_weight
from ..attribution.scd import plot_scd, read_scd
from ..attribution.scores import LayerScores, read_scores
from ..errors import UserError
from . import page as html
from .plots import (
    COSINE,
    DOMAIN_LOSS,
    SIMILARITIES,
    current_timeline,
    keys_under,
    number,
    plot_cosines,
    plot_losses,
    series,
    similarity_keys,
    similarity_name,
)
from .vitals import vitals_section

Log = list[dict[str, Any]]

MISSING = '<p class="missing">not recorded in this run</p>'
SKIPPED_SHOWN = 20
PROBES_SHOWN = 12
PROMPTS_SHOWN = 12
STEPS_PER_PROMPT = 4


@dataclass(frozen=True)
class Aligned:
    """The layers of one selection, their weights and, where these go by flow time, {t: weights}."""

    layers: tuple[int, ...]
    weights: tuple[float, ...]
    by_time: dict[float, tuple[float, ...]]


@dataclass(frozen=True)
class Selection:
    """selection.json: one selection for all teachers (under an empty name) or one for each, and the other facts."""

    teachers: dict[str, Aligned]
    facts: dict[str, Any]

    def drawn(self) -> Aligned | dict[str, Aligned]:
        """As `plot_scores` takes it."""
        return self.teachers.get("", self.teachers)


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
    """Writes `run_dir`/report.html and its pictures (loss, cosine, foga, foga_map, scd .png); returns its path.

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
        ("scd", "What layers store (LASP) and what they use (FoG-A)", _scd_section(run_dir)),
        ("selection", "Selected layers", _selection_section(log, selection, selection_problem)),
        ("vitals", "Speed and health", vitals_section(log) or MISSING),
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
        f"<title>{name} · agrepa-fast</title><style>{html.CSS}</style></head><body><main>"
        f'<header><p class="kind">Training run</p><h1>{name}</h1>'
        f'<p class="status">{_status(log, whole_log)}</p>'
        f"<nav>{links}</nav></header>"
        f'<section id="summary" class="tiles">{_summary(log, selection, len(skipped))}</section>{body}'
        "</main></body></html>\n"
    )
    target = run_dir / "report.html"
    # A name or text with half a surrogate pair must not cost the page.
    html.replace_file(target, page.encode("utf-8", errors="replace"))
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
        ratio = f"last / first {html.significant(values[-1] / values[0], 3)}" if values[0] else "first is zero"
        note = f"{ratio}, step {html.count(steps[0])} to {html.count(steps[-1])}"
    elif values:
        note = f"step {html.count(steps[0])}"
    tiles.append(html.tile(title, html.span(values), note))

    first, last, shared, event = _mean_cosines(log)
    note = f"{event}, mean over {shared} teacher/layer pair{'s' if shared != 1 else ''}" if shared else ""
    name = similarity_name(similarity_keys(log)).capitalize()
    tiles.append(html.tile(name, f"{first:.4f} &rarr; {last:.4f}" if shared else "", note))

    chosen = selection.teachers if selection else {}
    layers = _by_teacher({name: ", ".join(map(str, own.layers)) for name, own in chosen.items()})
    weights = _by_teacher({name: ", ".join(f"{w:.2f}" for w in own.weights) for name, own in chosen.items()})
    tiles.append(html.tile("Selected layers", escape(layers), f"weights {escape(weights)}" if weights else ""))

    train, valid = number(clips.get("train")), number(clips.get("valid"))
    counts = [f"{html.count(valid)} valid"] if valid is not None else []
    if counts or skipped:
        counts.append(f"{html.count(skipped)} skipped")
    tiles.append(html.tile("Training clips", html.count(train) if train is not None else "", ", ".join(counts)))

    seconds = number(_last(log, "end").get("seconds"))
    step = _last_step(log)
    tiles.append(
        html.tile(
            "Time",
            html.duration(seconds) if seconds is not None else "",
            f"{html.count(step)} steps" if step is not None else "",
        )
    )

    speed, frames = (
        series(log, "train", "samples_per_second")[1],
        series(log, "train", "frames_per_second")[1],
    )
    note = "median"
    if len(frames):
        note += f", {html.count(median(frames))} frames/s"
    tiles.append(
        html.tile(
            "Samples per second", html.significant(median(speed)) if len(speed) else "", note if len(speed) else ""
        )
    )
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
                    html.significant(values[0]),
                    html.significant(values[-1]),
                    html.significant(values[-1] / values[0], 3) if values[0] else "",
                    f"{html.significant(values[best])} <span class='quiet'>at {html.count(steps[best])}</span>",
                ]
            )
    table = html.table(["valid flow loss", "first", "last", "last / first", "lowest"], rows) if rows else ""
    return html.picture(run_dir / "loss.png", plot_losses(log), "Flow loss over the training steps") + table


def _cosine_section(run_dir: Path, log: Log) -> str:
    rows = []
    keys = similarity_keys(log)
    for key in keys:
        teacher, _, layer = key.removeprefix(COSINE).rpartition("/")
        event = "valid" if len(series(log, "valid", key)[1]) else "train"
        values = series(log, event, key)[1]
        if len(values):
            rows.append([escape(teacher), escape(layer), event, f"{values[0]:.4f}", f"{values[-1]:.4f}"])
    if not rows:
        return MISSING
    name = similarity_name(keys)
    first_and_last = ["first cosine", "last cosine"] if name == "raw cosine" else ["first", "last"]
    table = html.table(["teacher", "layer", "measured in", *first_and_last], rows, text_columns=3)
    title = f"{name.capitalize()} by teacher and layer"
    return html.picture(run_dir / "cosine.png", plot_cosines(log), title) + table


def _foga_section(run_dir: Path, scores: LayerScores | None, selection: Selection | None) -> str:
    if scores is None:
        return MISSING
    parts = [
        '<p class="note">Change of the predicted velocity when one layer is switched off, relative to the '
        f"velocity; {html.count(scores.by_sample.shape[1])} samples, metric {escape(scores.metric)}, layers "
        f"counted from 0. Whiskers and &plusmn; are one standard error.{_noise_note(scores)}</p>",
        html.picture(
            run_dir / "foga.png",
            plot_scores(scores, selection.drawn() if selection else None),
            "FoG-A score of every layer",
        ),
    ]
    if scores.t is None:
        parts.append('<p class="missing">score by layer and t: not recorded in this run</p>')
    else:
        picture = plot_layer_t_map(scores)
        parts.append(html.picture(run_dir / "foga_map.png", picture, "FoG-A score by layer and flow time"))
    return "".join(parts) + _foga_table(scores, selection)


def _noise_note(scores: LayerScores) -> str:
    """What rounding alone scores, and which layers do not stand above it."""
    if scores.noise_by_sample is None:
        return ""
    low = [name for name, above in zip(scores.names, scores.above_floor.tolist()) if not above]
    note = f" A layer without effect would score {html.significant(scores.noise_floor, 2)} (measured)"
    return f"{note}; not above it: {escape(', '.join(low))}." if low else f"{note}; all are above it."


def _foga_table(scores: LayerScores, selection: Selection | None) -> str:
    domains = scores.by_domain() if len(scores.by_domain()) > 1 else {}
    columns = [(part.mean, part.stderr) for part in (scores, *domains.values())]
    means = scores.mean.nan_to_num(float("-inf"))
    selected = selection.teachers if selection else {"": None}
    rows, chosen = [], []
    for unit, name in enumerate(scores.names):
        weights = [unit_weight(name, own) for own in selected.values()]
        cells = [escape(name), html.count(1 + int((means > means[unit]).sum()))]
        for mean, stderr in columns:
            spread = float(stderr[unit])
            error = (
                f" <span class='quiet'>&plusmn; {html.significant(spread, 2)}</span>" if math.isfinite(spread) else ""
            )
            cells.append(html.significant(float(mean[unit])) + error)
        rows.append([*cells, *("" if weight is None else f"{weight:.3f}" for weight in weights)])
        chosen.append(any(weight is not None for weight in weights))
    unit_title = "branch" if any("." in name for name in scores.names) else "layer"
    header = [unit_title, "rank", "score", *map(escape, domains)]
    header += [escape(f"weight {name}".strip()) for name in selected]
    return html.table(header, rows, chosen)


def _scd_section(run_dir: Path) -> str:
    path = run_dir / "scd.json"
    if not path.exists():
        return MISSING
    try:
        found = read_scd(path)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        return f'<p class="missing">{escape(f"{path.name} cannot be shown: {error!r}")}</p>'
    if not found:
        return MISSING
    rows = []
    for entry in found:
        result = entry.result
        interval = f"{result.low:.2f} to {result.high:.2f}" if math.isfinite(result.low) else ""
        rows.append(
            [
                escape(entry.domain),
                escape(entry.teacher),
                f"{entry.scored} / {entry.fitted} / {entry.held_out}",
                ", ".join(map(str, result.most_used)),
                ", ".join(map(str, result.most_stored)),
                f"{result.overlap:.0%}",
                f"{result.spearman:.2f}" if math.isfinite(result.spearman) else "not defined",
                interval,
                f"{result.kendall:.2f}" if math.isfinite(result.kendall) else "not defined",
            ]
        )
    header = ["domain", "teacher", "clips", "most used", "most stored", "overlap"]
    header += ["Spearman", "95 % interval", "Kendall"]
    by_layer = [[str(layer)] for layer in found[0].result.layers]
    columns = ["layer"]
    for entry in found:
        columns += [escape(f"{entry.domain} {kind}".strip()) for kind in ("FoG-A", "LASP", "CKA")]
        for cells, values in zip(by_layer, zip(entry.result.foga, entry.result.stored, entry.cka), strict=True):
            cells += [html.significant(value) for value in values]
    return (
        '<p class="note">LASP: how well one frozen linear head, shared by all layers, reads the teacher out of the '
        "pooled state of clips that it was not fitted on; CKA: the same without a head. Clips: scored by FoG-A / the "
        "head fitted on / LASP measured on. The filled bars and points are the highest of each.</p>"
        + html.picture(run_dir / "scd.png", plot_scd(found), "FoG-A and LASP of every layer, by domain")
        + html.table(header, rows, text_columns=5)
        + f"<details><summary>By layer</summary>{html.table(columns, by_layer)}</details>"
    )


def _selection_section(log: Log, selection: Selection | None, problem: str) -> str:
    parts = [problem]
    if selection is not None:
        for name, own in selection.teachers.items():
            columns = [own.weights, *own.by_time.values()]
            rows = [[str(layer), *(f"{w:.4f}" for w in row)] for layer, *row in zip(own.layers, *columns)]
            title = f"<h3>{escape(name)}</h3>" if name else ""
            parts.append(title + html.table(["layer", "weight", *(f"at t {t:g}" for t in own.by_time)], rows))
        parts.append(html.facts(selection.facts.items()))
    probes = [entry for entry in log if entry.get("event") == "probe"]
    if probes:
        rows = []
        for probe in probes[-PROBES_SHOWN:]:
            choice = _group(probe, "selection")
            teachers = _group(choice, "teachers") or {"": choice}
            rows.append(
                [
                    html.shown(probe.get("step")),
                    escape(_by_teacher({name: _listed(own, "layers", str) for name, own in teachers.items()})),
                    escape(_by_teacher({name: _listed(own, "weights", html.shown) for name, own in teachers.items()})),
                    html.shown(probe.get("seconds")),
                    html.shown(probe.get("block_evaluations")),
                ]
            )
        older = len(probes) - len(rows)
        parts.append(
            f"<h3>Probes</h3>{html.table(['step', 'layers', 'weights', 'seconds', 'block evaluations'], rows)}"
        )
        if older:
            parts.append(f'<p class="note">{html.count(older)} earlier probes are in log.jsonl.</p>')
    return "".join(parts) or MISSING


def _by_teacher(texts: dict[str, str]) -> str:
    """ "speech: 0, 4; audio: 0, 20"; the text alone for all teachers together."""
    return "; ".join(f"{name}: {text}" if name else text for name, text in texts.items())


def _listed(entry: Any, key: str, shown: Callable[[Any], str]) -> str:
    """The list under `key` with commas; empty where there is none."""
    values = entry.get(key) if isinstance(entry, dict) else None
    return ", ".join(map(shown, values)) if isinstance(values, list) else ""


def _samples_section(run_dir: Path, log: Log) -> str:
    prompts: dict[tuple[str, str, str], dict[Any, str]] = {}
    for entry in log:
        if entry.get("event") == "sample" and isinstance(entry.get("path"), str):
            prompt = (
                html.words(entry.get("text")),
                html.words(entry.get("domain")),
                html.words(entry.get("reference")),
            )
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
        clips = [html.player(run_dir, reference, "reference")] if reference else []
        clips += [
            html.player(run_dir, by_step[step], f"step {html.count(step)}" if step is not None else "sample")
            for step in picked
        ]
        left = len(steps) - len(picked)
        note = f'<p class="note">{html.count(left)} more steps are in the run folder.</p>' if left else ""
        label = f'<span class="pill">{escape(domain)}</span>' if domain else ""
        words = escape(text) if text else '<span class="missing">no text</span>'
        cards.append(
            f'<div class="card"><p class="words">{label}{words}</p>'
            f'<div class="clips">{"".join(clips)}</div>{note}</div>'
        )
    left = len(prompts) - len(cards)
    if left:
        cards.append(f'<p class="note">Samples of {html.count(left)} more texts are in the run folder.</p>')
    return "".join(cards)


def _skipped_section(whole_log: Log, skipped: Sequence[dict[str, Any]]) -> str:
    if not _last(whole_log, "start") and not skipped:
        return MISSING
    if not skipped:
        return "<p>No file was skipped.</p>"
    rows = [
        [
            escape(html.words(entry.get("path"))),
            escape(html.words(entry.get("source"))),
            escape(html.words(entry.get("reason"))),
        ]
        for entry in skipped[:SKIPPED_SHOWN]
    ]
    one = len(skipped) == 1
    shown = f"; the first {SKIPPED_SHOWN} are shown, all are in log.jsonl" if len(skipped) > SKIPPED_SHOWN else ""
    lead = f"<p>{html.count(len(skipped))} file{'' if one else 's'} could not be used{shown}.</p>"
    return lead + html.table(["file", "source", "reason"], rows, text_columns=3)


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
    return html.facts(pair for pair in facts if pair[1] is not None) or MISSING


def _status(log: Log, whole_log: Log) -> str:
    state = next(
        (entry for entry in reversed(log) if entry.get("event") in ("start", "resume", "interrupted", "end")),
        {},
    )
    step = _last_step(log)
    where = f" at step {html.count(step)}" if step is not None else ""
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
        if "teachers" in facts:
            teachers = {str(name): _aligned(own) for name, own in facts.pop("teachers").items()}
        else:
            teachers = {"": _aligned(facts)}
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        return None, f'<p class="missing">{escape(f"{path.name} cannot be shown: {reason}")}</p>'
    return Selection(teachers, facts), ""


def _aligned(entry: dict[str, Any]) -> Aligned:
    """One selection, taken out of the file's facts."""
    layers, weights = tuple(entry.pop("layers")), tuple(float(weight) for weight in entry.pop("weights"))
    if len(layers) != len(weights):
        raise ValueError(f"{len(layers)} layers but {len(weights)} weights")
    by_time = {}
    for t, scores in zip(entry.pop("t_grid", ()), zip(*entry.pop("scores", ()))):
        total = sum(scores) or 1.0
        by_time[float(t)] = tuple(score / total for score in scores)
    return Aligned(layers, weights, by_time)


def _skipped(log: Log) -> list[dict[str, Any]]:
    """The skipped files once each: a resumed run names them again."""
    by_path: dict[str, dict[str, Any]] = {}
    for entry in log:
        if entry.get("event") == "skipped":
            by_path.setdefault(html.words(entry.get("path")), entry)
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
            {key: value for key in entry if key.startswith(SIMILARITIES) and (value := number(entry[key])) is not None}
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
