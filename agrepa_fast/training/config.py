"""A run's configuration: dataclasses, from a preset or a YAML file, then `section.field=value` changes.

Unknown keys and values of the wrong type are `UserError`s that name the key and the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.mel import MEL_PRESETS, MelConfig
from ..errors import UserError
from ..models.dit import PRESETS, DiTConfig
from . import rules


@dataclass(frozen=True)
class DataConfig:
    """Where clips come from and how they are batched."""

    train: tuple[str, ...] = ("builtin",)  # manifests or folders (docs/data.md); "builtin" = the built-in corpus
    valid: tuple[str, ...] = ()  # empty: `valid_share` of the training clips is held out
    valid_share: float = 0.1  # of each domain
    max_seconds: float = 10.0  # longer clips are cropped at random
    buckets: int = 4  # batch lengths, evenly spaced up to max_seconds
    frames_per_batch: int = 4096
    prompt_share: tuple[float, float] = (0.0, 0.5)  # reference mel, as a share of the crop
    balance_domains: bool = True
    vocabularies: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"text": (256,)})
    vocabulary_of: dict[str, str] = field(default_factory=dict)  # domain: vocabulary; "text" where not given
    unreadable_share: float = 0.05  # more unreadable files than this stop the run
    allow_outside: bool = False  # may a manifest name files outside its folder
    workers: int = 0  # processes that read ahead


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network (see DiTConfig); its mel bins come from `mel`."""

    depth: int = 12
    width: int = 384
    heads: int = 6
    ff_ratio: int = 4
    dropout: float = 0.1
    token_width: int = 256  # channels of the token embedding
    attention: str = "sdpa"  # or "xformers": valid frames alone, packed; for train.engine eager


@dataclass(frozen=True)
class FlowConfig:
    """Condition dropout while training, and how samples are drawn."""

    token_dropout: float = 0.1
    prompt_dropout: float = 0.1
    points: int = 32  # grid points of the sampler
    guidance: float = 3.0
    method: str = "euler"  # or "midpoint"
    sway: float = -1.0


@dataclass(frozen=True)
class ProbeConfig:
    """FoG-A: when the layers are scored, and on what."""

    start: int = 5000  # steps of warm-up before the probe that decides the selection
    samples: int = 16  # held-out clips
    t_grid: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    metric: str = "rms"  # or "squared"
    k: int = 3  # layers to align
    every: int = 0  # steps between later probes, which choose again; 0: one probe
    momentum: float = 0.5  # of the scores' moving average over probes
    margin: float = 0.1  # a layer takes another's place when its score is higher by more than this share


@dataclass(frozen=True)
class TeacherConfig:
    """One teacher: its source, and the domains it speaks for."""

    source: str = "spectral"  # a registered name, a transformers model by folder or name
    domains: tuple[str, ...] = ()  # empty: all
    options: dict[str, str | int] = field(default_factory=dict)  # e.g. {layer: 12}
    cached: bool = False  # read features from files beside the audio; the teacher itself is not loaded


