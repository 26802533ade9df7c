"""What a study will train, as text: `agrepa study FILE --plan`."""

from __future__ import annotations

from .pace import step_flops, time_needed
from .plan import Plan
from .pool import Progress
from .work import is_warm


def outline(plan: Plan, workers: int = 1) -> str:
    """Counts of runs, warm-ups and steps, the time that they take, and a line for every arm of every setting."""
    study, progress = plan.study, Progress(plan)
    warmups = plan.warmups
    apart = sum(run.config.train.steps for run in plan.runs)
    lines = [
        f"{plan.folder}: {len(study.settings)} settings x {sum(arm.draws for arm in study.arms)} arms and draws x "
        f"{len(study.seeds)} seeds = {len(plan.runs)} runs",
        f"{len(plan.jobs)} to train, as runs of the same configuration are trained once; "
        f"{sum(run.finished for run in plan.jobs)} runs and {sum(map(is_warm, warmups))} of {len(warmups)} warm-ups "
        "are finished",
        f"{progress.total:,} steps to train in all, {progress.first:,.0f} done "
        f"(without shared warm-ups: {apart:,} in all)",
        f"about {_flops(plan):.2g} floating point operations in all, an estimate: full batches of the longest crops, "
        "without the teachers, the heads and the probes",
        time_needed(plan, workers, progress.first, progress.total),
    ]
    if study.evaluation is not None:
        lines.append(f"agrepa evaluate at the end of each run of {', '.join(study.evaluation.arms)}")
    lines.append("")
    for setting in study.settings:
        lines.append(f"setting {setting.name}")
        for arm in study.arms:
            runs = [run for run in plan.runs if run.setting == setting.name and run.arm is arm]
            done = sum(run.finished for run in runs)
            steps = sorted({run.config.train.steps for run in runs})
            lines.append(
                f"  {arm.name:<20} {done} of {len(runs)} runs finished, {', '.join(map(str, steps))} steps each"
            )
    return "\n".join(lines)


def _flops(plan: Plan) -> float:
    """Operations of the networks' training steps, as if every batch were full of crops of the longest length."""
    total = sum(warmup.step * step_flops(warmup.config) for warmup in plan.warmups)
    for run in plan.jobs:
        warm = run.warmup.step if run.warmup else 0
        total += (run.config.train.steps - warm) * step_flops(run.config)
    return float(total)
