"""Whether a run's commands scale: their time, the time of a start, and memory over many clips.

    python -m agrepa_fast.bench.scale commands                 # extract, train, probe, evaluate on the built-in corpus
    python -m agrepa_fast.bench.scale commands LIST [LIST ...]  # on these lists
    python -m agrepa_fast.bench.scale start --clips 100000     # seconds until the batches are planned
    python -m agrepa_fast.bench.scale memory --clips 10000     # resident memory of extraction and of training

It prints JSON. Clips of `start` and `memory` are generated: 0.1 s of noise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agrepa_fast.data.libraries import import_soundfile
from agrepa_fast.report import read_log

SAMPLES = 1600  # of a generated clip, at 16 kHz
KINDS = 50  # different sounds; their files differ in the first samples
TINY = (
    *("model.depth=2", "model.width=8", "model.heads=1", "model.token_width=4", "mel.mels=8", "probe.k=1"),
    *("data.max_seconds=0.1", "data.buckets=1", "data.frames_per_batch=350", "data.workers=0"),
    *("train.samples=0", "train.valid_samples=1", "train.device=cpu", "train.threads=1", "probe.samples=2"),
)


def write_clips(folder: Path, count: int) -> Path:
    """A list of `count` different clips of 0.1 s, and their files; returns the list."""
    library = import_soundfile()
    sounds = (3000 * np.random.default_rng(0).standard_normal((KINDS, SAMPLES))).astype(np.int16)
    rows = ["audio_file|text|domain"]
    for number in range(count):
        sound = sounds[number % KINDS].copy()
        sound[:2] = np.array([number], np.int32).view(np.int16) // 4  # so that no two files are alike
        sound[2] = number % 30_000
        name = f"{number // 1000:03d}/{number:06d}.wav"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        library.write(folder / name, sound, 16_000, subtype="PCM_16")
        rows.append(f"{name}|clip {number}|{'audio' if number % 2 else 'speech'}")
    (folder / "list.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "list.csv"


def commands(folder: Path, lists: Sequence[str]) -> dict[str, float]:
    """Seconds of each command of the demo, in processes of their own. The report is in the run's folder then."""
    data = [f"data.train=[{','.join(str(Path(path).absolute()) for path in lists)}]"] if lists else []
    cached = "alignment.teachers.spectral.cached=true"
    steps = {
        "extract": ["extract", "demo", *data, "--teacher", "spectral", "--int8"],
        "train": ["train", "demo", *data, cached],
        "probe": ["probe", "runs/demo"],
        "evaluate": ["evaluate", "runs/demo"],
    }
    seconds = {}
    for name, words in steps.items():
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "agrepa_fast", *words], cwd=folder, check=True, stdout=sys.stderr)
        seconds[name] = time.perf_counter() - began
    if not (folder / "runs/demo/report.html").exists():
        raise RuntimeError(f"{folder}: the run has left no report.html")
    waits = [e["data_wait"] for e in read_log(folder / "runs/demo/log.jsonl") if e.get("event") == "train"]
    return seconds | {"total": sum(seconds.values()), "data_wait": float(np.mean(waits))}


def start(folder: Path, count: int) -> dict[str, float]:
    """Seconds from the configuration to the plan of the batches, at the first start and at a later one."""
    from agrepa_fast.data.buckets import BucketBatches
    from agrepa_fast.training.clips import load_data
    from agrepa_fast.training.config import load_config

    config = load_config("demo", [f"data.train=[{write_clips(folder / 'clips', count)}]", *TINY])
    time.sleep(2.5)  # files this fresh are not remembered
    os.environ["AGREPA_CACHE"] = str(folder / "cache")
    seconds = {}
    for name in ("first", "later"):
        began = time.perf_counter()
        data = load_data(config, folder)
        BucketBatches(
            data.train.lengths,
            buckets=config.bucket_frames,
            frames_per_batch=config.data.frames_per_batch,
            seed=0,
            domains=[clip.domain for clip in data.train.clips],
            balance=True,
            tokens=data.train.token_lengths,
        ).batch(0)
        seconds[name] = time.perf_counter() - began
    return seconds


def memory(folder: Path, count: int) -> dict[str, Any]:
    """Resident bytes of this process at a quarter and at the end of an extraction, and of two epochs of training."""
    import torch

    from agrepa_fast.training.config import load_config
    from agrepa_fast.training.extract import Extraction
    from agrepa_fast.training.rates import resident_bytes
    from agrepa_fast.training.start import start_run

    listed = write_clips(folder / "clips", count)
    shared = [f"data.train=[{listed}]", *TINY, f"train.out={folder / 'runs'}"]
    config = load_config("demo", shared)
    extraction = Extraction(config, ["spectral"], int8=True)
    seen: list[tuple[float, int]] = [(0.0, resident_bytes() or 0)]
    extraction.run(lambda seconds: seen.append((seen[-1][0] + seconds, resident_bytes() or 0)))
    total = seen[-1][0]
    quarter = next(size for done, size in seen if done >= total / 4)
    steps = 2 * -(-count // (350 // 6))
    run = ("alignment.teachers.spectral.cached=true", f"train.steps={steps}", f"train.log_every={max(1, steps // 16)}")
    later = ("probe.start=1", "train.valid_every=1000000", "train.checkpoint_every=1000000")
    threads = torch.get_num_threads()
    try:
        log = read_log(start_run(load_config("demo", [*shared, *run, *later])).run() / "log.jsonl")
    finally:
        torch.set_num_threads(threads)
    lines = [event["memory_bytes"] for event in log if event.get("event") == "train"]
    return {
        "extraction": {"quarter": quarter, "end": seen[-1][1]},
        "training": {"quarter": lines[len(lines) // 4], "half": lines[len(lines) // 2], "end": lines[-1]},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("commands", "start", "memory"))
    parser.add_argument("lists", nargs="*", help="lists of clips for `commands`; none: the built-in corpus")
    parser.add_argument("--clips", type=int, default=10_000, help="clips to generate for `start` and `memory`")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.what == "commands":
            measured: dict[str, Any] = commands(folder, arguments.lists)
        else:
            measured = {"start": start, "memory": memory}[arguments.what](folder, arguments.clips)
    print(json.dumps({arguments.what: measured}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
