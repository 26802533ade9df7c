"""`agrepa extract`."""

from __future__ import annotations

import argparse
import re
import sys

from ..errors import UserError

HELP = "Extract teachers' features and tokens of a run's clips, for cached: true."
EXAMPLES = """\
examples:
  agrepa extract my.yaml --teacher speech --int8
  agrepa extract my.yaml --teacher speech audio --shard 2/8      # the third of eight processes
  agrepa extract my.yaml --tokens s3
  agrepa train my.yaml alignment.teachers.speech.cached=true
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="preset's name or YAML file, as given to agrepa train")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the configuration")
    parser.add_argument("--teacher", nargs="+", default=[], metavar="NAME", help="teachers of alignment.teachers")
    parser.add_argument("--tokens", nargs="+", default=[], metavar="NAME", help="tokenizers of data.tokens: s3, beats")
    parser.add_argument(
        "--shard", type=part, default=(0, 1), metavar="I/N", help="this process's part of N, from 0/N to N-1/N"
    )
    parser.add_argument("--int8", action="store_true", help="store int8 with a scale for each frame; else float32")
    parser.add_argument("--pool", action="store_true", help="store one vector a clip, the mean over its frames")
    parser.add_argument(
        "--verify", action="store_true", help="also compare the checksums of what is there; extract broken parts again"
    )


def part(text: str) -> tuple[int, int]:
    """0/4 -> (0, 4)."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, like 0/4, got {text!r}")
    return int(found[1]), int(found[2])


def run(arguments: argparse.Namespace) -> int:
    from ..training.config import load_config
    from ..training.extract import Extraction
    from ..training.progress import hours_bar

    # argparse takes what follows --teacher for names, changes of the configuration too.
    behind = [*arguments.teacher, *arguments.tokens]
    changes = [*arguments.overrides, *(word for word in behind if "=" in word)]
    teachers, tokens = ([word for word in words if "=" not in word] for words in (arguments.teacher, arguments.tokens))
    if not teachers and not tokens:
        raise UserError("extract: give --teacher NAME or --tokens NAME")
    if tokens and (arguments.int8 or arguments.pool):
        raise UserError("--int8, --pool: tokens are stored as they are; extract them in a command of their own")
    extraction = Extraction(
        load_config(arguments.config, changes),
        teachers,
        tokens,
        part=arguments.shard,
        int8=arguments.int8,
        pool=arguments.pool,
        verify=arguments.verify,
    )
    for reason in extraction.broken:
        print(f"agrepa: warning: {reason}", file=sys.stderr)
    try:
        with hours_bar(extraction.seconds) as advance:
            filled = extraction.run(advance)
    finally:
        for item in extraction.skipped:
            print(f"skipped: {item.path} ({item.source}): {item.reason}", file=sys.stderr)
    for name, store in filled.items():
        size = f"{store.bytes / 1e6:,.1f} MB"
        print(f"{name}: {store.clips} clips, {store.seconds / 3600:.2f} h, {size} in {store.folder}")
    if extraction.pending:
        print(f"{extraction.pending} shards are left to the other parts of {arguments.shard[1]}")
    return 0
