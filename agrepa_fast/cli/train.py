"""`agrepa train`."""

from __future__ import annotations

import argparse

from ..errors import UserError
from ..fields import shown
from .options import number

MOST_HOURS = 50_000
HELP = "Train from a preset (demo, small, base, paper) or a YAML file."
EXAMPLES = """\
examples:
  agrepa train demo
  agrepa train demo data.train=[speech/metadata.csv,sounds/metadata.csv] train.name=mine
  agrepa train my.yaml train.steps=20000 optimizer.lr=3e-4
  agrepa train my.yaml --plan                            # what it would take; nothing is trained
  agrepa train my.yaml --plan --hours speech=960,audio=5000
  agrepa train --resume runs/demo
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="preset's name or YAML file; not with --resume")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the configuration")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run's newest checkpoint (or the one given)")
    parser.add_argument(
        "--accept-data-changes",
        action="store_true",
        help="with --resume: go on although clips were added, removed or changed; known ones stay held out or not",
    )
    parser.add_argument(
        "--plan", action="store_true", help="print clips, epochs, bytes of features, memory and disk; train nothing"
    )
    parser.add_argument(
        "--hours",
        type=domain_hours,
        metavar="DOMAIN=H,...",
        help="with --plan: so many hours of each domain in place of the clips; data and teachers need not be here",
    )


def domain_hours(text: str) -> dict[str, float]:
    """speech=960,audio=5000 -> {"speech": 960.0, "audio": 5000.0}."""
    hours = {}
    for part in text.split(","):
        domain, _, value = part.partition("=")
        amount = number(value)
        if not domain or domain in hours or not 0 < amount <= MOST_HOURS:
            raise argparse.ArgumentTypeError(
                f"expected DOMAIN=H,... with hours above 0, at most {MOST_HOURS:,}, each domain once, got {shown(text)}"
            )
        hours[domain] = amount
    return hours


def run(arguments: argparse.Namespace) -> int:
    from ..alignment.selection import described
    from ..report import read_log
    from ..report.summary import remark
    from ..training.config import dump_config, load_config
    from ..training.distributed import rank, shutdown
    from ..training.start import resume_run, start_run

    if arguments.plan or arguments.hours:
        return _plan(arguments)
    if arguments.resume:
        # With --resume the first positional, if any, is a change like the rest.
        overrides = [arguments.config, *arguments.overrides] if arguments.config else arguments.overrides
        trainer = resume_run(arguments.resume, overrides, arguments.accept_data_changes)
    elif arguments.accept_data_changes:
        raise UserError("--accept-data-changes: only with --resume")
    elif arguments.config:
        trainer = start_run(load_config(arguments.config, arguments.overrides))
    else:
        raise UserError("train: give a preset or a YAML file, or --resume RUN")
    first = rank() == 0
    if first:
        print(dump_config(trainer.config))
    run_dir = trainer.run()
    shutdown()
    if not first:
        return 0
    valid = [entry for entry in read_log(run_dir / "log.jsonl") if entry.get("event") == "valid"]
    losses = [loss for entry in valid if isinstance(loss := entry.get("flow_loss"), float)]
    if trainer.stopping:
        print(f"stopped after step {trainer.step}; go on with: agrepa train --resume {run_dir}")
    elif losses:
        print(f"validation flow loss: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    if trainer.selection is not None:
        a = trainer.config.alignment
        label = "aligned layers" if a.enabled and a.weight > 0 else "selected layers, not aligned"
        print(f"{label} (0-based): {described(trainer.selection)}")
    if limits := remark(run_dir):
        print(f"note: {limits}")
    print(f"report: {run_dir / 'report.html'}")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from ..training.config import load_config
    from ..training.plan import make_plan

    if arguments.resume or arguments.accept_data_changes or not arguments.config:
        raise UserError("--plan: give a preset or a YAML file, without --resume")
    if not arguments.plan:
        raise UserError("--hours: only with --plan")
    print(make_plan(load_config(arguments.config, arguments.overrides), arguments.hours).text())
    return 0
