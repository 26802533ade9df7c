"""The arms of a study: ways to choose the layers to align, each as changes to a configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from ..alignment.policy import choose_layers
from ..errors import UserError
from ..fields import DISTINCT, Allowed, between, convert, shown, unknown
from ..training.config import RunConfig, override_config

Changes = list[tuple[str, Any]]  # ("section.field", value)

# The fields that each built-in arm sets. "random" and "foga-reselected" set more, which depends on the run.
BUILT_IN: dict[str, dict[str, Any]] = {
    "none": {"alignment.enabled": False},
    "shallowest": {"alignment.policy": "shallowest"},
    "deepest": {"alignment.policy": "deepest"},
    "even": {"alignment.policy": "even"},
    "random": {"alignment.layers": ()},
    "most-stored": {"alignment.policy": "stored"},
    "gradient-norm": {"alignment.policy": "gradient-norm"},
    "first-order": {"alignment.policy": "first-order"},
    "foga": {"alignment.policy": "foga"},
    "foga-per-teacher": {"alignment.policy": "foga", "alignment.selection_per": "teacher"},
    "foga-soft": {"alignment.policy": "foga-soft"},
    "foga-by-time": {"alignment.policy": "foga", "alignment.weights": "by-time"},
    "foga-reselected": {"alignment.policy": "foga"},
}
# Every built-in arm begins from these, so that arms differ in nothing else, whatever the base configuration says.
SAME: dict[str, Any] = {
    "alignment.enabled": True,
    "alignment.policy": "foga",
    "alignment.selection_per": "run",
    "alignment.weights": "share",
    "alignment.layers": (),
    "alignment.selection": "",
    "probe.every": 0,
}
NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)
DRAWS = 3  # sets of layers of the arm "random", unless the study says otherwise
RESELECTIONS = 5  # probes after the first one in the arm "foga-reselected"
ARM_KEYS = ("arm", "layers", "draws", "set")
LAYERS = Annotated[
    tuple[Annotated[int, between(0, 511)], ...],
    Allowed("at least one layer", lambda layers: len(layers) > 0),
    DISTINCT,
]


@dataclass(frozen=True)
class Arm:
    """One way to choose layers.

    Attributes:
        name: in the study. kind: the built-in arm it is, "fixed" (`layers`), or "" (the base configuration's way).
        draws: how many runs for each seed; more than 1 only for "random".
        changes: the arm's own changes to the configuration.
    """

    name: str
    kind: str = ""
    layers: tuple[int, ...] = ()
    draws: int = 1
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def sets(self) -> frozenset[str]:
        """The fields that the arm is made of, which nothing else in the study may set."""
        return frozenset({"alignment.layers"} if self.kind == "fixed" else BUILT_IN.get(self.kind, {}))

    def configure(self, config: RunConfig, draw: int) -> RunConfig:
        """The configuration of one of the arm's runs: `draw` counts from 0.

        Raises:
            UserError: the arm does not fit the configuration.
        """
        if not self.kind:
            return override_config(config, self.changes)
        own = dict(BUILT_IN.get(self.kind, {}))
        if self.kind == "fixed":
            own["alignment.layers"] = self.layers
        elif self.kind == "random":
            # Other layers for every draw and seed.
            seed = config.train.seed * 1_000_003 + draw
            # The target of a network that is its own teacher comes after the layers that are aligned.
            teachers = override_config(config, self.changes).alignment.teachers.values()
            depth = min((t.target_layer for t in teachers if t.target_layer is not None), default=config.model.depth)
            own["alignment.layers"] = choose_layers("random", depth, config.probe.k, seed=seed).layers
        changes: Changes = [*(SAME | own).items(), *self.changes]
        if self.kind == "foga-reselected" and "probe.every" not in dict(self.changes):
            # How often depends on where alignment begins and ends, which the changes may set.
            changed = override_config(config, changes)
            stop = math.ceil(changed.alignment.stop * changed.train.steps)
            changes.append(("probe.every", max(1, (stop - changed.probe.start) // (RESELECTIONS + 1))))
        return override_config(config, changes)


def read_arms(value: Any) -> tuple[Arm, ...]:
    """The arms of a study file: a list of built-in names, and of `NAME: {arm, layers, draws, set}`.

    Raises:
        UserError: an unknown name or key, a name that occurs twice, a value that does not fit.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"arms: expected a list of arms ({', '.join(BUILT_IN)}), got {shown(value)}")
    arms = [_arm(item) for item in value]
    names = [arm.name for arm in arms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"arms: the name {twice[0]!r} occurs twice; rename one: `- NAME: {{arm: {twice[0]}}}`")
    return tuple(arms)


