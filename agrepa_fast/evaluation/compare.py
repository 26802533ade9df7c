"""Measure sets of recordings with metrics, and put the numbers into one table for each metric.

The result is plain data for a JSON file:
{"metrics": [{"key", "title", "tool", "note", "columns", "problem", "rows": [row]}]}; a row is {"name", "kind",
"domain", "clips", "of", "values": {column: {"value", "low", "high"}}, "differences", "note"}. A number that does not
exist is absent and the note says why; the file never holds NaN.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.verdicts import cache_folder
from ..errors import UserError
from .bootstrap import CONFIDENCE, RESAMPLES, Estimate
from .metric import Metric
from .recordings import Recording, Recordings, read_sound

ALL = "all"
Measured = dict[str, Tensor]  # by the clips' keys
Progress = Callable[[str, Sequence[Recording]], Iterable[Recording]]


def compare(
    metrics: Sequence[Metric],
    reference: Recordings | None,
    rows: Sequence[Recordings],
    spoken: Sequence[str],
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """One table for each metric.

    Args:
        reference: the recordings; their own row comes first. None: nothing to compare with.
        rows: the other rows in order. Differences are to the first of kind "run" or "folder".
        spoken: the domains of speech. Metrics of speech measure no others.
        progress: wraps the clips of one row while they are measured.
    """
    everything = [*([reference] if reference else []), *rows]
    domains = sorted({clip.domain for row in everything for clip in row.clips})
    tables = []
    for metric in metrics:
        measured_domains = [domain for domain in domains if domain in spoken] if metric.spoken else domains
        table = _Table(metric, reference, measured_domains, seed, progress or (lambda label, clips: clips))
        tables.append(table.fill(everything, domains))
    return tables


class _Table:
    """The table of one metric."""

    def __init__(
        self, metric: Metric, reference: Recordings | None, domains: list[str], seed: int, progress: Progress
    ) -> None:
        self.metric = metric
        self.seed = seed
        self.progress = progress
        self.domains = domains
        self.partners = {clip.key: clip for clip in reference.clips} if reference else None
        self.reference: Measured = {}
        self.first: Measured = {}

    def fill(self, sets: Sequence[Recordings], all_domains: list[str]) -> dict[str, Any]:
        metric, lines = self.metric, []
        problem = ""
        if not self.domains:
            problem = f"it measures speech, and no clip is of a domain of speech ({', '.join(all_domains)})"
        else:
            texts = [clip.text for row in sets for clip in row.clips if clip.domain in self.domains]
            metric.prepare(list(dict.fromkeys(texts)))
            for row in sets:
                lines += self._rows(row)
        return {
            "key": metric.key,
            "title": metric.title,
            "tool": metric.tool,
            "note": metric.note,
            "columns": dict(metric.columns),
            "problem": problem,
            "rows": lines,
        }

    def _rows(self, row: Recordings) -> list[dict[str, Any]]:
        """The lines of one set: all domains together where there are several, then each."""
        clips = [clip for clip in row.clips if clip.domain in self.domains]
        is_reference = row.kind == "reference"
        if (self.metric.paired or self.metric.of_sets) and self.partners is None:
            return [self._line(row, ALL, [], {}, "no recordings to compare with: give --reference")]
        if self.metric.paired and is_reference:
            return [self._line(row, ALL, [], {}, "the recordings themselves")]
        measured, reasons = self._measure(row, clips)
        if is_reference:
            self.reference = measured
        first = row.kind in ("run", "folder") and not self.first
        lines = []
        for domain in [ALL, *self.domains] if len(self.domains) > 1 else self.domains:
            part = [clip for clip in clips if domain in (ALL, clip.domain)]
            left_out = Counter(reasons[clip.key] for clip in part if clip.key in reasons)
            left_out += Counter(reason for key, reason in row.left_out.items() if self._belongs(key, domain))
            lines.append(self._line(row, domain, part, measured, _why(left_out), sum(left_out.values())))
        if first:
            self.first = measured
        return lines

    def _belongs(self, key: str, domain: str) -> bool:
        """Whether a clip that a set lacks would be in a line. Only its recording says of which domain it is."""
        partner = (self.partners or {}).get(key)
        if partner is None:
            return domain == ALL or len(self.domains) == 1
        return partner.domain in self.domains if domain == ALL else partner.domain == domain

    def _line(
        self,
        row: Recordings,
        domain: str,
        clips: Sequence[Recording],
        measured: Measured,
        note: str,
        left_out: int = 0,
    ) -> dict[str, Any]:
        metric = self.metric
        keys = [clip.key for clip in clips if clip.key in measured]
        missing = sum(clip.key not in measured for clip in clips)
        line: dict[str, Any] = {"name": row.name, "kind": row.kind, "domain": domain, "clips": len(keys)}
        line |= {"of": len(keys) + max(missing, left_out), "values": {}, "differences": {}, "note": note}
        if not keys:
            line["note"] = note or "no clips"
            return line
        values = torch.stack([measured[key] for key in keys])
        try:
            if row.kind == "reference" and metric.of_sets:
                estimates, remark = self._halves(values)
            else:
                estimates, remark = metric.estimate(values, self._reference_part(domain), self.seed)
        except UserError as error:
            estimates, remark = {}, str(error)
        line["values"], wrong = _finite(estimates)
        if row.kind in ("run", "folder") and self.first and estimates:
            shared = [key for key in keys if key in self.first]
            if shared:
                pair = [torch.stack([source[key] for key in shared]) for source in (measured, self.first)]
                line["differences"], _ = _finite(metric.difference(pair[0], pair[1], self.seed))
        single = "one clip: no interval" if len(keys) == 1 and line["values"] else ""
        line["note"] = "; ".join(part for part in (note, remark, single, wrong) if part)
        return line

    def _reference_part(self, domain: str) -> Tensor | None:
        assert self.partners is not None or not self.reference
        keys = [key for key in self.reference if domain in (ALL, (self.partners or {})[key].domain)]
        return torch.stack([self.reference[key] for key in keys]) if keys else None

    def _halves(self, values: Tensor) -> tuple[dict[str, Estimate], str]:
        """The distance between two random halves of the reference: what equal distributions score."""
        if values.shape[0] < 4:
            raise UserError(f"{values.shape[0]} clips: too few for the distance between two halves")
        order = torch.randperm(values.shape[0], generator=torch.Generator().manual_seed(self.seed))
        half = values.shape[0] // 2
        estimates, remark = self.metric.estimate(values[order[:half]], values[order[half:]], self.seed)
        return estimates, "; ".join(part for part in ("one half of the reference against the other", remark) if part)

    def _measure(self, row: Recordings, clips: Sequence[Recording]) -> tuple[Measured, dict[str, str]]:
        """Each clip's measurement, and why others have none."""
        metric = self.metric
        file = _cache_file(metric, clips) if row.kind == "reference" else None
        cached = _load(file, clips)
        if cached is not None:
            return cached, {}
        measured: Measured = {}
        reasons: dict[str, str] = {}
        for clip in self.progress(f"{metric.key}: {row.name}", clips):
            try:
                measured[clip.key] = self._measure_clip(clip)
            except UserError as error:
                reasons[clip.key] = str(error).removeprefix(f"{clip.path}: ")
        if not reasons:
            _save(file, measured, clips)
        return measured, reasons

    def _measure_clip(self, clip: Recording) -> Tensor:
        metric, partner = self.metric, (self.partners or {}).get(clip.key)
        if metric.paired and partner is None:
            raise UserError("no reference recording has its name")
        if metric.needs_text and clip.cut:
            raise UserError("longer than the part that is generated, whose words nobody knows")
        if metric.needs_text and not clip.text:
            raise UserError("no text to compare with")
        reference = None
        if metric.paired and partner is not None:
            reference = read_sound(partner, metric.sample_rate)
        value = metric.measure(read_sound(clip, metric.sample_rate, whole=metric.whole), clip, reference)
        value = value.detach().double().cpu()
        if not value.isfinite().all():
            raise UserError("the measurement is not finite")
        return value


