"""`agrepa`: train, probe, sample, bench, doctor. Mistakes in the input are one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError
from .fields import shown
from .imports import foreign_code, import_module

if TYPE_CHECKING:
    from .attribution.scd import Stored
    from .attribution.scores import LayerScores
    from .training.config import RunConfig

TRAIN_HELP = """\
examples:
  agrepa train demo
  agrepa train demo data.train=[speech/metadata.csv,sounds/metadata.csv] train.name=mine
  agrepa train my.yaml train.steps=20000 optimizer.lr=3e-4
  agrepa train --resume runs/demo
"""
PROBE_HELP = """\
examples:
  agrepa probe runs/demo
  agrepa probe runs/demo --data speech/metadata.csv --branches attn ff --out probe
  agrepa probe runs/demo --lasp
  agrepa probe mymodel:factory --k 3     # def factory(): return model, inputs
"""
SAMPLE_HELP = """\
examples:
  agrepa sample runs/demo --text "seven" --seconds 0.8 --out seven.wav
  agrepa sample runs/demo --text "seven" --reference voice.wav --reference-text "one two" --out seven.wav
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    warnings.showwarning = _one_line_warning
    try:
        if argv and argv[0] == "bench":
            from .bench.cli import main as bench  # it has commands of its own

            return bench(argv[1:])
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except UserError as error:
        print(f"agrepa: error: {error}", file=sys.stderr)
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`): nothing is left to say, nor to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"agrepa: error: {where}{error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("agrepa: interrupted", file=sys.stderr)
        return 130
    return 2


def _one_line_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"agrepa: warning: {message}", file=sys.stderr)


def _number(text: str) -> float:
    """A finite number of an option."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {shown(text)}")
    return number


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {2**63 - 1}, got {shown(text)}")
    return seed


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="agrepa",
        description="Train a compact DiT with attribution-guided alignment; score the layers of one.",
    )
    parser.add_argument("--version", action="version", version=f"agrepa-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: object, text: str, examples: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    train = add("train", _train, "Train from a preset (demo, small, base, paper) or a YAML file.", TRAIN_HELP)
    train.add_argument("config", nargs="?", help="preset's name or YAML file; not with --resume")
    train.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the configuration")
    train.add_argument("--resume", metavar="RUN", help="go on with a run's newest checkpoint (or the one given)")
    train.add_argument(
        "--accept-data-changes",
        action="store_true",
        help="with --resume: go on although clips were added, removed or changed; known ones stay held out or not",
    )

    probe = add("probe", _probe, "Score every layer of a checkpoint (FoG-A) and select the ones to align.", PROBE_HELP)
    probe.add_argument(
        "checkpoint",
        help="a checkpoint, a run's folder for its newest one, or module:factory, a function that returns "
        "(model, inputs) or (model, inputs, options of attribute_layers)",
    )
    probe.add_argument("--data", nargs="+", help="manifests; default: the run's held-out clips")
    probe.add_argument("--out", default="probe", help="folder for foga.csv, foga.json, pictures, selection.json")
    probe.add_argument("--samples", type=int, help="clips to score on")
    probe.add_argument("--t", nargs="+", type=_number, metavar="T", help="grid of t in [0, 1]")
    probe.add_argument("--metric", choices=("rms", "squared"))
    probe.add_argument("--k", type=int, help="layers to select")
    probe.add_argument("--branches", nargs="+", choices=("attn", "ff"), help="switch branches off, not whole blocks")
    probe.add_argument("--lasp", action="store_true", help="also what each layer stores of the run's teachers (SCD)")
    probe.add_argument("--imports", nargs="+", metavar="MODULE", help="with --lasp: modules that register teachers")
    probe.add_argument("--weights", choices=("model", "ema"), help="of the checkpoint (default: model)")
    probe.add_argument("--device", help="default: auto")

    sample = add("sample", _sample, "Generate audio from text with a checkpoint's EMA weights.", SAMPLE_HELP)
    sample.add_argument("checkpoint", help="a checkpoint, or a run's folder for its newest one")
    sample.add_argument("--text", required=True, help="what to say, or a caption of the sound")
    sample.add_argument("--domain", default="speech", help="decides the token vocabulary (default: speech)")
    sample.add_argument("--seconds", type=_number, default=1.0, help="length of what is generated")
    sample.add_argument("--reference", metavar="FILE", help="audio to continue in voice and manner")
    sample.add_argument("--reference-text", default="", help="what the reference says")
    sample.add_argument("--out", default="sample.wav", help="WAV file to write")
    sample.add_argument("--points", type=int, help="grid points of the sampler")
    sample.add_argument("--guidance", type=_number, help="strength of classifier-free guidance")
    sample.add_argument("--method", choices=("euler", "midpoint"))
    sample.add_argument("--seed", type=_seed, default=0)
    sample.add_argument("--device", default="auto")

    add("bench", _doctor, "Measure ops, probe, loss and training against their rivals: agrepa bench --help.")
    add("doctor", _doctor, "Print versions and devices, and what is installed for which use.")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from .alignment.selection import described
    from .training.config import dump_config, load_config
    from .training.distributed import leave, rank
    from .training.report import read_log
    from .training.trainer import resume_run, start_run

    if arguments.resume:
        # With --resume the first positional, if any, is a change like the rest.
        overrides = [arguments.config, *arguments.overrides] if arguments.config else arguments.overrides
        trainer = resume_run(arguments.resume, overrides, arguments.accept_data_changes)
    elif arguments.accept_data_changes:
        raise UserError("--accept-data-changes: only with --resume")
    elif arguments.config:
        trainer = start_run(load_config(arguments.config, arguments.overrides))
    else:
        raise UserError("train: give a preset or a YAML file, or --resume RUN")
    first = rank() == 0
    if first:
        print(dump_config(trainer.config))
    run_dir = trainer.run()
    leave()
    if not first:
        return 0
    valid = [entry for entry in read_log(run_dir / "log.jsonl") if entry.get("event") == "valid"]
    losses = [loss for entry in valid if isinstance(loss := entry.get("flow_loss"), float)]
    if trainer.stopping:
        print(f"stopped after step {trainer.step}; go on with: agrepa train --resume {run_dir}")
    elif losses:
        print(f"validation flow-matching loss: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    if trainer.selection is not None:
        a = trainer.config.alignment
        label = "aligned layers" if a.enabled and a.weight > 0 else "selected layers, not aligned"
        print(f"{label} (0-based): {described(trainer.selection)}")
    print(f"report: {run_dir / 'report.html'}")
    return 0


def _probe(arguments: argparse.Namespace) -> int:
    from .alignment.reselect import LayerChooser
    from .alignment.selection import described, write_selection
    from .attribution.report import plot_layer_t_map, plot_scores
    from .attribution.scd import plot_scd, write_scd

    stored: list[Stored] = []
    step, weighting, domains = 0, "share", None
    if ":" in arguments.checkpoint and not Path(arguments.checkpoint).exists():
        scores, k = _score_factory(arguments)
    else:
        scores, config, stored, step = _score_checkpoint(arguments)
        k, weighting, a = config.probe.k, config.alignment.weights, config.alignment
        if a.selection_per == "teacher":
            domains = {name: teacher.domains for name, teacher in a.teachers.items()}
    if not 1 <= k <= len(set(scores.layers)):
        raise UserError(f"--k: expected 1 to {len(set(scores.layers))} layers, got {k}")
    depth = max(scores.layers) + 1
    selection = LayerChooser("foga", depth, k, weighting=weighting, domains=domains).choose(None, scores)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    scores.to_csv(out / "foga.csv")
    scores.to_json(out / "foga.json")
    write_selection(selection, out / "selection.json")
    plot_scores(scores, selection).savefig(out / "foga.png", dpi=150)
    written = "foga.csv foga.json selection.json foga.png"
    if scores.t is not None:
        plot_layer_t_map(scores).savefig(out / "foga_map.png", dpi=150)
        written += " foga_map.png"
    found = []
    if scores.branches is None:
        found = write_scd(out, scores, stored, k, step)
        written += " foga_layers.csv" + (" foga_map.csv foga_map.json" if scores.t is not None else "")
    if found:
        plot_scd(found).savefig(out / "scd.png", dpi=150)
        written += " lasp_layers.csv scd.csv scd.json scd.png"
    print(scores.table())
    low = [name for name, above in zip(scores.names, scores.above_floor.tolist()) if not above]
    print(f"a layer without effect would score {scores.noise_floor:.2g}; not above it: {', '.join(low) or 'none'}")
    print(f"selected (0-based): {described(selection)}")
    for entry in found:
        result = entry.result
        print(
            f"{entry.domain}: {result.overlap:.0%} of the {k} most used layers are among the most stored, "
            f"Spearman {result.spearman:.2f} ({result.low:.2f} to {result.high:.2f})"
        )
    print(f"written: {out}/{written}")
    return 0


def _score_factory(arguments: argparse.Namespace) -> tuple[LayerScores, int]:
    """Scores of the model that module:factory makes, and K."""
    from .attribution.runner import attribute_layers

    for name in ("data", "samples", "t", "weights", "device", "lasp", "imports"):
        if getattr(arguments, name):
            raise UserError(f"--{name}: only for a checkpoint; {arguments.checkpoint} brings its own model and inputs")
    module_name, _, name = arguments.checkpoint.partition(":")
    module = import_module(module_name, arguments.checkpoint)
    factory = getattr(module, name, None)
    if factory is None:
        raise UserError(f"{arguments.checkpoint}: the module {module_name} has no {name!r}")
    if not callable(factory):
        raise UserError(f"{arguments.checkpoint}: expected a function, got {type(factory).__name__}")
    with foreign_code(arguments.checkpoint):
        made = factory()
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise UserError(f"{arguments.checkpoint}: expected it to return (model, inputs) or (model, inputs, options)")
    model, inputs, *rest = made
    given = {"metric": arguments.metric, "branches": arguments.branches}
    if rest and not isinstance(rest[0], dict):
        raise UserError(f"{arguments.checkpoint}: expected options as a dict, got {type(rest[0]).__name__}")
    options = {**(rest[0] if rest else {}), **{key: value for key, value in given.items() if value is not None}}
    with foreign_code(arguments.checkpoint):
        scores = attribute_layers(model, inputs, **options)
    return scores, min(3, len(set(scores.layers))) if arguments.k is None else arguments.k


def _score_checkpoint(arguments: argparse.Namespace) -> tuple[LayerScores, RunConfig, list[Stored], int]:
    """Scores of a checkpoint of `agrepa train` on held-out or given clips, its configuration, what its layers store,
    and its step."""
    from .teachers.registry import build_teacher
    from .training.clips import load_held_out
    from .training.config import override_config
    from .training.dissociation import stored_by_layer
    from .training.environment import pick_device
    from .training.inference import load_backbone, score_layers
    from .training.trainer import build_cached

    device = pick_device(arguments.device or "auto")
    backbone, checkpoint = load_backbone(arguments.checkpoint, device, arguments.weights or "model")
    given = {
        "probe.samples": arguments.samples,
        "probe.t_grid": arguments.t,
        "probe.metric": arguments.metric,
        "probe.k": arguments.k,
    }
    config = override_config(checkpoint.config, [f"{key}={value}" for key, value in given.items() if value is not None])
    clips, skipped = load_held_out(
        config, checkpoint.path.parent.parent, checkpoint.state["clips"], arguments.data or ()
    )
    for item in skipped:
        print(f"skipped: {item.path} ({item.source}): {item.reason}", file=sys.stderr)
    if arguments.lasp and arguments.branches:
        raise UserError("--lasp: what a layer stores is asked of whole layers; leave --branches out")
    scores = score_layers(backbone, clips, config, device, branches=arguments.branches)
    stored = []
    if arguments.lasp:
        first = clips.clips[0].path
        # A checkpoint may come from somebody else: what it names is imported only when asked for.
        for module in arguments.imports or ():
            import_module(module, "--imports")
        unimported = set(config.train.imports) - set(arguments.imports or ())
        if unimported and any(not t.cached for t in config.alignment.teachers.values()):
            names = " ".join(config.train.imports)
            raise UserError(
                f"--lasp: the run's teachers are made with its own modules: allow them with --imports {names}"
            )
        teachers = {
            name: build_cached(name, t, config, first) if t.cached else build_teacher(t.source, **t.options).to(device)
            for name, t in config.alignment.teachers.items()
        }
        stored = stored_by_layer(backbone, teachers, clips, config, device)
        if not stored:
            raise UserError("--lasp: no domain has three clips to fit a head on and measure; give more with --data")
    return scores, config, stored, checkpoint.state["step"]


def _sample(arguments: argparse.Namespace) -> int:
    from .data.audio import write_audio
    from .data.mel import LogMel
    from .training.config import override_config
    from .training.environment import pick_device
    from .training.inference import generate, load_backbone, text_batch
    from .training.vocoder import build_vocoder

    device = pick_device(arguments.device)
    backbone, checkpoint = load_backbone(arguments.checkpoint, device)
    given = {
        "flow.points": arguments.points,
        "flow.guidance": arguments.guidance,
        "flow.method": arguments.method,
    }
    config = override_config(checkpoint.config, [f"{key}={value}" for key, value in given.items() if value is not None])
    batch = text_batch(
        config,
        arguments.text,
        arguments.domain,
        arguments.seconds,
        arguments.reference,
        arguments.reference_text,
    )
    mel = generate(backbone, batch.to(device), config, arguments.seed)[0].cpu()
    if not mel.isfinite().all():
        raise UserError(
            f"{arguments.checkpoint}: what it generates is not finite: give a smaller --guidance, or the run diverged"
        )
    vocoder = build_vocoder(config.train.vocoder, LogMel(config.mel))
    shown = int(batch.prompt.sum())
    waveform = vocoder(mel)[shown * config.mel.hop_length :]
    if waveform.numel() == 0 or not waveform.isfinite().all():
        raise UserError(f"{arguments.checkpoint}: the audio is not finite: give a smaller --guidance, or it diverged")
    write_audio(arguments.out, waveform, config.mel.sample_rate)
    print(f"{arguments.out}: {waveform.shape[0] / config.mel.sample_rate:.2f} s at {config.mel.sample_rate} Hz")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .training.environment import doctor

    print(doctor())
    return 0


if __name__ == "__main__":
    sys.exit(main())
