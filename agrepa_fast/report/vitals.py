"""The section "Speed and health": rates, memory, dropped steps, loss by t, and whether the two losses agree."""

from __future__ import annotations

from html import escape
from statistics import mean, median
from typing import Any

from . import html
from .folder import RunFolder
from .log import Log, keys_under, number, series

BY_TIME = "flow_loss_t/"
GRADIENTS = "gradient_cosine/"


def section(run: RunFolder) -> str:
    return tables(run.log) or html.MISSING


def tables(log: Log) -> str:
    """Up to three tables; "" where the log holds nothing for them."""
    return _rates(log) + _by_time(log) + _gradients(log)


def _rates(log: Log) -> str:
    train = [entry for entry in log if entry.get("event") == "train"]
    if not train:
        return ""
    start: dict[str, Any] = next((entry for entry in log if entry.get("event") == "start"), {})
    last = train[-1]
    pairs: list[tuple[str, str]] = []
    for key, title in (("samples_per_second", "samples per second"), ("frames_per_second", "frames per second")):
        values = series(log, "train", key)[1]
        if len(values):
            pairs.append((f"{title}, median", html.significant(median(values))))
    shares = series(log, "train", "mfu")[1]
    rate = number(start.get("matmul_flops"))
    if len(shares) and rate:
        share, speed = median(shares), html.significant(rate / 1e12, 3)
        mfu = f"{share:.1%} of {speed} TFLOP/s of a large matrix product, measured when the run began"
        if share > 1:
            mfu = f"unknown: other work slowed the matrix product ({speed} TFLOP/s) that the run is compared with"
        pairs.append(("MFU, median", mfu))
    memory = series(log, "train", "memory_bytes")[1]
    if len(memory):
        pairs.append(("memory, first and last line", f"{memory[0] / 1e9:.2f} GB, {memory[-1] / 1e9:.2f} GB"))
    for key, title, unit in (("watts", "power", "W"), ("sm_mhz", "clock", "MHz"), ("utilisation", "utilisation", "%")):
        values = series(log, "train", key)[1]
        if len(values):
            pairs.append((f"{title}, median", f"{html.significant(median(values))} {unit}"))
    for key, title in (("skipped_steps", "steps dropped (gradients not finite)"), ("captures", "CUDA graphs captured")):
        value = number(last.get(key))
        if value is not None:
            pairs.append((title, html.count(value)))
    probes = [number(entry.get("share")) for entry in log if entry.get("event") == "probe"]
    if probes and probes[-1] is not None:
        pairs.append(("share of the run's time in probes, when the last one ended", f"{probes[-1]:.2%}"))
    for key, title in (("engine", "engine"), ("ranks", "ranks")):
        if start.get(key) is not None:
            pairs.append((title, escape(str(start[key]))))
    return html.table(["", "value"], [[title, value] for title, value in pairs])


def _by_time(log: Log) -> str:
    rows = []
    for key in keys_under(log, BY_TIME):
        values = series(log, "train", key)[1].tolist()
        if values:
            ends = max(1, len(values) // 10)
            first, last = mean(values[:ends]), mean(values[-ends:])
            rows.append([escape(key.removeprefix(BY_TIME)), html.significant(first), html.significant(last)])
    if not rows:
        return ""
    header = ["train flow loss at t (0 = noise, 1 = data)", "first tenth of the run", "last tenth"]
    return html.table(header, rows)


def _gradients(log: Log) -> str:
    rows = []
    for key in keys_under(log, GRADIENTS, ("gradients",)):
        steps, values = series(log, "gradients", key)
        if len(values):
            lowest = int(values.argmin())
            low = f"{values[lowest]:.3f} <span class='quiet'>at {html.count(steps[lowest])}</span>"
            rows.append([escape(key.removeprefix(GRADIENTS)), f"{values[0]:.3f}", f"{values[-1]:.3f}", low])
    if not rows:
        return ""
    header = ["layer: cosine of flow and alignment gradients", "first", "last", "lowest"]
    note = '<p class="note">Below zero the two losses pull the layer apart: alignment is doing harm there.</p>'
    return html.table(header, rows) + note
