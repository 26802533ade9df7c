"""`agrepa evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError
from ..imports import import_module
from .options import number, overrides, seed

if TYPE_CHECKING:
    import torch

    from ..evaluation.metric import Metric
    from ..evaluation.recordings import Recordings
    from ..training.synthesis import Run

T = TypeVar("T")

HELP = "Measure generated audio against recordings: a run's held-out clips, or folders of sound files."
EXAMPLES = """\
examples:
  agrepa evaluate runs/mine
  agrepa evaluate runs/mine runs/other --clips 500 --fad spectral openai/whisper-base
  agrepa evaluate runs/mine --asr openai/whisper-large-v3 --text-form english --mos mymos:score
  agrepa evaluate generated/ --reference recordings/
"""
NONE = "none"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("targets", nargs="+", metavar="RUN|FOLDER", help="runs, checkpoints, or folders of sound files")
    parser.add_argument(
        "--reference", nargs="+", metavar="LIST", default=[], help="lists or folders of recordings to compare with"
    )
    parser.add_argument("--clips", type=int, default=100, help="at most this many clips, from the domains in turn")
    parser.add_argument(
        "--prompt", type=number, default=0.0, metavar="SECONDS", help="show the model so much of each clip"
    )
    parser.add_argument("--fad", nargs="+", default=["spectral"], metavar="TEACHER", help="teachers for FAD, or none")
    parser.add_argument(
        "--asr", default="pocketsphinx", help="recogniser for WER: a transformers model, module:function, or none"
    )
    parser.add_argument(
        "--text-form", default="plain", help="how to normalise texts before WER: plain, english, or module:function"
    )
    parser.add_argument("--mos", default="dnsmos", help="predictor of opinion scores: dnsmos, module:function, or none")
    parser.add_argument(
        "--speaker", default="resemblyzer", help="speaker encoder: a transformers model, module:function, or none"
    )
    parser.add_argument(
        "--speech", nargs="+", default=["speech"], metavar="DOMAIN", help="domains whose text is a transcript"
    )
    parser.add_argument(
        "--domain", default="speech", help="domain of the files of a folder without a list (default: speech)"
    )
    parser.add_argument("--imports", nargs="+", metavar="MODULE", default=[], help="modules that register teachers")
    parser.add_argument("--out", type=Path, help="folder to write (default: evaluation, in the first run's folder)")
    parser.add_argument("--points", type=int, help="grid points of the sampler")
    parser.add_argument("--guidance", type=number, help="strength of classifier-free guidance")
    parser.add_argument("--method", choices=("euler", "midpoint"), help="solver of the sampler")
    parser.add_argument(
        "--weights",
        choices=("model", "ema"),
        default="ema",
        help="which weights of the checkpoints to use (default: ema)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the noise and of the resamples (default: 0)")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")


def run(arguments: argparse.Namespace) -> int:
    from .. import __version__
    from ..evaluation.compare import compare, method
    from ..evaluation.tables import text
    from ..report import write_evaluation_page, write_report
    from ..training.checkpoint import is_checkpoint, write_whole
    from ..training.environment import pick_device
    from ..training.synthesis import open_run

    check(arguments)
    device = pick_device(arguments.device, "--device")
    for module in arguments.imports:
        import_module(module, "--imports")
    paths = [Path(target) for target in arguments.targets]
    is_run = [is_checkpoint(path) or (path / "checkpoints").is_dir() for path in paths]
    names = ("points", "guidance", "method")
    changes = overrides({f"flow.{name}": getattr(arguments, name) for name in names})
    runs = {path: open_run(path, changes) for path, yes in zip(paths, is_run) if yes}
    folders = [path for path, yes in zip(paths, is_run) if not yes]
    out = arguments.out or (next(iter(runs.values())).folder if runs else Path()) / "evaluation"
    _check_out(out, [*folders, *map(Path, arguments.reference)])
    # Built before anything is generated: a wrong name must not cost an hour.
    metrics, missing = _metrics(arguments, device)
    reference, rows, notes = (_from_runs if runs else _from_folders)(arguments, runs, paths, out, device)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    result = {
        "version": __version__,
        "method": {**method(arguments.seed), "prompt_seconds": arguments.prompt, "speech": arguments.speech},
        "targets": [_facts(path, runs.get(path), arguments) for path in paths],
        "notes": notes,
        "metrics": [*compare(metrics, reference, rows, arguments.speech, arguments.seed, _progress), *missing],
    }
    file = out / "evaluation.json"
    out.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    print(text(result))
    print(f"\nwritten: {file}, {write_evaluation_page(out)}")
    if runs and arguments.out is None:
        print(f"report: {write_report(out.parent)}")
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Refuse numbers that do not fit."""
    if arguments.clips < 1:
        raise UserError(f"--clips: expected at least 1, got {arguments.clips}")
    if not 0 <= arguments.prompt <= 3600:
        raise UserError(f"--prompt: expected 0 to 3600 seconds, got {arguments.prompt:g}")


