"""`agrepa probe`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..imports import foreign_code, import_module
from .options import number, overrides

if TYPE_CHECKING:
    from ..attribution.scd import Stored
    from ..attribution.scores import LayerScores
    from ..training.config import RunConfig

HELP = "Score every layer of a checkpoint (FoG-A) and select the ones to align."
EXAMPLES = """\
examples:
  agrepa probe runs/demo
  agrepa probe runs/demo --data speech/metadata.csv --branches attn ff --out probe
  agrepa probe runs/demo --lasp
  agrepa probe mymodel:factory --k 3     # def factory(): return model, inputs
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        help="a checkpoint, a run's folder for its newest one, or module:factory, a function that returns "
        "(model, inputs) or (model, inputs, options of attribute_layers)",
    )
    parser.add_argument("--data", nargs="+", help="manifests; default: the run's held-out clips")
    parser.add_argument("--out", default="probe", help="folder for foga.csv, foga.json, pictures, selection.json")
    parser.add_argument("--samples", type=int, help="clips to score on")
    parser.add_argument("--t", nargs="+", type=number, metavar="T", help="grid of t in [0, 1]")
    parser.add_argument("--metric", choices=("rms", "squared"), help="distance between velocities (docs/concepts.md)")
    parser.add_argument("--k", type=int, help="layers to select")
    parser.add_argument(
        "--branches",
        nargs="+",
        choices=("attn", "ff"),
        help="switch these branches off, one at a time, instead of whole blocks",
    )
    parser.add_argument(
        "--lasp", action="store_true", help="also measure what each layer stores of the run's teachers (SCD)"
    )
    parser.add_argument("--imports", nargs="+", metavar="MODULE", help="with --lasp: modules that register teachers")
    parser.add_argument(
        "--weights", choices=("model", "ema"), help="which weights of the checkpoint to use (default: model)"
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")


def run(arguments: argparse.Namespace) -> int:
    from ..alignment.reselect import LayerChooser
    from ..alignment.selection import described, write_selection
    from ..attribution.pictures import plot_layer_t_map, plot_scores
    from ..attribution.scd import plot_scd, write_scd

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
    compared = []
    if scores.branches is None:
        compared = write_scd(out, scores, stored, k, step)
        written += " foga_layers.csv" + (" foga_map.csv foga_map.json" if scores.t is not None else "")
    if compared:
        plot_scd(compared).savefig(out / "scd.png", dpi=150)
        written += " lasp_layers.csv scd.csv scd.json scd.png"
    print(scores.table())
    low = [name for name, above in zip(scores.names, scores.above_floor.tolist()) if not above]
    print(f"a layer without effect would score {scores.noise_floor:.2g}; not above it: {', '.join(low) or 'none'}")
    print(f"selected (0-based): {described(selection)}")
    for entry in compared:
        result = entry.result
        print(
            f"{entry.domain}: {result.overlap:.0%} of the {k} most used layers are among the most stored, "
            f"Spearman {result.spearman:.2f} ({result.low:.2f} to {result.high:.2f})"
        )
    print(f"written: {out}/{written}")
    return 0


def _score_factory(arguments: argparse.Namespace) -> tuple[LayerScores, int]:
    """Scores of the model that module:factory makes, and K."""
    from ..attribution.runner import attribute_layers

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
    chosen = {"metric": arguments.metric, "branches": arguments.branches}
    if rest and not isinstance(rest[0], dict):
        raise UserError(f"{arguments.checkpoint}: expected options as a dict, got {type(rest[0]).__name__}")
    options = {**(rest[0] if rest else {}), **{key: value for key, value in chosen.items() if value is not None}}
    with foreign_code(arguments.checkpoint):
        scores = attribute_layers(model, inputs, **options)
    return scores, min(3, len(set(scores.layers))) if arguments.k is None else arguments.k


def _score_checkpoint(arguments: argparse.Namespace) -> tuple[LayerScores, RunConfig, list[Stored], int]:
    """Scores of a checkpoint of `agrepa train` on held-out or given clips, its configuration, what its layers store,
    and its step."""
    from ..training.clips import load_held_out
    from ..training.config import override_config
    from ..training.dissociation import stored_by_layer
    from ..training.environment import pick_device
    from ..training.inference import load_backbone, score_layers
    from ..training.teachers import build_teachers

    device = pick_device(arguments.device, "--device")
    backbone, checkpoint = load_backbone(arguments.checkpoint, device, arguments.weights or "model")
    changes = {
        "probe.samples": arguments.samples,
        "probe.t_grid": arguments.t,
        "probe.metric": arguments.metric,
        "probe.k": arguments.k,
    }
    config = override_config(checkpoint.config, overrides(changes))
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
        # A checkpoint may come from somebody else: what it names is imported only when asked for.
        for module in arguments.imports or ():
            import_module(module, "--imports")
        unimported = set(config.train.imports) - set(arguments.imports or ())
        if unimported and any(not t.cached for t in config.alignment.teachers.values()):
            names = " ".join(config.train.imports)
            raise UserError(
                f"--lasp: the run's teachers are made with its own modules: allow them with --imports {names}"
            )
        teachers, without = build_teachers(config, [clips], device)
        for item in without:
            print(f"skipped: {item.path} ({item.source}): {item.reason}", file=sys.stderr)
        stored = stored_by_layer(backbone, teachers, clips, config, device)
        if not stored:
            raise UserError("--lasp: no domain has three clips to fit a head on and measure; give more with --data")
    return scores, config, stored, checkpoint.state["step"]
