"""`agrepa`: extract, train, probe, sample, evaluate, study, bench, doctor; one file a command.

A mistake in what the user gave is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from ..errors import UserError, one_line
from . import doctor, evaluate, extract, probe, sample, study, train


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    warnings.showwarning = _one_line_warning
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file may hold bytes that are no UTF-8
    try:
        if argv and argv[0] == "bench":
            from ..bench.cli import main as bench  # it has commands of its own

            return bench(argv[1:])
        arguments = _parse(argv)
        return arguments.run(arguments)
    except UserError as error:
        print(f"agrepa: error: {error}", file=sys.stderr)
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`): nothing is left to say, nor to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"agrepa: error: {one_line(f'{where}{error.strerror or error}')}", file=sys.stderr)
    except KeyboardInterrupt:
        print("agrepa: interrupted", file=sys.stderr)
        return 130
    return 2


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options. Changes of the configuration (section.field=value) may stand anywhere on the line.

    argparse alone takes them before the first option only."""
    whole = parser()
    arguments, rest = whole.parse_known_args(argv)
    changes = [word for word in rest if "=" in word and not word.startswith("-") and hasattr(arguments, "overrides")]
    if len(changes) < len(rest):
        whole.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in changes)}")
    if changes:
        arguments.overrides = [*arguments.overrides, *changes]
    return arguments


def _one_line_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"agrepa: warning: {one_line(message)}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The options of all commands. Each command's file adds its own."""
    whole = argparse.ArgumentParser(
        prog="agrepa",
        description="Train a compact DiT with attribution-guided alignment; score the layers of one.",
    )
    whole.add_argument("--version", action="version", version=f"agrepa-fast {__version__}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for command in (extract, train, probe, sample, evaluate, study):
        added = commands.add_parser(
            command.__name__.rpartition(".")[2],
            help=command.HELP,
            description=command.HELP,
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_options(added)
        added.set_defaults(run=command.run)
    # `main` hands everything after "bench" to its own parser; it is listed here for `agrepa --help`.
    commands.add_parser(
        "bench", help="Measure ops, probe, loss and training against their rivals: agrepa bench --help."
    )
    added = commands.add_parser("doctor", help=doctor.HELP, description=doctor.HELP)
    added.set_defaults(run=doctor.run)
    return whole
