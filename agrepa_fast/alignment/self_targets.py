"""Alignment without a teacher: the target is a later hidden state of the network itself, or of its moving average.

A self teacher takes the place of a teacher's width wherever teachers are named. Gradients never reach a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .. import ops
from ..errors import UserError
from .reselect import ALL
from .selection import Selection, by_teacher


@dataclass(frozen=True)
class SelfTeacher:
    """The network as its own teacher; use `LayerSync` or `SelfFlow`.

    Attributes:
        target_layer: the 0-based layer whose output is the target. Every aligned layer comes before it. None: the layer
            that a probe measures (`LayerSelection.target`).
        averaged: whether the target is a state of the moving average (EMA) of the network.
    """

    target_layer: int | None = None
    averaged: ClassVar[bool] = False

    def __post_init__(self) -> None:
        layer = self.target_layer
        if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool) or layer < 1):
            raise ValueError(f"target_layer: expected a layer from 1 on, as the aligned ones come first, got {layer!r}")


class LayerSync(SelfTeacher):
    """A teacher in an `Aligner`: align earlier layers with a later layer of the same forward.

    It needs no features and no further forward (LayerSync, arXiv 2510.12581). No gradient reaches the target.

    Args:
        target_layer: the later layer, 0-based; None: the first probe brings it (`ProbePlan.targets`).
    """


class SelfFlow(SelfTeacher):
    """A teacher in an `Aligner`: align earlier layers with a later layer of the network's moving average (EMA).

    The average sees the clip at a cleaner time (after Self-Flow, arXiv 2603.06507). The trainer runs this second
    forward, without gradient (`Aligner(average=)`).

    Args:
        target_layer: the later layer, 0-based; None: the first probe brings it (`ProbePlan.targets`).
    """

    averaged = True


SOURCES: dict[str, type[SelfTeacher]] = {"layersync": LayerSync, "self-flow": SelfFlow}


class SelfTargets:
    """The layers that are targets, {teacher: layer}, and the targets of a step.

    Args:
        teachers: all teachers by name; those that are no `SelfTeacher` are ignored.
        depth: number of layers. Until a target layer is measured, the last layer stands in for it.
    """

    def __init__(self, teachers: Mapping[str, Any], depth: int) -> None:
        self.teachers = {name: one for name, one in teachers.items() if isinstance(one, SelfTeacher)}
        self.depth = depth
        self.layers = {
            name: depth - 1 if teacher.target_layer is None else teacher.target_layer
            for name, teacher in self.teachers.items()
        }

    @property
    def measured(self) -> tuple[str, ...]:
        """The teachers whose target layer a probe measures."""
        return tuple(name for name, teacher in self.teachers.items() if teacher.target_layer is None)

    def below(self, per_teacher: bool) -> dict[str, int]:
        """The first layer that may not be aligned, where a target layer is given; see `LayerChooser`."""
        given = {name: t.target_layer for name, t in self.teachers.items() if t.target_layer is not None}
        return given if per_teacher or not given else {ALL: min(given.values())}

    def check(self, measured: bool) -> None:
        """Refuse a target layer that does not exist. measured: one that is not given comes with the first probe.

        Raises:
            ValueError: names the teacher.
        """
        for name, teacher in self.teachers.items():
            target = teacher.target_layer
            if target is None and measured:
                continue
            if target is None or target >= self.depth:
                raise ValueError(f"teacher {name!r}: expected a target_layer from 1 to {self.depth - 1}, got {target}")

    def select(self, selection: Selection, teachers: Sequence[str]) -> None:
        """Take the target layers that a selection was chosen with. teachers: the names of all.

        Raises:
            UserError: a target layer is missing, does not exist, or does not come after all aligned layers.
        """
        layers, depth = {}, self.depth
        for name, own in by_teacher(selection, teachers).items():
            if name not in self.teachers:
                continue
            target = self.teachers[name].target_layer
            target = own.target if target is None else target
            if target is None:
                raise UserError(
                    f"teacher {name!r}: the selection of layers {list(own.layers)} has no target layer: "
                    f"give target_layer, from {own.layers[-1] + 1} to {depth - 1}"
                )
            if not own.layers[-1] < target < depth:
                raise UserError(
                    f"teacher {name!r}: target layer {target}: expected a layer after the aligned ones "
                    f"({', '.join(map(str, own.layers))}) of the {depth} from 0 to {depth - 1}"
                )
            layers[name] = target
        self.layers = layers

    def wanted(self, averaged: bool) -> tuple[int, ...]:
        """The layers whose states are targets: of the network, or of its average."""
        return tuple(sorted({self.layers[name] for name in self._named(averaged)}))

    def of(self, hidden: Mapping[int, Tensor], averaged: bool, pool: str | None, mask: Tensor | None) -> dict:
        """Targets {teacher: [B, D] or, without pool, [B, T, D]} from the states {layer: [B, T, D]}, detached."""
        missing = [layer for layer in self.wanted(averaged) if layer not in hidden]
        if missing:
            of = "the average's" if averaged else "the network's"
            raise ValueError(f"hidden states: {of} of layer {missing[0]}, a target, are missing")
        states = {name: hidden[self.layers[name]].detach() for name in self._named(averaged)}
        return states if pool is None else {name: ops.masked_mean(state, mask) for name, state in states.items()}

    def _named(self, averaged: bool) -> list[str]:
        return [name for name in self.layers if self.teachers[name].averaged is averaged]


def widths_of(teachers: Mapping[str, Any], width: int) -> dict[str, Any]:
    """{teacher: width of its features}; a self teacher's are as wide as the network."""
    own = {name: width for name, teacher in teachers.items() if isinstance(teacher, SelfTeacher)}
    return {name: getattr(teacher, "width", teacher) for name, teacher in teachers.items()} | own
