"""One call of `agrepa study`: lock the study's folder, train what is missing, write the report."""

from __future__ import annotations

import json
import sys

from ..data.manifest import read_manifest
from ..errors import UserError, writing
from ..teachers.registry import check_source
from ..training.checkpoint import write_whole
from ..training.clips import BUILTIN
from ..training.environment import pick_device
from ..training.lock import RunLock
from .page import write_study_page
from .plan import BEGUN, Plan
from .pool import run_jobs
from .results import as_json, results
from .tables import markdown
from .work import check_same


def run_study(plan: Plan, workers: int) -> int:
    """Train what is missing, and report; returns the exit code: 1 where a run failed, 130 where it was stopped.

    Raises:
        UserError: another process works on the study, or its runs were trained with another configuration.
    """
    with writing(plan.folder):
        plan.folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(plan.folder, "works on this study", "give this one another train.out")
    try:
        for run in plan.jobs:
            check_same(run)
        _check_base(plan)
        begun = {"threads": plan.config.train.threads}
        write_whole(plan.folder / BEGUN, json.dumps(begun) + "\n")
        errors, stopped = run_jobs(plan, workers, _say)
        if any(run.trained for run in plan.jobs):
            report(plan)
    finally:
        lock.release()
    for name, reason in errors.items():
        _say(f"failed: {name}: {reason}")
    if stopped:
        _say("stopped; the same command goes on")
        return 130
    return 1 if errors else 0


def _check_base(plan: Plan) -> None:
    """Refuse a study whose device, teachers or clips are not here, in one line: each of its runs would fail alone.

    Raises:
        UserError: names the study's file, and what is missing."""
    waiting = [run.config for run in plan.jobs if not run.trained]
    if not waiting:
        return
    try:
        pick_device(plan.config.train.device)
        if not plan.config.train.imports:  # which may register teachers
            for name, teacher in plan.config.alignment.teachers.items():
                used = any(c.alignment.enabled and c.alignment.teachers.get(name) == teacher for c in waiting)
                if used and teacher.own is None and not teacher.cached:
                    _check_teacher(name, teacher.source)
    except UserError as error:
        raise UserError(f"{plan.study.path}: {error}") from None
    data = plan.config.data
    pending = {spec for config in waiting for spec in (*config.data.train, *config.data.valid)}
    for spec in sorted(pending.intersection((*data.train, *data.valid)) - {BUILTIN}):
        try:
            read_manifest(spec, allow_outside=data.allow_outside)
        except UserError as error:
            raise UserError(f"{plan.study.path}: {error}; name yours: data.train=[...]") from None


def _check_teacher(name: str, source: str) -> None:
    try:
        check_source(source)
    except UserError as error:
        raise UserError(f"alignment.teachers.{name}: {error}") from None


def report(plan: Plan) -> None:
    """Write results.json, results.md and report.html of what is finished.

    Raises:
        UserError: nothing is finished, or a file cannot be written.
    """
    if not any(run.trained for run in plan.jobs):
        raise UserError(f"{plan.folder}: none of the study's {len(plan.jobs)} runs is finished yet")
    result = results(plan)
    write_whole(plan.folder / "results.json", as_json(result))
    write_whole(plan.folder / "results.md", markdown(result))
    page = write_study_page(plan.folder, result)
    print(f"results: {plan.folder / 'results.json'}, {plan.folder / 'results.md'}\nreport: {page}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
