"""The file of a study: what is trained, with which arms, seeds and settings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..errors import UserError
from ..fields import AT_LEAST_ONE, DISTINCT, NOT_EMPTY, Plain, between, convert, more_than, shown, unknown
from ..training.config import RUN_PRESETS
from ..training.config.parse import parse, read_text
from .arms import Arm, Changes, check_name, overlapping, read_arms, read_changes

KEYS = ("base", "set", "seeds", "arms", "settings", "comparisons", "evaluate", "targets", "bootstrap")
# What the study sets for every run.
RESERVED = ("train.seed", "train.name", "alignment.wait")
# What the built-in arms set; elsewhere it would be without effect.
OF_ARMS = (
    "alignment.enabled",
    "alignment.policy",
    "alignment.selection_per",
    "alignment.layers",
    "alignment.selection",
    "probe.every",
)
ONE_SETTING = "base"  # the name of the only setting of a study without `settings`
SEEDS = Annotated[tuple[Annotated[int, between(0, 2**32 - 1)], ...], AT_LEAST_ONE, DISTINCT]
TARGETS = Annotated[tuple[Annotated[float, more_than(0, 1e9)], ...], DISTINCT]
MOST_SETTINGS = 1000


@dataclass(frozen=True)
class Setting:
    """A point of the grid: changes to the base configuration under which every arm is trained."""

    name: str
    changes: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """What `agrepa evaluate` measures at the end of each run of some arms. options: words of its command line."""

    arms: tuple[str, ...]
    options: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A study file.

    Attributes:
        path: of the file. base: a preset or a configuration file. changes: `set`, and the command line's changes.
        comparisons: (arm, the arm that it is compared with), reported before everything else.
        evaluation: of generated audio; None: there is none.
        targets: losses whose step is reported; empty: the last validation loss of the arm none, for each seed.
        bootstrap: resamples of an interval.
    """

    path: Path
    base: str
    changes: tuple[str | tuple[str, Any], ...]
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    settings: tuple[Setting, ...]
    comparisons: tuple[tuple[str, str], ...]
    evaluation: Evaluation | None
    targets: tuple[float, ...]
    bootstrap: int