@dataclass(frozen=True)
class AlignmentConfig:
    """The alignment loss (AG-REPA)."""

    enabled: bool = True
    teachers: dict[str, TeacherConfig] = field(default_factory=lambda: {"spectral": TeacherConfig()})
    weight: float = 0.5
    pool: str | None = "mean"  # "mean": one vector a clip; null: frame by frame
    head: str = "mlp"  # or "repa", "linear", "low-rank", and frame by frame "conv"
    objective: str = "cosine"  # or "relation" (matrices of cosines between frames), "cka"
    standardise_targets: bool = False  # z-score each channel over the clip's frames (iREPA); with pool: null
    mask: str = "valid"  # frames to align: "valid", or "span" (not the ones shown as reference)
    # Who chooses probe.k layers at the probe: "foga", "foga-soft", or a control: "even", "random", "deepest",
    # "shallowest", "stored" (LASP), "gradient-norm", "first-order".
    policy: str = "foga"
    layers: tuple[int, ...] = ()  # these layers, weighted alike, in place of the probe's choice
    selection: str = ""  # or a selection.json
    ramp: int = 100  # steps from nothing to full weight, after the probe
    decay_start: float = 0.6  # as shares of all steps: where the weight starts to fall,
    stop: float = 0.9  # and where it has reached zero
    decay: str = "cosine"  # or "linear"
    stop_similarity: float | None = None  # off for good once the running mean of the raw cosine is there
    timestep_weight: str = "uniform"  # weight of a sample by its t: or "data", "noise", "middle"
    bitc: bool = False  # BiT-C: align the pooled token embedding too
    bitc_weights: dict[str, float] = field(default_factory=lambda: {"speech": 0.5, "audio": 1.0})


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, one-cycle and clipping, as published."""

    lr: float = 1e-4
    initial_lr: float = 1e-5
    final_lr: float = 1e-7
    warmup_share: float = 0.1
    weight_decay: float = 0.1  # on matrices; not on biases, norms and embeddings
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    ema_decay: float = 0.9999


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run and what it writes."""

    steps: int = 500_000
    seed: int = 0
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    precision: str = "auto"  # "auto" (bf16 on CUDA), "fp32" or "bf16"
    engine: str = "auto"  # "eager", "compile", "graph" (CUDA graphs); "auto": what the device allows
    accumulate: int = 1  # batches a step, their gradients averaged
    recompute: bool = False  # activation checkpointing: less memory, a third more work
    max_skipped: int = 20  # steps in a row with gradients that are not finite, before the run stops
    diagnose_every: int = 0  # steps between measurements of the two losses' gradient cosine; 0: never
    threads: int = 0  # CPU threads; 0: torch's choice
    out: str = "runs"
    name: str = ""  # folder of the run inside `out`; empty: the preset's or file's name
    log_every: int = 50
    valid_every: int = 2000
    valid_samples: int = 64
    checkpoint_every: int = 5000
    keep: int = 3  # checkpoints
    sample_every: int = 0  # steps between samples; 0: only at the end
    samples: int = 4
    vocoder: str = "auto"  # "griffin-lim", a Vocos folder or name, or "auto" (Vocos when installed and fitting)
    tensorboard: bool = False
    wandb: str = ""  # a Weights & Biases project


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs; saved beside it as config.yaml."""

    data: DataConfig = field(default_factory=DataConfig)
    mel: MelConfig = field(default_factory=MelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def max_frames(self) -> int:
        """Longest crop in mel frames."""
        return max(1, int(self.data.max_seconds * self.mel.frame_rate))

    @property
    def bucket_frames(self) -> tuple[int, ...]:
        """The batch lengths in frames, ascending."""
        n = self.data.buckets
        return tuple(sorted({-(-self.max_frames * (i + 1) // n) for i in range(n)}))

    @property
    def dit(self) -> DiTConfig:
        """Sizes of the network."""
        m = self.model
        return DiTConfig(
            depth=m.depth,
            width=m.width,
            heads=m.heads,
            mels=self.mel.mels,
            cond=m.token_width + self.mel.mels,
            ff_ratio=m.ff_ratio,
            dropout=m.dropout,
            max_frames=max(self.max_frames, 1024),
        )


def _run_preset(name: str, **sections: Any) -> RunConfig:
    dit = PRESETS[name]
    mel = sections.pop("mel", MelConfig())
    model = ModelConfig(dit.depth, dit.width, dit.heads, dit.ff_ratio, dit.dropout, dit.cond - mel.mels)
    return RunConfig(mel=mel, model=model, **sections)


RUN_PRESETS: dict[str, RunConfig] = {
    "demo": _run_preset(
        "demo",
        mel=MEL_PRESETS["compact-16khz"],
        data=DataConfig(max_seconds=2.0, frames_per_batch=768),
        probe=ProbeConfig(start=250, samples=12, k=3),
        alignment=AlignmentConfig(ramp=50),
        optimizer=OptimizerConfig(lr=2e-3, initial_lr=2e-4, final_lr=1e-5, weight_decay=0.01, ema_decay=0.99),
        train=TrainConfig(steps=900, log_every=10, valid_every=100, valid_samples=24, checkpoint_every=300, keep=2),
        flow=FlowConfig(guidance=2.0),
    ),
    "small": _run_preset(
        "small",
        optimizer=OptimizerConfig(lr=5e-4, initial_lr=5e-5, ema_decay=0.999),
        train=TrainConfig(steps=50_000),
        probe=ProbeConfig(start=2000),
    ),
    "base": _run_preset(
        "base",
        data=DataConfig(frames_per_batch=16_384, workers=8),
        optimizer=OptimizerConfig(lr=2e-4, initial_lr=2e-5),
        train=TrainConfig(steps=200_000),
    ),
    "paper": _run_preset("paper", data=DataConfig(frames_per_batch=16_384, workers=8)),
}


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A preset's name or a YAML file, changed by `section.field=value` (values are YAML).

    A YAML file may say `preset: NAME` to start from a preset; what it does not name keeps its default.

    Raises:
        UserError: an unknown preset, file, section or field, or a value of the wrong type, by name.
    """
    if str(source) in RUN_PRESETS:
        config = RUN_PRESETS[str(source)]
        name = str(source)
    else:
        content = _read_yaml(Path(source))
        preset = content.pop("preset", None)
        if preset is not None and preset not in RUN_PRESETS:
            raise UserError(f"{source}: preset: {_unknown(str(preset), RUN_PRESETS)}")
        try:
            config = _merge(RUN_PRESETS[preset] if preset else RunConfig(), content, "")
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        name = Path(source).stem
    if not config.train.name:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, name=name))
    return override_config(config, overrides)


