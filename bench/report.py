"""Write what the docs say about speed, and about what alignment gains, from bench/results: tables and figures.

A table is between the lines `<!-- bench:NAME -->` and `<!-- /bench -->` of README.md or of a page in docs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agrepa_fast.errors import UserError

from . import evidence, figures, results, runs, skipping
from .cases import CASES
from .tables import (
    EAGER_COLUMNS,
    UNMEASURED,
    amount,
    cells,
    columns,
    duration,
    eager_cells,
    gate_line,
    markdown,
    speedup,
)
from .targets import TARGETS, ours, shares_of_step

MARK = re.compile(r"^(<!-- bench:([a-z_]+) -->\n)(.*?)^(<!-- /bench -->)$", re.DOTALL | re.MULTILINE)
OPENED = re.compile(r"^<!-- bench:", re.MULTILINE)
KINDS = {"cpu": "CPU", "cuda": "GPU"}

Stored = Mapping[str, Mapping[str, Any]]  # {file name: result}


def load(root: Path) -> dict[str, dict[str, Any]]:
    """{stem: result} of bench/results/*.json, sorted by name; without studies, which `evidence` reads.

    Raises:
        UserError: a file that is no result, or a toy result, which means nothing.
    """
    files = sorted(path for path in (root / "bench" / "results").glob("*.json") if not evidence.is_study(path))
    loaded = {path.stem: results.read(path) for path in files}
    for name, result in loaded.items():
        if result["scale"] == "toy":
            raise UserError(f"bench/results/{name}.json: toy sizes say nothing about speed; run --quick or full sizes")
    return loaded


def write_report(root: Path, check: bool = False) -> list[Path]:
    """Update tables and figures; return the files that were out of date. `check` changes nothing.

    Raises:
        UserError: a marker that names no table, or that has no end.
    """
    stored = load(root)
    blocks = tables(stored) | evidence.blocks(evidence.load(root)) | skipping.blocks(root)
    changed = []
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        filled = fill(text, blocks, path.name)
        if filled != text:
            changed.append(path)
            if not check:
                path.write_text(filled, encoding="utf-8")
    for stem, result in stored.items():
        for name in figures.drawn(result):
            for kind in ("png", "svg"):
                path = root / "docs" / "figures" / f"bench-{name}-{stem}.{kind}"
                if figures.stored_digest(path) != figures.digest(name, result):
                    changed.append(path)
                    if not check:
                        figures.draw(name, result, path)
    changed += runs.outdated(root, check)
    kept = {f"bench-{name}-{stem}" for stem, result in stored.items() for name in figures.drawn(result)}
    for path in sorted((root / "docs" / "figures").glob("bench-*")):
        if path.stem not in kept:
            changed.append(path)
            if not check:
                path.unlink()
    return changed


def fill(text: str, blocks: Mapping[str, str], name: str) -> str:
    """`text` with every marked block replaced.

    Raises:
        UserError: a marker that does not fit; names its file.
    """
    if len(OPENED.findall(text)) != len(MARK.findall(text)):
        raise UserError(f"{name}: a <!-- bench:NAME --> without its <!-- /bench -->")

    def replace(found: re.Match[str]) -> str:
        if found[2] not in blocks:
            raise UserError(f"{name}: no table {found[2]!r}; expected one of {', '.join(blocks)}")
        return f"{found[1]}{blocks[found[2]]}\n{found[4]}"

    return MARK.sub(replace, text)


def tables(stored: Stored) -> dict[str, str]:
    """Every table that the docs may ask for, by name."""
    blocks = {
        "machines": machines(stored),
        "roofline": rooflines(stored),
        "headline": headline(stored),
        "targets": targets(stored),
        "summary": summary(stored),
        "exponents": exponents(stored),
        "figures": pictures(stored),
    }
    for case in CASES:
        blocks[f"case_{case}"] = case_tables(case, stored)
    return blocks


def machines(stored: Stored) -> str:
    """The machine of every result."""
    rows = []
    for name, result in stored.items():
        e = result["environment"]
        commit = (e["git"]["revision"] or "unknown")[:10] + (" + changes" if e["git"]["dirty"] else "")
        load_ = [result["conditions"][when] for when in ("before", "after")]
        clocks = " to ".join(str(c["sm_mhz"]) for c in load_ if c and c["sm_mhz"]) or "-"
        loads = " to ".join(f"{c['load']:.1f}" for c in load_ if c and c["load"] is not None) or "-"
        floor = "-" if result["noise_floor"] is None else f"{result['noise_floor']:.1%}"
        packages = e["packages"]
        rows.append(
            [
                f"{name}, {result['scale']}" + ("" if result["complete"] else " (cut short)"),
                e["device"],
                f"{packages['torch']} / {packages['triton'] or 'none'} / {e['python']}",
                e["driver"] or "-",
                clocks,
                loads,
                floor,
                commit,
                result["started"][:10],
            ]
        )
    header = ["result", "device", "torch / triton / Python", "driver", "SM MHz", "host load", "noise", "commit", "date"]
    return "\n\n".join([markdown(header, rows), *_missing(stored)])


def rooflines(stored: Stored) -> str:
    """Copy bandwidth and matmul rate, as measured at the start of each run."""
    rows = []
    for name, result in stored.items():
        limit = result["roofline"]
        for dtype, rate in limit["matmul_flops_per_s"].items():
            ridge = f"{limit['ridge_flops_per_byte'][dtype]:.1f}"
            rows.append([name, f"{limit['copy_bytes_per_s'] / 1e9:.1f}", dtype, f"{rate / 1e12:.3g}", ridge])
    header = ["result", "copy GB/s", "matmul dtype", "TFLOP/s", "ridge FLOP/byte"]
    return "\n\n".join([markdown(header, rows), *_missing(stored)])


def _missing(stored: Stored) -> list[str]:
    present = {result["environment"]["device_type"] for result in stored.values()}
    return [f"{KINDS[kind]}: {UNMEASURED}." for kind in KINDS if kind not in present]


HEADLINE: tuple[tuple[str, str, dict[str, str], tuple[str, ...]], ...] = (
    (
        "FoG-A scores of all layers",
        "foga",
        {},
        ("released loop", "SDPA loop", "compiled loop", "compiled loop, bfloat16 model"),
    ),
    (
        "Alignment loss, forward and backward",
        "alignment",
        {"part": "op", "mode": "both"},
        ("per-sample loop", "vectorised, compiled"),
    ),
    (
        "Training step with alignment",
        "train_step",
        {"align": "on"},
        ("released form", "SDPA form", "SDPA form, compiled", "SDPA form, compiled, bfloat16 model"),
    ),
    (
        "The trainer's step",
        "trainer",
        {},
        ("straightforward", "released form", "straightforward, compiled"),
    ),
    (
        "Residual + norm, forward and backward",
        "residual",
        {"op": "gated_residual_norm", "mode": "both"},
        ("eager", "compiled"),
    ),
)


def headline(stored: Stored) -> str:
    """The short table of the README: wins, ties and losses, for the first fitting problem of each result.

    The trainer's step has all its problems in it, because mixed lengths differ from equal ones.
    """
    rows = []
    for kind, title in KINDS.items():
        of_kind = [r for r in stored.values() if r["environment"]["device_type"] == kind]
        for work, case, match, providers in HEADLINE:
            measured = []
            for result in of_kind:
                fitting = [
                    p
                    for p in result["problems"]
                    if p["case"] == case and all(p["params"].get(k) == v for k, v in match.items())
                ]
                measured += [(result, p) for p in (fitting if case == "trainer" else fitting[:1])]
            if not measured:
                rows.append([work, "", of_kind[0]["environment"]["device"] if of_kind else title, UNMEASURED, ""])
            for result, problem in measured:
                words = [
                    f"{speedup(row)} against {row['provider']}"
                    for name in providers
                    for row in problem["rows"]
                    if row["provider"] in (name, f"{name}, float32") and row["speedup"] is not None
                ]
                verdicts = "; ".join(words) if problem["gate"]["passed"] else gate_line(problem)
                device, median = result["environment"]["device"], ours(problem)["median_us"]
                rows.append([work, _size(problem["params"]), device, duration(median), verdicts])
    return markdown(["work", "size", "device", "ours", "ours is"], rows)


def _size(params: Mapping[str, Any]) -> str:
    """What distinguishes the problems of a case, in a few words."""
    forms = {"preset": "{}", "dtype": "{}", "lengths": "{} lengths"}
    named = ("preset", "layers", "rows", "width", "frames", "batch", "lengths", "dtype")
    return ", ".join(forms.get(name, f"{name} {{}}").format(params[name]) for name in named if name in params)


def targets(stored: Stored) -> str:
    """Every target, and what was measured."""
    measured = list(stored.values())
    rows = []
    for target in TARGETS:
        value, word = target.verdict(measured)
        rows.append([target.work, KINDS[target.device], target.claim, value, word])
    for work, claim, value, word in shares_of_step(measured, "cuda"):
        rows.append([work, KINDS["cuda"], claim, value, word])
    return markdown(["work", "device", "target", "measured (worst fitting problem)", ""], rows)


def summary(stored: Stored) -> str:
    """Wins, ties and losses of ours against each provider, and the geometric mean of the speed-ups."""
    rows = []
    for name, result in stored.items():
        tally: dict[tuple[str, str], list[tuple[float, str]]] = {}
        for problem in result["problems"]:
            for row in problem["rows"]:
                if row["speedup"] is not None:
                    tally.setdefault((problem["case"], row["provider"]), []).append((row["speedup"], row["verdict"]))
        for (case, provider), outcomes in tally.items():
            mean = math.exp(sum(math.log(value) for value, _ in outcomes) / len(outcomes))
            counts = [str(sum(word == wanted for _, word in outcomes)) for wanted in ("win", "tie", "loss")]
            rows.append([f"{name}: {case}", provider, *counts, f"{mean:.2f}x"])
    header = ["result and case", "against", "wins", "ties", "losses", "geometric mean"]
    return "\n\n".join([markdown(header, rows), *_missing(stored)])


def exponents(stored: Stored) -> str:
    """Exponents p of time and memory as size^p, along each axis of the scaling case."""
    rows = []
    for name, result in stored.items():
        time, memory = (figures.curves(result, column) for column in ("median_us", "peak_bytes"))
        for axis, providers in time.items():
            for provider, (sizes, values) in providers.items():
                if len(set(sizes)) < 2:
                    continue
                held = memory.get(axis, {}).get(provider)
                fitted = f"{figures.exponent(*held):.2f}" if held and len(set(held[0])) > 1 else "-"
                span = f"{sizes[0]:g} to {sizes[-1]:g}"
                ends = f"{duration(values[0])} to {duration(values[-1])}"
                largest = amount(held[1][-1]) if held else "-"
                rows.append(
                    [f"{name}: {axis}", span, provider, ends, f"{figures.exponent(sizes, values):.2f}", largest, fitted]
                )
    header = ["result and axis", "sizes", "provider", "time", "p of time", "most memory", "p of memory"]
    return "\n\n".join([markdown(header, rows), *_missing(stored)])


def pictures(stored: Stored) -> str:
    """The figures, for a page in docs/."""
    titles = {"speedups": "Ours against each provider", "roofline": "Roofline", "scaling": "Scaling of FoG-A"}
    return "\n\n".join(
        f"![{titles[name]}, {stem}](figures/bench-{name}-{stem}.png)"
        for stem, result in stored.items()
        for name in figures.drawn(result)
    )


def case_tables(case: str, stored: Stored) -> str:
    """All problems of a case, by result and by rival."""
    parts: list[str] = []
    for name, result in stored.items():
        problems: Sequence[Mapping[str, Any]] = [p for p in result["problems"] if p["case"] == case]
        skipped = [item for item in result["skipped"] if item["case"] == case]
        if problems or skipped:
            parts.append(f"### {name}: {result['environment']['device']}")
        for problem in problems:
            shown = columns(problem)
            params = ", ".join(f"{key} {value}" for key, value in problem["params"].items())
            parts.append(f"**{params}** ({gate_line(problem)})")
            parts.append(markdown(shown, [cells(row, shown) for row in problem["rows"]]))
            eager = eager_cells(problem)
            if eager:
                parts += ["Launched eagerly, outside a graph:", markdown(EAGER_COLUMNS, eager)]
        parts += [f"Skipped: {item['key']}: {item['reason']}." for item in skipped]
    return "\n\n".join([*parts, *_missing_case(case, stored)])


def _missing_case(case: str, stored: Stored) -> list[str]:
    present = {
        result["environment"]["device_type"]
        for result in stored.values()
        if any(problem["case"] == case for problem in result["problems"])
    }
    return [f"{KINDS[kind]}: {UNMEASURED}." for kind in KINDS if kind not in present]