def read_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file; `overrides` (section.field=value) change its base configuration.

    Raises:
        UserError: no such file, an unknown key or name, or a value that does not fit; names the file and the key.
    """
    path = Path(path)
    try:
        content = parse(read_text(path), str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a study file (docs/study.md)") from None
    try:
        return _study(path, content, overrides)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _study(path: Path, content: Any, overrides: Sequence[str]) -> Study:
    if not isinstance(content, Mapping):
        raise UserError(f"expected {', '.join(KEYS)}, got {shown(content)}")
    for key in content:
        if key not in KEYS:
            raise UserError(f"{unknown(key, KEYS)}")
    for key in ("base", "seeds", "arms"):
        if key not in content:
            raise UserError(f"{key}: is missing")
    base = convert(content["base"], Annotated[str, NOT_EMPTY], "base")
    if base not in RUN_PRESETS and (path.parent / base).is_file():
        base = str(path.parent / base)
    changes = read_changes(content.get("set", {}), "set")
    arms = read_arms(content["arms"])
    settings = _settings(content.get("settings"))
    _check_keys(changes, overrides, arms, settings)
    return Study(
        path,
        base,
        (*changes, *overrides),
        convert(content["seeds"], SEEDS, "seeds"),
        arms,
        settings,
        _comparisons(content.get("comparisons", []), arms),
        _evaluation(content["evaluate"], arms) if content.get("evaluate") is not None else None,
        convert(content.get("targets", ()), TARGETS, "targets"),
        convert(content.get("bootstrap", 2000), Annotated[int, between(100, 1_000_000)], "bootstrap"),
    )


def _settings(value: Any) -> tuple[Setting, ...]:
    """The settings: every combination of {field: [values]}, or a list of `NAME: {field: value}`."""
    if value is None or value == []:
        return (Setting(ONE_SETTING),)
    if isinstance(value, list):
        settings = []
        for item in value:
            if not isinstance(item, Mapping) or len(item) != 1:
                raise UserError(f"settings: expected `NAME: {{section.field: value}}`, got {shown(item)}")
            [(name, fields)] = item.items()
            check_name("settings", name)
            settings.append(Setting(str(name), tuple(read_changes(fields, f"settings.{name}"))))
    else:
        axes = []
        for key, values in read_changes(value, "settings"):
            if not isinstance(values, list) or not values:
                raise UserError(f"settings.{key}: expected a list of values, got {shown(values)}")
            axes.append([(key, item) for item in values])
        combinations = list(itertools.islice(itertools.product(*axes), MOST_SETTINGS + 1))
        settings = [Setting(",".join(_label(key, item) for key, item in point), point) for point in combinations]
    if len(settings) > MOST_SETTINGS:
        raise UserError(f"settings: more than {MOST_SETTINGS:,} combinations")
    names = [setting.name for setting in settings]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"settings: {twice[0]} occurs twice; keep one, or name the settings: `- NAME: {{...}}`")
    return tuple(settings)


def _comparisons(value: Any, arms: Sequence[Arm]) -> tuple[tuple[str, str], ...]:
    pairs = convert(value, Annotated[tuple[tuple[str, str], ...], DISTINCT], "comparisons")
    for number, (arm, other) in enumerate(pairs):
        _check_arms((arm, other), arms, f"comparisons.{number}")
        if arm == other:
            raise UserError(f"comparisons.{number}: expected two different arms, got {arm!r} twice")
    return pairs


def _evaluation(value: Any, arms: Sequence[Arm]) -> Evaluation:
    """{arms: [...], OPTION: value}: options of `agrepa evaluate` without their dashes; all arms where none is named."""
    if not isinstance(value, Mapping):
        raise UserError(f"evaluate: expected options of agrepa evaluate, such as `clips: 100`, got {shown(value)}")
    chosen, words = tuple(arm.name for arm in arms), []
    for name, item in value.items():
        where = f"evaluate.{name}"
        if name == "arms":
            chosen = convert(item, Annotated[tuple[str, ...], AT_LEAST_ONE, DISTINCT], where)
            _check_arms(chosen, arms, where)
            continue
        if not re.fullmatch(r"[a-z][a-z-]*", str(name)):
            raise UserError(f"{where}: expected an option of agrepa evaluate without its dashes, such as `clips: 100`")
        if name == "out":
            raise UserError(f"{where}: the study sets it itself; leave it out")
        items = item if isinstance(item, list) else [item]
        if not items or not all(isinstance(each, str | int | float) for each in items):
            raise UserError(f"{where}: expected a value, or a list of values, got {shown(item)}")
        words += [f"--{name}", *map(str, items)]
    return Evaluation(chosen, tuple(words))


def _check_arms(names: Sequence[str], arms: Sequence[Arm], where: str) -> None:
    known = [arm.name for arm in arms]
    for name in names:
        if name not in known:
            raise UserError(f"{where}: {unknown(name, known)}")


def _label(key: str, value: Any) -> str:
    """A short name of a value of a field, which can be part of a folder's name: pool=null."""
    text = str(value) or "null" if isinstance(value, Plain | str) else shown(value)
    return f"{key.rpartition('.')[2]}={re.sub(r'[^A-Za-z0-9.+-]+', '-', text).strip('-')[:40]}"


def _check_keys(changes: Changes, overrides: Sequence[str], arms: Sequence[Arm], settings: Sequence[Setting]) -> None:
    """Refuse changes of what the study or its arms set themselves, and of one field in two places."""
    typed = [(override.partition("=")[0], None) for override in overrides]
    varied = {key: setting.name for setting in settings for key, _ in setting.changes}
    places = [("set", changes), ("command line", typed)]
    places += [(f"settings, {setting.name}", list(setting.changes)) for setting in settings]
    for where, listed in places:
        for key, _ in listed:
            if overlapping(key, RESERVED):
                raise UserError(f"{where}: {key}: the study sets it itself; leave it out")
            if overlapping(key, OF_ARMS):
                raise UserError(f"{where}: {key}: the arms set it; describe an arm instead: `- NAME: {{set: ...}}`")
            if not where.startswith("settings") and overlapping(key, list(varied)):
                raise UserError(f"{where}: {key}: the settings vary it; keep it in one place")
            if where.startswith("settings") and key == "train.out":
                raise UserError(f"{where}: {key}: one folder holds the whole study; set it in `set`")
    for arm in arms:
        for key, _ in arm.changes:
            if overlapping(key, (*RESERVED, "train.out")):
                raise UserError(f"arms.{arm.name}.set.{key}: the study sets it itself; leave it out")
            if overlapping(key, list(varied)):
                raise UserError(f"arms.{arm.name}.set.{key}: the settings vary it; keep it in one place")