def override_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`section.field=value` changes, then the checks that one field cannot make for itself.

    Raises:
        UserError: an unknown section or field, or a value that does not fit, by name.
    """
    for override in overrides:
        config = _override(config, override)
    rules.check(config)
    return config


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML; `load_config` reads it back."""
    return _yaml().safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise UserError("PyYAML is not installed: pip install 'agrepa-fast[train]'") from error
    return yaml


def _read_yaml(path: Path) -> dict[str, Any]:
    yaml = _yaml()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        if path.suffix in (".yaml", ".yml"):
            raise UserError(f"{path}: {error.strerror}") from None
        raise UserError(f"{_unknown(str(path), RUN_PRESETS)} (presets), or give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected sections like `train:`, got {type(content).__name__}")
    return content


def _override(config: RunConfig, override: str) -> RunConfig:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"{override!r}: expected section.field=value")
    yaml = _yaml()
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{key}: {text!r} is not a YAML value") from None
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return _merge(config, nested, "")


def _merge(current: Any, changes: Mapping[str, Any], where: str) -> Any:
    """A dataclass with some fields replaced; `where` leads the messages."""
    if not isinstance(changes, Mapping):
        raise UserError(f"{where or 'configuration'}: expected fields of {type(current).__name__}, got {changes!r}")
    hints = typing.get_type_hints(type(current))
    values = {}
    for key, value in changes.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise UserError(f"{path}: {_unknown(str(key), hints)}")
        values[key] = _convert(getattr(current, key), hints[key], value, path)
    try:
        return dataclasses.replace(current, **values)
    except ValueError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def _convert(current: Any, hint: Any, value: Any, path: str) -> Any:
    """`value` as the field's type. A dataclass keeps the fields that are not named; a dict is replaced."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        for option in args:
            if option is not type(None):
                try:
                    return _convert(current, option, value, path)
                except UserError:
                    continue
    elif dataclasses.is_dataclass(hint):
        return _merge(hint() if current is None else current, value, path)  # type: ignore[operator]
    elif origin is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
        if len(items) != len(kinds):
            raise UserError(f"{path}: expected {len(kinds)} values, got {value!r}")
        return tuple(_convert(None, kind, item, path) for kind, item in zip(kinds, items))
    elif origin is dict and isinstance(value, Mapping):
        return {
            str(key): _convert((current or {}).get(key), args[1], item, f"{path}.{key}") for key, item in value.items()
        }
    elif hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            pass
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    expected = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise UserError(f"{path}: expected {expected}, got {value!r}")


def _unknown(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
    return f"unknown name {name!r}; {guess}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
