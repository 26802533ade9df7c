"""The numbers of a study, from the folders of its runs, as plain values: what results.json holds."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..evaluation.bootstrap import CONFIDENCE, nested_mean
from ..report.log import Log, current_timeline, read_log, series
from ..training.config import dump_config
from ..training.config.parse import import_yaml
from ..training.environment import versions
from .generated import Number, read_numbers, summary
from .plan import FINAL, Plan, Run, broken
from .work import failure

BASELINES = ("none", "shallowest")  # what every arm is compared with, where the study has them
FORMAT = 1


@dataclass(frozen=True)
class Finished:
    """A run that is trained.

    numbers: of what it generates; empty where it is not evaluated.
    clips: {clip: loss at the end}. steps, losses: [V] of the validations. seconds: [V] of training up to each of them.
    """

    run: Run
    facts: dict[str, Any]
    clips: dict[str, float]
    steps: list[float]
    losses: list[float]
    seconds: list[float]
    numbers: list[Number]


BySeed = Mapping[int, Sequence[Finished]]  # an arm's finished runs; several for a seed where there are draws


def read_run(run: Run) -> Finished:
    """A finished run's numbers.

    Raises:
        UserError: its files are not what a run writes."""
    file, log_file = run.folder / FINAL, run.folder / "log.jsonl"
    log = current_timeline(read_log(log_file))
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        clips = {str(entry["clip"]): float(entry["loss"]) for entry in facts["clips"]}
        steps, losses = (column.tolist() for column in series(log, "valid", "flow_loss"))
        seconds = [_seconds(log, step, run.config.train.accumulate, bool(facts["needs_probe"])) for step in steps]
        if not clips or not {"flow_loss", "selection", "probe_seconds", "device"} <= set(facts):
            raise ValueError("it is not complete")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise broken(file, error) from None
    if not steps:
        raise UserError(f"{log_file}: holds no validation; delete its folder to train the run again")
    return Finished(run, facts, clips, steps, losses, seconds, read_numbers(run.folder) if run.evaluated else [])


def _seconds(log: Log, step: float, accumulate: int, with_probes: bool) -> float:
    """Seconds of training up to a step: its batches with their live teachers, and the probes; not validation."""
    total, before = 0.0, 0.0
    for end, each in zip(*(column.tolist() for column in series(log, "train", "batch_seconds"))):
        total += each * accumulate * max(0.0, min(end, step) - before)
        before = end
    if with_probes:
        total += sum(each for at, each in zip(*map(list, series(log, "probe", "seconds"))) if at < step)
    return total


def reached(finished: Finished, target: float) -> tuple[float, float] | None:
    """(step, seconds) at which the validation loss first is at the target, along lines between validations."""
    points = list(zip(finished.steps, finished.seconds, finished.losses))
    for place, (step, seconds, loss) in enumerate(points):
        if loss > target:
            continue
        if place == 0:
            return step, seconds
        step_before, seconds_before, loss_before = points[place - 1]
        share = (loss_before - target) / (loss_before - loss)
        return step_before + share * (step - step_before), seconds_before + share * (seconds - seconds_before)
    return None


def results(plan: Plan, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything that the reports show."""
    study = plan.study
    finished = {run.folder: read_run(run) for run in plan.jobs if run.trained}
    errors = {
        run.name: failure(run).read_text(encoding="utf-8")
        for run in plan.jobs
        if not run.finished and failure(run).is_file()
    }
    argv = [Path(sys.argv[0]).name, *sys.argv[1:]] if command is None else list(command)
    return {
        "format": FORMAT,
        "study": study.path.stem,
        "command": argv,
        "versions": versions(),
        "devices": sorted({str(each.facts["device"]) for each in finished.values()}),
        "file": study.path.read_text(encoding="utf-8"),
        "config": import_yaml().safe_load(dump_config(plan.config)),
        "confidence": CONFIDENCE,
        "bootstrap": study.bootstrap,
        "seeds": list(study.seeds),
        "runs": {"planned": len(plan.jobs), "finished": sum(run.finished for run in plan.jobs), "failed": errors},
        "settings": [_setting(plan, setting.name, finished) for setting in study.settings],
    }


def as_json(values: Mapping[str, Any]) -> str:
    """Indented JSON with each list of plain values on one line."""
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    # A line break inside a text is written as \n, so what follows these ones is never part of a text.
    flat = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda found: "[" + re.sub(r"\n\s+", " ", found[1]) + "]", text)
    return flat + "\n"


