"""The page of what a probe of the paper's network would cost is what its command writes, and its numbers add up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agrepa_fast.attribution import costing
from agrepa_fast.attribution.plan import AblationPlan, Sizes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "attribution" / "on-paper.md"


def test_the_page_is_what_the_command_writes():
    assert PAGE.read_text(encoding="utf-8") == costing.page(), (
        "run: python -m agrepa_fast.attribution.costing > docs/attribution/on-paper.md"
    )


def test_the_numbers_by_hand():
    """L (L + 1) / 2 = 300 evaluations of a block of 24 D^2 T + 4 T^2 D operations, and the control's share."""
    width, frames, samples = 1024, 938, 80
    block = 24 * width**2 * frames + 4 * frames**2 * width
    per_sample = (300 + 24 / samples) * block
    page = costing.page()
    assert f"| whole blocks | 25 | 300 | 576 | {per_sample / 1e12:.1f} |" in page
    # Branch by branch: branch i of 48 runs i + 1 streams, 1176 in all; a loop runs 49 * 48 less the 48 skipped.
    assert re.search(r"\| branches apart \| 49 \| 588 \| 1152 \|", page)
    rows = re.findall(r"^\| (\d+) GB \| (\w+) \| (.*?) \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) GB \|", page, re.M)
    assert len(rows) == 12
    for card, precision, kind, at_once, parts, passes, peak in rows:
        size = 2 if precision == "bfloat16" else 4
        plan = AblationPlan.build(24, branches=None if kind == "whole blocks" else ("attn", "ff"))
        sizes = Sizes(frames, width, 4, 100, 16, size)
        room = 0.9e9 * int(card) - size * 475.2e6
        assert int(passes) == -(-samples // int(at_once)) * int(parts)
        if parts == "1":
            assert float(peak) == pytest.approx(plan.peak_bytes(sizes, int(at_once)) / 1e9, abs=0.06)
            assert float(peak) <= room / 1e9 + 0.1
            # One sample more would not fit, unless all are in already.
            assert int(at_once) == samples or plan.peak_bytes(sizes, int(at_once) + 1) > room - 5e6


def test_the_time_by_hand():
    """1200 evaluations of a block: 24 D^2 T in matrices, 4 T^2 D in attention; 16 D T bytes each in GELU and stream."""
    evaluations, width, frames = 300 * 4, 1024, 938
    matrices, attention = evaluations * 24 * width**2 * frames, evaluations * 4 * frames**2 * width
    moved = evaluations * 16 * width * frames
    expected = [matrices / 615e12, attention / 360e12, moved / 3.1e12, moved / 3.1e12]
    found = costing.times(costing.DiTConfig.preset("paper"))
    assert list(found.values()) == pytest.approx(expected)
    total, page = sum(expected), costing.page()
    assert f"would take {total * 1e3:.0f} ms: {(matrices + attention) / total / 798e12:.0%} of 798 TFLOP/s" in page
    without = total - expected[2]
    assert f"| {without * 1e3:.0f} ms | {(matrices + attention) / without / 798e12:.0%} |" in page
    assert "| attention at 500 TFLOP/s | 61 ms | 67% |" in page
    assert "## The time: an estimate" in page
    assert "which are assumptions" in page