def _why(left_out: Counter[str]) -> str:
    """How many clips are left out, and the reasons, the most frequent first."""
    if not left_out:
        return ""
    reasons = [f"{count}: {reason}" for reason, count in left_out.most_common(3)]
    more = ", ..." if len(left_out) > 3 else ""
    return f"left out {'; '.join(reasons)}{more}"


def _finite(estimates: dict[str, Estimate]) -> tuple[dict[str, dict[str, float | None]], str]:
    """The estimates as plain data, without those that are no finite number; and a note about these."""
    good = {name: estimate for name, estimate in estimates.items() if math.isfinite(estimate.value)}
    wrong = [name for name in estimates if name not in good]
    return {name: e.as_dict() for name, e in good.items()}, f"{', '.join(wrong)}: not finite" if wrong else ""


def _cache_file(metric: Metric, clips: Sequence[Recording]) -> Path | None:
    """Where the measurements of these files by this metric are kept; its name changes with the files and the metric."""
    folder, fingerprint = cache_folder(), metric.fingerprint()
    if folder is None or fingerprint is None:
        return None
    try:
        stamps = [(str(c.path.resolve()), os.stat(c.path).st_size, os.stat(c.path).st_mtime_ns) for c in clips]
    except OSError:
        return None
    parts = [(clip.key, clip.start, clip.seconds) for clip in clips]
    digest = hashlib.sha256(json.dumps([metric.key, fingerprint, stamps, parts]).encode("utf-8", "surrogateescape"))
    return folder / f"evaluation-{digest.hexdigest()[:32]}.npy"


def _load(file: Path | None, clips: Sequence[Recording]) -> Measured | None:
    """What was kept; None where there is nothing usable."""
    if file is None or not file.is_file():
        return None
    try:
        values = torch.from_numpy(np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return None
    if values.ndim != 2 or values.shape[0] != len(clips) or not values.isfinite().all():
        return None
    return {clip.key: value for clip, value in zip(clips, values)}


def _save(file: Path | None, measured: Measured, clips: Sequence[Recording]) -> None:
    """Keep measurements; a folder that cannot be written costs time, nothing else."""
    if file is None or not measured:
        return
    aside = file.with_name(f".{file.name}.{os.getpid()}.npy")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(aside, torch.stack([measured[clip.key] for clip in clips]).numpy())
        os.replace(aside, file)
    except OSError:
        aside.unlink(missing_ok=True)


def method(seed: int) -> dict[str, Any]:
    """How the intervals were made."""
    return {"seed": seed, "confidence": CONFIDENCE, "resamples": RESAMPLES, "unit": "clip"}