def rehearse(arguments: argparse.Namespace) -> None:
    """Find out whether the command can measure all that it is asked to, without a run.

    A study calls this before it trains the runs that are to be evaluated. The metrics are built on the CPU, so that
    nothing stays on a device.

    Raises:
        UserError: no such device or module, a metric that cannot be built, a package that is not installed, or a list
            of recordings that cannot be read.
    """
    import torch

    from ..data.manifest import read_manifest
    from ..training.clips import BUILTIN
    from ..training.environment import pick_device

    pick_device(arguments.device, "--device")
    for module in arguments.imports:
        import_module(module, "--imports")
    _, missing = _metrics(arguments, torch.device("cpu"))
    if missing:
        raise UserError(f"{missing[0]['problem']}, or leave the metric out (none)")
    for spec in arguments.reference:
        if spec != BUILTIN:
            read_manifest(spec, allow_outside=True)


def _metrics(arguments: argparse.Namespace, device: torch.device) -> tuple[list[Metric], list[dict[str, Any]]]:
    """The metrics that can run, and the tables of those whose packages are missing."""
    from ..evaluation.distortion import SpectralDistance
    from ..evaluation.frechet import build_frechet
    from ..evaluation.metric import MissingPackage
    from ..evaluation.opinion import build_opinion
    from ..evaluation.speaker import build_speaker
    from ..evaluation.words import build_words

    asr, mos, speaker = arguments.asr, arguments.mos, arguments.speaker
    builders: list[tuple[str, str, Callable[[], Metric]]] = [
        *((name, f"Frechet audio distance ({name})", partial(build_frechet, name, device)) for name in arguments.fad),
        (asr, "Word and character error rate", partial(build_words, asr, arguments.text_form, device)),
        (mos, f"Opinion score ({mos})", partial(build_opinion, mos)),
        (speaker, "Speaker similarity", partial(build_speaker, speaker, device)),
        ("", "", SpectralDistance),
    ]
    metrics, missing = [], []
    for name, title, build in builders:
        if name == NONE:
            continue
        try:
            metrics.append(build())
        except MissingPackage as error:
            missing.append(
                {"key": title, "title": title, "tool": "", "note": "", "columns": {}, "problem": str(error), "rows": []}
            )
    return metrics, missing


Sets = tuple["Recordings | None", list["Recordings"], list[str]]


