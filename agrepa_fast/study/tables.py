"""The tables of a study: cells as text, shared by results.md and report.html, and results.md itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report.html import duration
from .results import BASELINES

NOTE = (
    "Losses are validation flow losses at the end of training, over all held-out clips at fixed t and noise. A "
    "difference is paired by seed and clip: negative is better than what it is compared with. Brackets hold "
    "{confidence:.0%} bootstrap intervals: seeds are drawn, then clips of each drawn seed ({bootstrap} resamples). "
    "Bold: the interval leaves out 0, for this arm alone; of twenty arms without any effect one would be expected to. "
    "With few seeds intervals are too narrow: read them with the number of seeds in which the arm was lower."
)
ONE_SEED = "There is one seed: intervals are over clips alone and say nothing of other seeds."

GENERATED = "What `agrepa evaluate` measured of generated audio. Intervals are over seeds alone."


def status(result: Mapping[str, Any]) -> str:
    """How much of a study is finished, in one line."""
    runs = result["runs"]
    text = f"{runs['finished']} of {runs['planned']} runs finished, {len(result['seeds'])} seeds"
    return f"{text}, {len(runs['failed'])} failed" if runs["failed"] else text


def notes(result: Mapping[str, Any]) -> list[str]:
    """How to read the tables."""
    lines = [NOTE.format(confidence=result["confidence"], bootstrap=result["bootstrap"])]
    return [*lines, ONE_SEED] if len(result["seeds"]) == 1 else lines


def title(setting: Mapping[str, Any]) -> str:
    changes = ", ".join(f"{key}={value or 'null'}" for key, value in setting["changes"].items())
    return f"Setting {setting['setting']}" + (f" ({changes})" if changes and changes != setting["setting"] else "")


def baselines_of(setting: Mapping[str, Any]) -> list[str]:
    """The arms that the others are compared with."""
    return [name for name in BASELINES if any(name in arm["differences"] for arm in setting["arms"])]


def table(setting: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the losses and differences: a row for every arm, in the order of the study's file."""
    baselines = baselines_of(setting)
    missing = any(arm["missing"] for arm in setting["arms"])
    header = ["arm", "loss", *(f"less {name} (seeds lower)" for name in baselines), *["runs missing"] * missing]
    rows = []
    for arm in setting["arms"]:
        differences = [arm["differences"].get(name) for name in baselines]
        counts = [str(arm["missing"])] * missing
        rows.append([arm["arm"], interval(arm["loss"]), *map(_difference, differences), *counts])
    return header, rows


def comparisons_table(setting: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparisons that the study's file names."""
    rows = [[f"{each['arm']} less {each['other']}", _difference(each["difference"])] for each in setting["comparisons"]]
    return ["comparison", "difference (seeds lower)"], rows


def generated_table(setting: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what is measured of generated audio: a row for each number and arm, after the recordings'."""
    rows = []
    for number in setting["generated"]:
        name = f"{number['column']} ({number['domain']}, {number['better']} is better)"
        for of, mean in number["recordings"].items():
            if mean is not None:
                rows.append([name, of, _of_seeds(mean), "–"])
        for arm in number["arms"]:
            rows.append([name, arm["arm"], _of_seeds(arm["mean"]), _difference(arm["less_none"])])
    return ["measured", "arm", "mean over seeds", "less none (seeds lower)"], rows


def _of_seeds(mean: Mapping[str, Any]) -> str:
    return f"{interval(mean)} ({mean['seeds']} seeds)"


def _difference(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "–"
    return f"{interval(difference, '+')} ({difference['lower']} of {difference['seeds']})"


def speed_table(setting: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the steps and the time to each target, and of the time of training."""
    arms = setting["arms"]
    header = ["arm"]
    for target in arms[0]["targets"]:
        header += [f"steps to {target['target']}", "time to it"]
    rows = []
    for arm in arms:
        cells = [cell for target in arm["targets"] for cell in _to_target(target)]
        rows.append([arm["arm"], *cells, "–" if arm["seconds"] is None else duration(arm["seconds"])])
    return [*header, "training time"], rows


def _to_target(target: Mapping[str, Any]) -> list[str]:
    if target["step"] is not None:
        return [f"{target['step']:,.0f}", duration(target["seconds"])]
    if not target["of"]:
        return ["–", "–"]
    if not target["reached"]:
        return ["not reached", "–"]
    return [f"reached in {target['reached']} of {target['of']}", "–"]


def interval(estimate: Mapping[str, Any] | None, sign: str = "") -> str:
    """A number with its interval; a difference is bold where the interval leaves out 0."""
    if estimate is None:
        return "–"
    low, high = estimate["low"], estimate["high"]
    form = f"{sign}.{5 if sign else 4}f"
    text = f"{estimate['value']:{form}}"
    if low is None or high is None:
        return text
    text += f" [{low:{form}}, {high:{form}}]"
    return f"**{text}**" if sign and (low > 0 or high < 0) else text


def layers_table(setting: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the layers that were aligned at the end, by seed; draws of a seed are apart by a stroke."""
    seeds = list(dict.fromkeys(run["seed"] for arm in setting["arms"] for run in arm["runs"]))
    rows = []
    for arm in setting["arms"]:
        cells = [[_layers(run["selection"]) for run in arm["runs"] if run["seed"] == seed] for seed in seeds]
        rows.append([arm["arm"], *(" / ".join(cell) or "–" for cell in cells)])
    return ["arm", *(f"seed {seed}" for seed in seeds)], rows


def _layers(selection: Mapping[str, Any] | None) -> str:
    if selection is None:
        return "none"
    if "teachers" in selection:
        return "; ".join(f"{name}: {_layers(each)}" for name, each in selection["teachers"].items())
    return " ".join(map(str, selection["layers"]))


def markdown(result: Mapping[str, Any]) -> str:
    """results.md."""
    lines = [f"# Study {result['study']}", "", f"{status(result)}. `{' '.join(result['command'])}`", ""]
    for note in notes(result):
        lines += [note, ""]
    for setting in result["settings"]:
        lines += [f"## {title(setting)}", ""]
        if setting["comparisons"]:
            lines += ["Asked first:", "", *_rows(*comparisons_table(setting)), ""]
        lines += [*_rows(*table(setting)), "", *_rows(*speed_table(setting)), ""]
        if setting["generated"]:
            lines += [GENERATED, "", *_rows(*generated_table(setting)), ""]
        lines += ["Aligned layers (0-based):", ""]
        lines += [*_rows(*layers_table(setting)), ""]
    if result["runs"]["failed"]:
        lines += ["## Failed runs", ""]
        lines += [f"- {name}: {reason}" for name, reason in result["runs"]["failed"].items()] + [""]
    return "\n".join(lines)


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|---" + "|---:" * (len(header) - 1) + "|", *map(line, rows)]
