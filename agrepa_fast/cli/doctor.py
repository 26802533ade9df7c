"""`agrepa doctor`."""

from __future__ import annotations

import argparse

HELP = "Print versions and devices, and what is installed for which use."


def run(arguments: argparse.Namespace) -> int:
    from ..training.environment import doctor

    print(doctor())
    return 0
