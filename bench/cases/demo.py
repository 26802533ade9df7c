"""The demo from end to end, cut short: `agrepa train demo` with data, steps, probe, sample and report.

The built-in corpus is written before; probe, validation and sampling use a clip or two. A call is a whole run in a new
folder. Its gate is that a second run ends with the same validation loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import tempfile
from pathlib import Path

import torch

from agrepa_fast.errors import UserError

from ..case import Outputs, Problem, Provider, Run, Setup, Unavailable

TITLE = "End-to-end demo"
STEPS = {"toy": 2, "quick": 8, "full": 100}


def problems(scale: str, device: torch.device) -> list[Problem]:
    steps = STEPS[scale]
    return [
        Problem(
            params={"preset": "demo", "steps": steps, "dtype": "float32"},
            dtype="float32",
            bytes=None,
            flops=None,
            build=functools.partial(_build, steps),
            single=True,
        )
    ]


def _build(steps: int, device: torch.device) -> Setup:
    from agrepa_fast.data.corpus import write_corpus

    keep = tempfile.TemporaryDirectory(prefix="agrepa-bench-")
    clips = 12 if steps == STEPS["toy"] else 120
    corpus = write_corpus(Path(keep.name) / "corpus", seed=0, speech=clips, audio=clips)

    def ours() -> Run:
        return functools.partial(_train, steps, Path(keep.name), str(corpus), device)

    def reference() -> Outputs:
        try:
            return ours()()
        except Unavailable:
            return (torch.zeros(2),)

    bound = 1e-6 if device.type == "cpu" else 5e-2
    return Setup((Provider("ours", "ours", ours),), reference, {"steps and loss": bound})


def _train(steps: int, folder: Path, corpus: str, device: torch.device) -> Outputs:
    """Train in a new folder; the steps done and the last validation loss."""
    try:
        from agrepa_fast.training.config import RUN_PRESETS
        from agrepa_fast.training.start import start_run

        demo = RUN_PRESETS["demo"]
        with tempfile.TemporaryDirectory(dir=folder) as out, contextlib.redirect_stderr(io.StringIO()):
            config = dataclasses.replace(
                demo,
                data=dataclasses.replace(demo.data, train=(corpus,)),
                probe=dataclasses.replace(demo.probe, start=steps // 4, samples=2, t_grid=(0.5,)),
                flow=dataclasses.replace(demo.flow, points=4),
                train=dataclasses.replace(
                    demo.train,
                    steps=steps,
                    device=str(device),
                    precision="fp32",
                    valid_every=steps,
                    valid_samples=2,
                    samples=1,
                    checkpoint_every=steps,
                    out=out,
                    name="run",
                ),
            )
            run_dir = start_run(config).run()
            records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    except (ImportError, UserError) as error:
        if isinstance(error, UserError) and "install" not in str(error):
            raise
        raise Unavailable(str(error)) from None
    [end] = [record for record in records if record.get("event") == "end"]
    losses = [record for record in records if record.get("event") == "valid"]
    return (torch.tensor([float(end["step"]), float(losses[-1]["flow_loss"])], dtype=torch.float64),)
