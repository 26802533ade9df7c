"""`agrepa study`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..errors import UserError
from . import evaluate

if TYPE_CHECKING:
    from ..study.spec import Study

HELP = "Compare ways to choose the aligned layers: arms x seeds x settings, paired, with intervals."
EXAMPLES = """\
examples:
  agrepa study study.yaml --plan
  agrepa study study.yaml --workers 2
  agrepa study study.yaml train.steps=2000 train.out=long
  agrepa study study.yaml --report-only

The same command goes on with a study that was stopped. docs/study.md describes the file.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, help="the study's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the base configuration")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each in a process (default: 1)")
    parser.add_argument("--plan", action="store_true", help="list the runs and what they cost, and train nothing")
    parser.add_argument("--report-only", action="store_true", help="write the report of what is finished")


class _Options(argparse.ArgumentParser):
    """A parser whose errors are the user's mistakes in a file."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _evaluation(words: Sequence[str]) -> argparse.Namespace:
    """The options of `agrepa evaluate`.

    Raises:
        UserError: the command does not take them."""
    options = _Options(allow_abbrev=False, add_help=False)
    evaluate.add_options(options)
    arguments = options.parse_args(["RUN", *words])
    evaluate.check(arguments)
    return arguments


@contextmanager
def _evaluating(study: Study) -> Iterator[None]:
    """Name the study's file and its key `evaluate` in the mistakes that are found in its options."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{study.path}: evaluate: {error}") from None


def run(arguments: argparse.Namespace) -> int:
    from ..study.plan import default_threads, make_plan
    from ..study.spec import read_study

    if not 0 <= arguments.workers <= 256:
        raise UserError(f"--workers: expected 1 to 256 (0: this process), got {arguments.workers}")
    study = read_study(arguments.study, arguments.overrides)
    evaluation = None
    if study.evaluation is not None:
        with _evaluating(study):
            evaluation = _evaluation(study.evaluation.options)
    plan = make_plan(study, default_threads(arguments.workers))
    if arguments.plan:
        from ..study.outline import outline

        print(outline(plan, arguments.workers))
        return 0
    from ..study.session import report, run_study

    if arguments.report_only:
        report(plan)
        return 0
    if evaluation is not None and any(run.evaluate is not None and not run.evaluated for run in plan.jobs):
        with _evaluating(study):
            evaluate.rehearse(evaluation)
    return run_study(plan, arguments.workers)
