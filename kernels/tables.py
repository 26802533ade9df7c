"""Measured launch configurations; written by `python -m agrepa_fast.kernels.tune`.

Architecture -> kernel -> largest width -> (tokens per tile, warps, programs), in place of `launch.rule`. Architectures
and kernels that are not here follow the rule, which no device has confirmed.
"""

from __future__ import annotations

# Device and versions behind each architecture's entries.
MEASURED: dict[str, str] = {}

TABLES: dict[str, dict[str, dict[int, tuple[int, int, int]]]] = {}
