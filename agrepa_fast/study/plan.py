"""The runs of a study: one configuration for each setting, arm, draw and seed, and the warm-ups that they share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..training.config import AlignmentConfig, ProbeConfig, RunConfig, dump_config, load_config, override_config
from .arms import Arm
from .generated import is_evaluated
from .spec import Study

BEGUN = "study.json"  # in a study's folder: what its first call has fixed
FINAL = "final.json"  # in a run's folder: the run is trained, and this is what was measured

# Fields of the alignment that have no effect before the probe.
LATER = (
    "enabled",
    "weight",
    "policy",
    "selection_per",
    "layers",
    "selection",
    "wait",
    "ramp",
    "decay_start",
    "stop",
    "decay",
    "timestep_weight",
)


def broken(file: Path, error: Exception) -> UserError:
    """The mistake of a file in a run's folder that somebody changed."""
    return UserError(f"{file}: not what a run writes ({error!r}); delete its folder to train it again")


@dataclass(frozen=True)
class Warmup:
    """The steps before the first probe, which train without alignment.

    keeps_heads: whether it trains heads too (BiT-C), so that the arms go on with them.
    """

    folder: Path
    config: RunConfig
    step: int
    keeps_heads: bool


@dataclass(frozen=True)
class Run:
    """One training run, by its place in the grid. draw: counts from 0, and is other than 0 only in the arm random.

    Runs of the same configuration, such as the arm none under settings of the alignment, share one folder: it is
    trained once.

    evaluate: options of `agrepa evaluate`, which measures what the run generates; None: it is not measured.
    """

    setting: str
    arm: Arm
    draw: int
    seed: int
    folder: Path
    config: RunConfig
    warmup: Warmup | None
    evaluate: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return str(Path(*self.folder.parts[-3:]))

    @property
    def trained(self) -> bool:
        return (self.folder / FINAL).is_file()

    def measured(self, name: str) -> float:
        """A number that was measured when the run was trained.

        Raises:
            UserError: the file is not what a run writes."""
        file = self.folder / FINAL
        try:
            return float(json.loads(file.read_text(encoding="utf-8"))[name])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise broken(file, error) from None

    @property
    def evaluated(self) -> bool:
        return self.evaluate is not None and is_evaluated(self.folder, self.evaluate)

    @property
    def finished(self) -> bool:
        return self.trained and (self.evaluate is None or self.evaluated)


@dataclass(frozen=True)
class Plan:
    """The runs of a study in the order in which they are trained.

    folder: holds everything that the study writes. config: the base configuration, with the study's changes.
    """

    study: Study
    folder: Path
    config: RunConfig
    runs: tuple[Run, ...]

    @property
    def jobs(self) -> list[Run]:
        """Each run that is trained, once."""
        jobs: dict[Path, Run] = {}
        for run in self.runs:
            jobs.setdefault(run.folder, run)
        return list(jobs.values())

    @property
    def warmups(self) -> list[Warmup]:
        """Each warm-up once."""
        return list({run.warmup.folder: run.warmup for run in self.runs if run.warmup is not None}.values())


def make_plan(study: Study, threads: int = 0) -> Plan:
    """Work out every run's configuration.

    threads: CPU threads of a run, where the configuration leaves it to torch and the study has not begun.

    Raises:
        UserError: a configuration that does not fit; names the file, the setting and the arm.
    """
    try:
        # Nobody listens to the samples of dozens of runs; `train.samples` in `set` brings them back.
        base = load_config(study.base, ["train.samples=0"])
        base = override_config(base, study.changes)
        out = Path(base.train.out)
        folder = out / study.path.stem
        # All runs have the same number of threads, because sums depend on it in the last bits.
        threads = base.train.threads or _threads_before(folder) or threads
        base = _replace(base, "train", name=study.path.stem, threads=threads)
        # Extracted features stay where `agrepa extract` puts them.
        base = _replace(base, "data", features=base.data.features or str(out / "features"))
    except UserError as error:
        raise UserError(f"{study.path}: {error}") from None
    runs: list[Run] = []
    folders: dict[str, Path] = {}  # of each configuration
    for setting in study.settings:
        try:
            here = override_config(base, setting.changes)
        except UserError as error:
            raise UserError(f"{study.path}: settings, {setting.name}: {error}") from None
        for seed in study.seeds:
            seeded = _replace(here, "train", seed=seed)
            for arm in study.arms:
                for draw in range(arm.draws):
                    runs.append(_run(study, folder, setting.name, arm, draw, seeded, folders))
    if study.evaluation is not None:
        measured = {run.folder for run in runs if run.arm.name in study.evaluation.arms}
        options = study.evaluation.options
        runs = [dataclasses.replace(run, evaluate=options) if run.folder in measured else run for run in runs]
    return Plan(study, folder, base, tuple(runs))


