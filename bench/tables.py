"""Text and Markdown tables of results: for the terminal, the docs, and `compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

UNMEASURED = "not yet measured"


def duration(microseconds: float | None) -> str:
    """A time with three significant digits and its unit."""
    if microseconds is None:
        return ""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{_three(microseconds / size)} {unit}"
    return f"{_three(microseconds)} µs"


def amount(size: float | None) -> str:
    """Bytes in MiB or GiB."""
    if size is None:
        return ""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def speedup(row: Mapping[str, Any]) -> str:
    """The speed-up of ours over this row, with its verdict; empty if none may be claimed."""
    return "" if row["speedup"] is None else f"{row['speedup']:.2f}x {row['verdict']}"


COLUMNS = ("provider", "median", "p20 to p80", "GB/s", "TFLOP/s", "of limit", "peak memory", "ours is")
DEVICE_COLUMNS = ("launches", "host", "energy", "power", "timer")


def columns(problem: Mapping[str, Any]) -> tuple[str, ...]:
    """The table's columns; those of the card only if there was one."""
    return COLUMNS + DEVICE_COLUMNS if any(row["host_us"] is not None for row in problem["rows"]) else COLUMNS


def cells(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """A row as text, in the order of `columns`."""
    if row["median_us"] is None:
        reason = row["reason"] or "not timed: the gate refused ours"
        return [row["provider"], f"{row['status']}: {reason}", *("" for _ in names[2:])]
    texts = {
        "provider": row["provider"],
        "median": duration(row["median_us"]),
        "p20 to p80": f"{duration(row['p20_us'])} to {duration(row['p80_us'])}",
        "GB/s": "" if row["gb_per_s"] is None else _three(row["gb_per_s"]),
        "TFLOP/s": "" if row["tflop_per_s"] is None else f"{row['tflop_per_s']:.3g}",
        "of limit": "" if row["roofline_share"] is None else f"{row['roofline_share']:.0%} ({row['bound_by']})",
        "peak memory": amount(row["peak_bytes"]),
        "ours is": speedup(row),
        "launches": "" if row["launches"] is None else str(row["launches"]),
        "host": duration(row["host_us"]),
        "energy": "" if row["joules"] is None else f"{row['joules'] * 1e3:.3g} mJ",
        "power": "" if row["watts"] is None else f"{row['watts']:.0f} W",
        "timer": row["timer"] or "",
    }
    return [texts[name] for name in names]


EAGER_COLUMNS = ("provider", "eager call", "ours is", "launches", "host")


def eager_cells(problem: Mapping[str, Any]) -> list[list[str]]:
    """The second table of a problem replayed from graphs: the same calls when Python launches them.

    Empty if no row was replayed.
    """
    rows = [row for row in problem["rows"] if row.get("eager_us") is not None]
    ours_us = next((row["eager_us"] for row in rows if row["role"] == "ours"), None)
    table = []
    for row in rows:
        compared = ours_us is not None and row["role"] not in ("ours", "again", "copy")
        ratio = f"{row['eager_us'] / ours_us:.2f}x" if compared else ""
        launches = "" if row["launches"] is None else str(row["launches"])
        table.append([row["provider"], duration(row["eager_us"]), ratio, launches, duration(row["host_us"])])
    return table


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


def gate_line(problem: Mapping[str, Any]) -> str:
    """The result of the gate and of the A/A row for a problem."""
    if not problem["gate"]["passed"]:
        return f"REFUSED, no speed-up is claimed: {problem['gate']['reason']}"
    return f"outputs checked; noise floor {problem['noise_floor']:.1%}"


def problem_table(problem: Mapping[str, Any]) -> str:
    """A problem as aligned text, for the terminal."""
    names = columns(problem)
    untimed = [row for row in problem["rows"] if row["median_us"] is None]
    timed = [cells(row, names) for row in problem["rows"] if row["median_us"] is not None]
    lines = [f"{problem['case']} {problem['key']}  ({gate_line(problem)})"]
    lines += _aligned(names, timed)
    lines += [f"  {': '.join(cells(row, names)[:2])}" for row in untimed]
    eager = eager_cells(problem)
    if eager:
        lines += ["  Launched eagerly:", *_aligned(EAGER_COLUMNS, eager)]
    return "\n".join(lines)


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Indented lines of columns: the first is aligned left, the others right."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    return [
        ("  " + f"{row[0]:<{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:]))).rstrip()
        for row in table
    ]


def change(before: Mapping[str, Any], after: Mapping[str, Any], floor: float) -> str:
    """ "faster", "slower" or "same" from two rows' medians, by the larger noise floor."""
    ratio = before["median_us"] / after["median_us"]
    return "faster" if ratio > 1 + floor else "slower" if ratio < 1 / (1 + floor) else "same"


def compare_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Two results, row by row: medians, their ratio, and whether it is more than noise; differing conditions first."""
    lines = []
    for name in ("device", "threads", "driver", "python", "packages", "git"):
        old, new = before["environment"][name], after["environment"][name]
        if old != new:
            lines.append(f"{name} differs: {_differing(old, new)}")
    remaining = {(p["case"], p["key"]): p for p in after["problems"]}
    header = ["case and problem", "provider", "before", "after", "speed-up", "floor", ""]
    rows = []
    tally = {"faster": 0, "slower": 0, "same": 0}
    missing = []
    for problem in before["problems"]:
        other = remaining.pop((problem["case"], problem["key"]), None)
        if other is None:
            missing.append(f"only before: {problem['case']} {problem['key']}")
            continue
        floor = max(problem["noise_floor"] or 0.0, other["noise_floor"] or 0.0)
        others = {row["provider"]: row for row in other["rows"]}
        for row in problem["rows"]:
            new_row = others.get(row["provider"])
            if new_row is None or row["median_us"] is None or new_row["median_us"] is None or row["role"] == "again":
                continue
            word = change(row, new_row, floor)
            tally[word] += 1
            rows.append(
                [
                    f"{problem['case']} {problem['key']}",
                    row["provider"],
                    duration(row["median_us"]),
                    duration(new_row["median_us"]),
                    f"{row['median_us'] / new_row['median_us']:.2f}x",
                    f"{floor:.1%}",
                    word,
                ]
            )
    missing += [f"only after: {case} {key}" for case, key in remaining]
    summary = ", ".join(f"{count} {word}" for word, count in tally.items())
    return "\n".join([*lines, *([markdown(header, rows)] if rows else []), *missing, summary])


def _differing(old: Any, new: Any) -> str:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        return ", ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in names)
    return f"{old} -> {new}"
