"""What AlignmentLoss and InterfaceLoss refuse, and that they name the layer, the teacher and the shape."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast import AlignmentLoss, InterfaceLoss, LayerSelection
from agrepa_fast.errors import UserError

SELECTION = LayerSelection((1, 4), (0.5, 0.5))
TEACHERS = {"speech": 5, "audio": 3}


def arguments(pool):
    shape = (2,) if pool else (2, 7)
    return {
        "hidden": {layer: torch.randn(2, 7, 6) for layer in SELECTION.layers},
        "targets": {name: torch.randn(*shape, size) for name, size in TEACHERS.items()},
        "mask": torch.ones(2, 7, dtype=torch.bool),
        "domains": {name: torch.ones(2) for name in TEACHERS},
    }


@pytest.mark.parametrize("pool", ["mean", None])
@pytest.mark.parametrize(
    "part, change, message",
    [
        ("hidden", {4: None}, r"no hidden state of layer 4, only \[1\]"),
        ("hidden", {4: torch.randn(2, 7, 8)}, r"hidden\[4\]: expected \[batch, frames, 6\].* got \[2, 7, 8\]"),
        ("hidden", {4: torch.randn(2, 6)}, r"hidden\[4\]: .* got \[2, 6\]"),
        ("hidden", {4: torch.randn(3, 7, 6)}, r"hidden\[4\]: .* got \[3, 7, 6\]"),
        ("targets", {"audio": None}, r"no features of teacher 'audio', only \['speech'\]"),
        ("targets", {"audio": torch.randn(2, 4)}, r"targets\['audio'\]: expected \[2, (7, )?3\], got \[2, 4\]"),
        ("targets", {"audio": torch.randn(3, 7, 3)}, r"targets\['audio'\]: .*got \[3, 7, 3\]"),
        ("targets", {"audio": torch.randn(2, 6, 3)}, r"targets\['audio'\]: .*got \[2, 6, 3\]"),
        ("domains", {"audio": None}, "no weights for teacher 'audio'"),
        ("domains", {"audio": torch.ones(3)}, r"domains\['audio'\]: expected \[2\], got \[3\]"),
        ("domains", ["speech"], r"expected 2 names among the teachers \['speech', 'audio'\], got \['speech'\]"),
        ("domains", ["speech", "music"], "'music'"),
        ("sample_weight", torch.ones(3), r"sample_weight: expected \[2\], got \[3\]"),
        ("mask", torch.ones(2, 7), r"mask: expected bool \[2, 7\], got torch.float32"),
        ("mask", torch.ones(2, 6, dtype=torch.bool), r"mask: expected bool \[2, 7\], got torch.bool \[2, 6\]"),
    ],
)
def test_alignment_names_what_does_not_fit(pool, part, change, message):
    given = arguments(pool)
    if isinstance(change, dict):
        given[part] = {key: value for key, value in (given[part] | change).items() if value is not None}
    else:
        given[part] = change
    with pytest.raises(ValueError, match=message):
        AlignmentLoss(6, TEACHERS, SELECTION, pool)(**given)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"embedding": torch.randn(2, 7, 8)}, r"embedding: expected \[batch, frames, 6\], got \[2, 7, 8\]"),
        ({"targets": {"speech": torch.randn(2, 5)}}, "no features of teacher 'audio'"),
        ({"targets": {"speech": torch.randn(2, 5), "audio": torch.randn(2, 4)}}, r"targets\['audio'\]: expected"),
        ({"kept": torch.ones(2)}, r"kept: expected bool \[2\], got torch.float32"),
        ({"kept": torch.ones(3, dtype=torch.bool)}, r"kept: expected bool \[2\]"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool)}, "mask: expected bool"),
    ],
)
def test_interface_names_what_does_not_fit(change, message):
    given = {"embedding": torch.randn(2, 7, 6), "targets": arguments("mean")["targets"], **change}
    with pytest.raises(ValueError, match=message):
        InterfaceLoss(6, TEACHERS, {})(**given)


def test_constructors_name_what_does_not_fit():
    with pytest.raises(ValueError, match=r"pool: expected .* got 'max'"):
        AlignmentLoss(6, TEACHERS, SELECTION, "max")
    with pytest.raises(ValueError, match="at least one"):
        AlignmentLoss(6, {}, SELECTION)


@pytest.mark.parametrize("name", ["whisper.v3", "keys", "training", ""])
def test_a_name_that_no_module_can_have_is_the_user_s_mistake(name):
    with pytest.raises(UserError, match=f"'{name}' cannot name a module"):
        AlignmentLoss(6, {name: 5}, SELECTION)
    with pytest.raises(UserError, match=f"'{name}' cannot name a module"):
        InterfaceLoss(6, {name: 5}, {})