def _arm(item: Any) -> Arm:
    if isinstance(item, str):
        if item not in BUILT_IN:
            raise UserError(f"arms: {unknown(item, BUILT_IN)}; or describe it: `- NAME: {{layers: [0, 1]}}`")
        return Arm(str(item), str(item), draws=DRAWS if item == "random" else 1)
    if not isinstance(item, Mapping) or len(item) != 1:
        raise UserError(f"arms: expected a name, or one `NAME: {{...}}`, got {shown(item)}")
    [(name, fields)] = item.items()
    check_name("arms", name)
    where = f"arms.{name}"
    if isinstance(fields, str):  # NAME: ANOTHER_NAME
        fields = {"arm": fields}
    if isinstance(fields, list):  # NAME: [0, 1]
        fields = {"layers": fields}
    if not isinstance(fields, Mapping):
        raise UserError(f"{where}: expected {', '.join(ARM_KEYS)}, got {shown(fields)}")
    for key in fields:
        if key not in ARM_KEYS:
            raise UserError(f"{where}: {unknown(key, ARM_KEYS)}")
    kind = str(fields.get("arm", name if name in BUILT_IN else ""))
    if kind and kind not in BUILT_IN:
        raise UserError(f"{where}.arm: {unknown(kind, BUILT_IN)}")
    layers: tuple[int, ...] = ()
    if "layers" in fields:
        if kind:
            raise UserError(f"{where}.layers: the arm {kind} chooses its layers itself; leave one of the two out")
        kind, layers = "fixed", convert(fields["layers"], LAYERS, f"{where}.layers")
    draws = 1
    if kind == "random":
        draws = convert(fields.get("draws", DRAWS), Annotated[int, between(1, 100)], f"{where}.draws")
    elif "draws" in fields:
        raise UserError(f"{where}.draws: only the arm random has draws")
    changes = read_changes(fields.get("set", {}), f"{where}.set")
    arm = Arm(str(name), kind, layers, draws, tuple(changes))
    for key, _ in changes:
        if key in arm.sets:
            raise UserError(f"{where}.set.{key}: the arm {kind} sets it itself; leave it out")
    return arm


def check_name(where: str, name: Any) -> None:
    """Refuse a name that cannot be part of a folder's name."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{where}: expected a name of at most 64 letters, digits, . _ + -, got {shown(name)}")


def read_changes(value: Any, where: str) -> Changes:
    """Changes to a configuration: {"section.field": value}, or {section: {field: value}}.

    Raises:
        UserError: something else, or a field that occurs twice.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected `section.field: value`, got {shown(value)}")
    changes: Changes = []
    for key, item in value.items():
        if not all(str(key).split(".")):
            raise UserError(f"{where}: expected `section.field: value`, got the key {shown(key)}")
        if "." in key:
            changes.append((str(key), item))
        elif isinstance(item, Mapping):
            changes += [(f"{key}.{field}", entry) for field, entry in item.items()]
        else:
            raise UserError(f"{where}.{key}: expected `section.field: value`, got {shown(item)}")
    keys = [key for key, _ in changes]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"{where}: {twice[0]} occurs twice; keep one")
    return changes


def overlapping(key: str, others: Sequence[str] | frozenset[str]) -> bool:
    """Whether a field is among others, or is a part of one of them, or holds one of them."""
    return any(key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in others)