def _threads_before(folder: Path) -> int:
    """The number of threads with which a study has begun; 0 if it has not."""
    try:
        return int(json.loads((folder / BEGUN).read_text(encoding="utf-8"))["threads"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def _run(
    study: Study,
    folder: Path,
    setting: str,
    arm: Arm,
    draw: int,
    config: RunConfig,
    folders: dict[str, Path],
) -> Run:
    seed = config.train.seed
    try:
        config = arm.configure(config, draw)
        if config.probe.start >= config.train.steps:
            raise UserError(
                f"probe.start: expected less than train.steps ({config.train.steps}), so that arms differ after the "
                f"warm-up, got {config.probe.start}"
            )
    except UserError as error:
        raise UserError(f"{study.path}: setting {setting}, arm {arm.name}: {error}") from None
    if arm.kind == "none":
        # Settings of the alignment make no difference without it.
        config = dataclasses.replace(config, alignment=_unaligned(config.alignment))
    config = _replace(config, "alignment", wait=True)
    label = f"{arm.name}~{draw + 1}" if arm.draws > 1 else arm.name
    place = folder / "runs" / setting / label / f"seed-{seed}"
    place = folders.setdefault(_digest(config), place)
    config = _replace(config, "train", out=str(place.parent), name=place.name)
    warmup = _warmup(folder, config) if config.probe.start else None
    return Run(setting, arm, draw, seed, place, config, warmup)


def _digest(config: RunConfig) -> str:
    """Of everything but where the run is."""
    config = _replace(config, "train", out="-", name="-")
    return hashlib.sha256(dump_config(config).encode()).hexdigest()


def _unaligned(a: AlignmentConfig) -> AlignmentConfig:
    """The alignment section of training without alignment: without what has no effect then."""
    off = AlignmentConfig(enabled=False)
    if not a.bitc and not any(teacher.cached for teacher in a.teachers.values()):
        return off
    # BiT-C trains with the teachers from the first step on; clips without extracted features are left out.
    later: dict[str, Any] = {name: getattr(off, name) for name in LATER}
    if a.weights != "by-time":  # which changes the form of the heads
        later["weights"] = off.weights
    return dataclasses.replace(a, **later)


def _warmup(folder: Path, config: RunConfig) -> Warmup:
    """The warm-up of a run. Runs that differ only in what comes after the probe have the same one."""
    a = config.alignment
    probe = ProbeConfig(start=config.probe.start, k=1)
    if a.bitc and a.weights == "by-time":
        probe = dataclasses.replace(probe, t_grid=config.probe.t_grid)  # the heads' buffers have its size
    config = dataclasses.replace(config, alignment=_unaligned(a), probe=probe)
    name = f"seed-{config.train.seed}-{_digest(config)[:10]}"
    config = _replace(config, "train", out=str(folder / "warmups"), name=name)
    return Warmup(folder / "warmups" / name, config, probe.start, a.bitc)


def _replace(config: RunConfig, section: str, **fields: object) -> RunConfig:
    """The configuration with fields of one section replaced."""
    changed = dataclasses.replace(getattr(config, section), **fields)
    return dataclasses.replace(config, **{section: changed})


def default_threads(workers: int) -> int:
    """CPU threads of each of so many runs at a time."""
    return max(1, (os.cpu_count() or 1) // max(1, workers))
