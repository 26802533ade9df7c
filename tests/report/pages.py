"""A run's log and scores made up for the tests, and a parser of the page that is made of them."""

from __future__ import annotations

import wave
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch

from agrepa_fast.attribution.scd import Stored
from agrepa_fast.attribution.scores import LayerScores

KINDS = ("FoG-A", "LASP", "CKA")


# Two probes of three layers: FoG-A's order 0 1 2, then 0 2 1; layers 0 and 1 are chosen, then 0 and 2.
PROBED = (
    {
        "foga": [0.9, 0.5, 0.1],
        "selection": {"layers": [0, 1], "weights": [0.6, 0.4]},
        "share": 0.25,
        "scd": [
            {"domain": "<speech>", "foga": [3, 2, 1], "lasp": [0.1, 0.2, 0.3], "spearman": -1.0, "low": -1, "high": 0.5}
        ],
        "by_clips": {"clips": [1, 2, 4], "agreement": [0.5, 0.75, 1.0], "overlap": [0.6, 0.8, 1.0]},
    },
    {
        "foga": [0.9, 0.1, 0.5],
        "share": 0.5,
        "scd": [{"domain": "<speech>", "foga": [3, 1, 2], "lasp": [0.1, 0.2, 0.3], "spearman": None}],
        "by_clips": {"clips": [1, 2, 4], "agreement": [0.25, 0.625, 1.0], "overlap": [0.6, 0.8, 1.0]},
    },
)
SECTIONS = {
    "summary",
    "loss",
    "cosine",
    "probes",
    "foga",
    "scd",
    "selection",
    "vitals",
    "samples",
    "evaluation",
    "skipped",
    "config",
    "versions",
}


NOT_RECORDED = "not recorded in this run"


VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Text and table rows by section id, every tag with its attributes; fails on tags that do not pair up."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.here = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "section":
            self.here = attributes["id"]
            self.sections[self.here], self.rows[self.here] = "", []
        if tag == "tr":
            self.rows[self.here].append([])
        if tag in ("td", "th"):
            self.rows[self.here][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "section":
            self.here = ""

    def handle_data(self, data):
        if self.here:
            self.sections[self.here] += data
            if any(tag in ("td", "th") for tag in self.open):
                self.rows[self.here][-1][-1] += data

    def attribute(self, tag, name):
        return [attributes[name] for found, attributes in self.tags if found == tag and name in attributes]


TEXT = 'He said "1 < 2 & 3" <script>alert(1)</script> $x_{'


def write_wav(path: Path, frequency: float) -> None:
    samples = (8000 * np.sin(np.arange(1600) * 2 * np.pi * frequency / 16000)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.tobytes())


def entries() -> list[dict]:
    log: list[dict] = [
        {
            "event": "start",
            "time": "2025-01-02T03:04:05",
            "versions": {"torch": "9.8.7", "odd": None},
            "device": "cpu",
            "parameters": {"model": 1234567, "conditioner": 8901, "heads": 234},
            "clips": {"train": 4321, "valid": 56},
            "domains": {"speech": 4000, "audio": 321},
        }
    ]
    log += [
        {"event": "skipped", "path": f"clip_{i:03}.wav", "source": "a.csv", "reason": f"broken <{i}>"}
        for i in range(23)
    ]
    for step in (0, 10, 20, 30):
        log.append(
            {
                "event": "train",
                "step": step,
                "flow_loss": 2.0 - step / 100,
                "align_weight": 0.0 if step < 20 else 1.0,
                "samples_per_second": 40.0 + step,
                "frames_per_second": 1000.0,
                "cosine/speech/3": step / 100,
                "cosine/speech/10": step / 200,
                "surprise": [1, {}],
            }
        )
    log += [
        {
            "event": "valid",
            "step": 0,
            "flow_loss": 1.7654,
            "flow_loss/speech": 1.5,
            "cosine/speech/3": 0.0123,
        },
        {
            "event": "valid",
            "step": 30,
            "flow_loss": 0.4321,
            "flow_loss/speech": 0.3,
            "cosine/speech/3": 0.6543,
        },
        {"event": "probe", "step": 20, "seconds": 1.5, "block_evaluations": 6, **PROBED[0]},
        {
            **PROBED[1],
            "event": "probe",
            "step": 30,
            "seconds": 2.5,
            "selection": {"layers": [0, 2], "weights": [0.7, 0.3]},
        },
        {"event": "never heard of", "step": "later"},
    ]
    for step in range(1, 8):
        log.append(
            {
                "event": "sample",
                "step": step,
                "path": f"samples/{step}.wav",
                "text": TEXT,
                "domain": "speech",
                "reference": "samples/reference.wav",
            }
        )
    log.append({"event": "end", "step": 30, "seconds": 3725.0})
    return log


SCORES = LayerScores(
    layers=(0, 1, 2),
    by_sample=torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.01, 0.03, 0.01, 0.03], [0.5, 0.5, 0.9, 0.9]], dtype=torch.float64),
    t=torch.tensor([0.25, 0.75, 0.25, 0.75]),
    domains=("audio", "audio", "speech", "speech"),
)


LASP = torch.tensor([[0.1, 0.3], [0.4, 0.4], [0.2, 0.2]], dtype=torch.float64)


STORED = [Stored(domain, f"<{domain}>", LASP, torch.tensor([0.5, 0.25, 0.125]), 7) for domain in ("speech", "audio")]