def _setting(plan: Plan, setting: str, finished: Mapping[Path, Finished]) -> dict[str, Any]:
    runs = [run for run in plan.runs if run.setting == setting]
    arms: dict[str, dict[int, list[Finished]]] = {}
    missing = dict.fromkeys((run.arm.name for run in runs), 0)
    for run in runs:
        seeds = arms.setdefault(run.arm.name, {})
        if run.folder in finished:
            seeds.setdefault(run.seed, []).append(finished[run.folder])
        else:
            missing[run.arm.name] += 1
    targets = _targets(plan, arms.get("none", {}))
    [changes] = [each.changes for each in plan.study.settings if each.name == setting]
    names = {seed: _listed(arms.values(), seed) for seed in plan.study.seeds}
    return {
        "setting": setting,
        "changes": {key: _plain(value) for key, value in changes},
        "clips": {str(seed): clips for seed, clips in names.items() if clips},
        "comparisons": [
            {"arm": arm, "other": other, "difference": _difference(arms[arm], arms[other], plan)}
            for arm, other in plan.study.comparisons
        ],
        "generated": summary(
            {name: {seed: [each.numbers for each in runs] for seed, runs in arm.items()} for name, arm in arms.items()},
            plan.study.bootstrap,
        ),
        "arms": [
            {
                "arm": name,
                "missing": missing[name],
                "loss": _estimate([_clips(each) for each in by_seed.values()], plan),
                "differences": {
                    other: _difference(by_seed, arms[other], plan)
                    for other in BASELINES
                    if other in arms and other != name
                },
                "targets": [_reached(by_seed, label, losses) for label, losses in targets.items()],
                "seconds": _mean([each.seconds[-1] for each in _all(by_seed)]),
                "runs": [_run(each, names[seed]) for seed, each_seed in by_seed.items() for each in each_seed],
            }
            for name, by_seed in arms.items()
        ],
    }


def _all(by_seed: BySeed) -> list[Finished]:
    return [each for runs in by_seed.values() for each in runs]


def _listed(arms: Any, seed: int) -> list[str]:
    """The held-out clips of a seed, in the order in which its runs list their losses."""
    return list(dict.fromkeys(clip for by_seed in arms for each in by_seed.get(seed, ()) for clip in each.clips))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def _targets(plan: Plan, none: BySeed) -> dict[str, dict[int, float]]:
    """{name of a target: {seed: loss}}: those of the study's file, or the last validation loss of the arm none."""
    if plan.study.targets:
        return {f"{target:g}": dict.fromkeys(plan.study.seeds, target) for target in plan.study.targets}
    return {"final loss of none": {seed: runs[0].losses[-1] for seed, runs in none.items()}} if none else {}


def _clips(runs: Sequence[Finished]) -> dict[str, float]:
    """The loss of each clip: the mean over the draws of a seed."""
    names = [name for name in runs[0].clips if all(name in each.clips for each in runs)]
    return {name: sum(each.clips[name] for each in runs) / len(runs) for name in names}


def _estimate(by_seed: Sequence[Mapping[str, float]], plan: Plan) -> dict[str, Any] | None:
    groups = [_vector(list(clips.values())) for clips in by_seed if clips]
    return nested_mean(groups, resamples=plan.study.bootstrap).as_dict() if groups else None


def _vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _difference(arm: BySeed, other: BySeed, plan: Plan) -> dict[str, Any] | None:
    """An arm's loss less another's, paired by seed and clip, on the seeds that both have finished."""
    groups, by_seed = [], {}
    for seed in arm:
        if seed not in other:
            continue
        first, second = _clips(arm[seed]), _clips(other[seed])
        shared = [name for name in first if name in second]
        if shared:
            groups.append(_vector([first[name] - second[name] for name in shared]))
            by_seed[str(seed)] = groups[-1].mean().item()
    if not groups:
        return None
    estimate = nested_mean(groups, resamples=plan.study.bootstrap)
    lower = sum(value < 0 for value in by_seed.values())
    return {**estimate.as_dict(), "by_seed": by_seed, "lower": lower, "seeds": len(groups)}


def _reached(by_seed: BySeed, label: str, losses: Mapping[int, float]) -> dict[str, Any]:
    """Steps and seconds to a target: of each run, and their means where every run reached it."""
    runs = [each for each in _all(by_seed) if each.run.seed in losses]
    points = [reached(each, losses[each.run.seed]) for each in runs]
    hits = [point for point in points if point is not None]
    every = len(hits) == len(runs)
    return {
        "target": label,
        "losses": {str(each.run.seed): losses[each.run.seed] for each in runs},
        "reached": len(hits),
        "of": len(runs),
        "step": _mean([step for step, _ in hits]) if every else None,
        "seconds": _mean([seconds for _, seconds in hits]) if every else None,
        "by_run": [None if point is None else {"step": point[0], "seconds": point[1]} for point in points],
    }


def _run(each: Finished, clips: Sequence[str]) -> dict[str, Any]:
    return {
        "seed": each.run.seed,
        "draw": each.run.draw,
        "folder": each.run.name,
        "flow_loss": each.facts["flow_loss"],
        "selection": each.facts["selection"],
        "warmup": None if each.run.warmup is None else each.run.warmup.folder.name,
        "seconds": each.seconds[-1],
        "probe_seconds": each.facts["probe_seconds"] if each.facts["needs_probe"] else 0.0,
        "curve": {"step": each.steps, "flow_loss": each.losses, "seconds": each.seconds},
        "clip_losses": [each.clips.get(clip) for clip in clips],
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
