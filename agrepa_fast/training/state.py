"""The training state in state.pt: taken from a trainer, checked when it is read, and given back.

A file is checked in full before anything uses it. So a checkpoint of another version, or one that was edited, is
refused in one line that names the key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import __version__
from ..alignment.reselect import ALL
from ..alignment.selection import described, selection_from_state, selection_state
from ..attribution.scores import METRICS, LayerScores
from ..errors import UserError
from ..fields import shown
from .distributed import gather, rank, world_size
from .sharding import gathered, scattered

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .config import RunConfig
    from .trainer import Trainer

# The number of the checkpoint format; raise it for a change that an older version cannot read.
# 2: heads.safetensors and the scores' averages have an entry for each teacher.
FORMAT = 2
READABLE = (1, 2)
MOMENTS = ("exp_avg", "exp_avg_sq")


def check_format(header: Mapping[str, Any], file: Path) -> None:
    """Refuse a checkpoint of another format.

    Raises:
        UserError: names both formats and versions.
    """
    if type(header.get("format")) is not int or header["format"] not in READABLE:
        by = (
            f"agrepa-fast {header['version'][:20]}"
            if isinstance(header.get("version"), str)
            else "an older agrepa-fast"
        )
        number = f"format {header['format']!r}"[:30] if "format" in header else "a format without a number"
        raise UserError(
            f"{file}: made by {by} in {number}, this is {__version__} and reads the checkpoint formats "
            f"{', '.join(map(str, READABLE))}: use the version that made it, or train anew"
        )


def capture(trainer: Trainer) -> dict[str, Any]:
    """The state of a run after a step, with the random state of all ranks. Every rank must call it."""
    device, choice = trainer.device, trainer.aligner.choice.state_dict()
    rng = gather((torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None))
    return {
        "format": FORMAT,
        "version": __version__,
        "step": trainer.step,
        "steps": trainer.config.train.steps,
        "optimizer": gathered(trainer.optimizer.state_dict()),
        "skipped": trainer.train_step.skipped.tolist(),
        "seconds": trainer.seconds(),
        "probe_seconds": trainer.probe_seconds,
        "log_bytes": trainer.log.position,
        "device": device.type,
        "generator": trainer.objective.generator.get_state(),
        "rng": [list(states) for states in rng],
        "selection": choice["selection"],
        "scores": choice["scores"],
        "average": choice["averages"],
        "probed": choice["probed"],
        "clips": trainer.data.split.record,
    }


TRAINED = ("alignment.pool", "alignment.head", "alignment.objective", "alignment.standardise_targets")
CHOSEN = ("alignment.policy", "alignment.weights", "alignment.selection_per", "probe.k")


def check_alignment(checkpoint: Checkpoint, config: RunConfig, given: bool) -> None:
    """Refuse to go on with heads that were trained otherwise, or with layers that were chosen otherwise.

    Before the layers are chosen all of it may change. given: the configuration names the layers from now on.

    Raises:
        UserError: names the field and both values.
    """
    if checkpoint.state["selection"] is None or not checkpoint.weights["heads"]:
        return
    for name in (*TRAINED, *(() if given else CHOSEN)):
        section, _, field = name.partition(".")
        before, now = (getattr(getattr(part, section), field) for part in (checkpoint.config, config))
        if before != now:
            raise UserError(
                f"{name}: the run has aligned with {shown(before)} by {checkpoint.path.name}, and goes on with it; "
                f"got {shown(now)}: train anew, or resume from a checkpoint before the first probe"
            )


def apply(trainer: Trainer, state: Mapping[str, Any], file: Path, fresh: Sequence[str] = ()) -> list[str]:
    """Give a trainer a state that has passed `check_state`.

    fresh: the parts of `Objective.heads` that begin here, so that the state knows nothing of them.

    Returns:
        What the run does otherwise than the state, a line each.

    Raises:
        UserError: it does not fit the trainer's configuration; names the key.
    """
    if state["steps"] != trainer.config.train.steps:
        raise UserError(
            f"train.steps: {file} belongs to a run of {state['steps']} steps, "
            f"its learning rate schedule does not fit {trainer.config.train.steps}"
        )
    depth = trainer.config.model.depth
    if state["scores"] is not None:
        layers = LayerScores.from_state(state["scores"]).layers
        if layers != tuple(range(depth)):
            raise UserError(f"{file}: scores are of the layers {list(layers)}, the model has {depth}")
    _apply_optimizer(trainer, state["optimizer"], file, fresh)
    trainer.train_step.skipped.copy_(torch.tensor(state["skipped"]))
    trainer.step = state["step"]
    trainer.seconds_before = state["seconds"]
    trainer.probe_seconds = state["probe_seconds"]
    average = state["average"]
    if not isinstance(average, dict):  # format 1: one vector for the run, or None
        average = {} if average is None else {ALL: [average]}
    try:
        choice, notes = trainer.aligner.choice, []
        configured = choice.selection if choice.given else None
        choice.load_state_dict({**state, "averages": average})
        if configured is not None and state["selection"] not in (None, selection_state(configured)):
            notes.append(f"the configuration's layers, {described(configured)}, replace the checkpoint's")
        selection = configured or choice.selection
        if selection is not None:
            trainer.select(selection)
    except ValueError as error:
        raise UserError(f"{file}: {error}; go on with the run's own configuration of alignment and probe") from error
    if state["device"] != trainer.device.type:
        # Generators of different devices draw different numbers, so the run goes on, but not exactly.
        trainer.objective.generator.manual_seed(trainer.config.train.seed + trainer.step)
        return notes
    try:
        trainer.objective.generator.set_state(state["generator"])
        if len(state["rng"]) == world_size():
            own_cpu, own_cuda = state["rng"][rank()]
            torch.set_rng_state(own_cpu)
            if trainer.device.type == "cuda":
                torch.cuda.set_rng_state(own_cuda, trainer.device)
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file}: generator or rng is no random state of this torch ({reason})") from error
    return notes


def _apply_optimizer(trainer: Trainer, saved: Mapping[str, Any], file: Path, fresh: Sequence[str]) -> None:
    optimizer = trainer.optimizer
    groups = optimizer.state_dict()["param_groups"]
    # Parts that begin here are the last of their group, so that the numbers of the others are those of the state.
    trained = [p for name, part in trainer.objective.heads().items() if name not in fresh for p in part.parameters()]
    expected = [group["params"][: len(trained)] if group["name"] == "heads" else group["params"] for group in groups]
    listed = [group.get("params") for group in saved["param_groups"]]
    if not trained:  # the heads of a warm-up may be those of other teachers
        expected, listed = expected[:-1], listed[:-1]
    if listed != expected:
        raise UserError(f"{file}: the optimizer has other groups of parameters than this configuration")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entry in saved["state"].items():
        if number >= len(parameters):
            raise UserError(f"{file}: optimizer.state.{number}: there are {len(parameters)} parameters")
        for name in MOMENTS:
            expected = parameters[number]
            if entry[name].shape != expected.shape or entry[name].dtype != expected.dtype:
                raise UserError(
                    f"{file}: optimizer.state.{number}.{name} is {entry[name].dtype} {list(entry[name].shape)}, "
                    f"its parameter {expected.dtype} {list(expected.shape)}"
                )
    entries = {
        number: entry | {name: scattered(entry[name], parameters[number]) for name in MOMENTS}
        for number, entry in saved["state"].items()
    }
    # Keep this run's groups: their settings depend on the device and on the configuration.
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


# --- checks of what was read --------------------------------------------------------------------------------


def check_state(state: Any, file: Path) -> None:
    """Check a state that was read against what `capture` writes.

    Raises:
        UserError: another format; or a key that is missing, unknown or of another kind, by name.
    """
    if not isinstance(state, dict):
        raise UserError(f"{file}: not a training state but {type(state).__name__}")
    check_format(state, file)
    made = f"checkpoint format {FORMAT}, made by agrepa-fast {str(state.get('version'))[:20]}"
    for key, (fits, expected) in _KEYS.items():
        if key not in state:
            raise UserError(f"{file}: the key {key!r} is missing ({made}); take another checkpoint")
        if not fits(state[key]):
            raise UserError(f"{file}: {key}: expected {expected} ({made}); take another checkpoint")
    unknown = [key for key in state if key not in _KEYS]
    if unknown:
        raise UserError(f"{file}: the key {str(unknown[0])[:40]!r} is unknown ({made}); take another checkpoint")
    if max(state["step"], state["probed"]) > state["steps"]:
        raise UserError(f"{file}: step and probed: expected at most steps ({state['steps']})")


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value < 2**63


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value >= 0


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_number, value))


def _tensor(value: Any, dtype: torch.dtype, *shape: int | None) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype == dtype
        and value.layout == torch.strided
        and value.dim() == len(shape)
        and all(size is None or size == actual for size, actual in zip(shape, value.shape))
    )


def _random(value: Any) -> bool:
    return _tensor(value, torch.uint8, None)


def _rng(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(states, list)
            and len(states) == 2
            and _random(states[0])
            and (states[1] is None or _random(states[1]))
            for states in value
        )
    )


def _optimizer(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"state", "param_groups"}:
        return False
    state, groups = value["state"], value["param_groups"]
    return (
        isinstance(groups, list)
        and all(isinstance(group, dict) for group in groups)
        and isinstance(state, dict)
        and all(_whole(0)(number) and _moments(entry) for number, entry in state.items())
    )


def _moments(entry: Any) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"step", *MOMENTS}:
        return False
    step = entry["step"]
    counted = _tensor(step, torch.float32) and bool(step.isfinite()) and bool(step >= 0)
    return counted and all(isinstance(entry[name], Tensor) and entry[name].layout == torch.strided for name in MOMENTS)


def _selection(value: Any) -> bool:
    return value is None or _same(value, lambda: selection_state(selection_from_state(value)))


def _average(value: Any) -> bool:
    if isinstance(value, dict):
        rows = [row for own in value.values() for row in (own if isinstance(own, list) else [None])]
        return all(isinstance(name, str) for name in value) and all(map(_numbers, rows))
    return value is None or _numbers(value)


def _scores(value: Any) -> bool:
    if value is None:
        return True
    return (
        _same(value, lambda: LayerScores.from_state(value).state())
        and value["metric"] in METRICS
        and all(map(_numbers, value["by_sample"]))
    )


def _same(value: Any, again: Callable[[], Any]) -> bool:
    """Whether `value`, read and written again, is the same, so that nothing in it was ignored or changed."""
    try:
        return json.dumps(value, sort_keys=True) == json.dumps(again(), sort_keys=True)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError, RecursionError):
        return False


def _clips(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"train", "valid"}:
        return False
    return all(_tensor(part, torch.int64, None, 3) and len(part) > 0 for part in value.values())


_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (_whole(0), "a whole number"),
    "version": (lambda value: isinstance(value, str), "a string"),
    "step": (_whole(0), "a whole number from 0 on"),
    "steps": (_whole(1), "a whole number from 1 on"),
    "optimizer": (_optimizer, "the state of AdamW: step, exp_avg and exp_avg_sq of each parameter"),
    "skipped": (lambda value: _numbers(value) and len(value) == 3 and min(value) >= 0, "three numbers from 0 on"),
    "seconds": (_positive, "a number from 0 on"),
    "probe_seconds": (_positive, "a number from 0 on"),
    "log_bytes": (_whole(0), "a whole number from 0 on"),
    "device": (lambda value: value in ("cpu", "cuda"), "cpu or cuda"),
    "generator": (_random, "a vector of bytes"),
    "rng": (_rng, "a pair of vectors of bytes for each rank"),
    "selection": (_selection, "null, or layers with weights that sum to 1"),
    "scores": (_scores, "null, or what LayerScores.state gives, with finite scores"),
    "average": (_average, "{teacher: a list of finite numbers at each time}; in format 1 null or finite numbers"),
    "probed": (_whole(-1), "a whole number from -1 on"),
    "clips": (_clips, "int64 tensors [n, 3] named train and valid"),
}