def _from_runs(
    arguments: argparse.Namespace, runs: dict[Path, Run], paths: Sequence[Path], out: Path, device: torch.device
) -> Sets:
    """The reference, its resynthesis, what the runs generate, and the folders beside them."""
    from ..training.synthesis import generated, held_out_clips, reference_recordings, resynthesised, shared_seconds

    opened = list(runs.values())
    clips, notes = held_out_clips(opened, arguments.reference, arguments.clips)
    reference, by_key = reference_recordings(clips, shared_seconds(opened), arguments.prompt)
    rows = []
    vocoders = {(r.config.mel, r.config.train.vocoder): r for r in reversed(opened)}
    for (mel, vocoder), owner in reversed(vocoders.items()):
        name = owner.name if len(vocoders) > 1 else ""
        folder = out / "audio" / "-".join(filter(None, ("resynthesised", name)))
        rows.append(resynthesised(reference, folder, mel, vocoder, _progress, name))
    partners = {clip.key: clip for clip in reference.clips}
    for path, name in zip(paths, _names(paths, runs)):
        if path not in runs:
            rows.append(_folder(path, name, arguments.domain, partners))
            continue
        folder = out / "audio" / name
        rows.append(
            generated(
                runs[path],
                reference,
                by_key,
                folder,
                name=name,
                seed=arguments.seed,
                device=device,
                weights=arguments.weights,
                progress=_progress,
            )
        )
    return reference, rows, notes


def _from_folders(
    arguments: argparse.Namespace, runs: dict[Path, Run], paths: Sequence[Path], out: Path, device: torch.device
) -> Sets:
    """The folders, and their reference with its resynthesis where there is one."""
    from ..data.mel import MEL_PRESETS
    from ..evaluation.recordings import check_readable, keyed, read_set, whole_files
    from ..training.synthesis import resynthesised

    for name in ("points", "guidance", "method"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name}: only for a run; {paths[0]} holds sound files")
    if arguments.prompt:
        raise UserError(f"--prompt: only for a run; {paths[0]} holds sound files")
    if len(arguments.reference) > 1:
        raise UserError("--reference: expected one list or folder, as the targets are folders")
    reference, rows, partners = None, [], None
    if arguments.reference:
        clips, _ = read_set(arguments.reference[0], arguments.domain)
        reference = whole_files(keyed(clips), "reference", "reference")
        partners = {clip.key: clip for clip in reference.clips}
    targets = [_folder(path, name, arguments.domain, partners) for path, name in zip(paths, _names(paths, runs))]
    for recordings in [*targets, *([reference] if reference else [])]:
        check_readable(recordings)
    if reference is not None:
        # Nobody knows the vocoder that made the folders: a common one stands for it, and is named.
        folder = out / "audio" / "resynthesised"
        rows.append(resynthesised(reference, folder, MEL_PRESETS["vocos-24khz"], "auto", _progress))
    return reference, [*rows, *targets], []


def _folder(path: Path, name: str, domain: str, partners: Any) -> Recordings:
    from ..evaluation.recordings import keyed, matched, read_set

    clips, listed = read_set(path, domain)
    return matched(keyed(clips), listed, partners, name)


def _names(paths: Sequence[Path], runs: dict[Path, Run]) -> list[str]:
    """A name for each target: its folder's, or its path with dashes where several would have one name."""
    names = [runs[path].name if path in runs else path.resolve().name for path in paths]
    reserved = {"reference", "resynthesised"}
    return [
        str(path).strip("/.").replace("/", "-") if names.count(name) > 1 or name in reserved else name
        for path, name in zip(paths, names)
    ]


def _check_out(out: Path, sources: Sequence[Path]) -> None:
    """Refuse to write sound files where the next evaluation would read them."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    for source in sources:
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise UserError(f"--out {out}: lies inside {source}, whose sound files are evaluated; give another folder")


def _facts(path: Path, run: Run | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the JSON file says of a target."""
    if run is None:
        return {"kind": "folder", "path": str(path)}
    flow = run.config.flow
    sampler = {"points": flow.points, "guidance": flow.guidance, "method": flow.method, "sway": flow.sway_coefficient}
    return {
        "kind": "run",
        "path": str(path),
        "checkpoint": str(run.checkpoint),
        "step": run.step,
        "weights": arguments.weights,
        "sampler": sampler,
    }


def _progress(label: str, items: Sequence[T]) -> Iterable[T]:
    """The items, with a progress bar where they take longer than a second, on a terminal and with tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=label, unit="clip", delay=1.0, leave=False, file=sys.stderr, disable=None)
