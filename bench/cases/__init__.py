"""The cases in order. They take turns problem by problem, each beginning with its most important one."""

from __future__ import annotations

from types import ModuleType

from agrepa_fast.errors import UserError

from . import alignment, demo, foga, foreign, pooling, residual, sampler, scaling, self_alignment, train_step, trainer

CASES: dict[str, ModuleType] = {
    "residual": residual,
    "foga": foga,
    "foreign": foreign,
    "alignment": alignment,
    "pooling": pooling,
    "train_step": train_step,
    "trainer": trainer,
    "self_alignment": self_alignment,
    "sampler": sampler,
    "scaling": scaling,
    "demo": demo,
}


def find(names: list[str]) -> dict[str, ModuleType]:
    """The named cases, or all for "all".

    Raises:
        UserError: an unknown name.
    """
    for name in names:
        if name != "all" and name not in CASES:
            raise UserError(f"{name!r}: no such case; expected all or some of {', '.join(CASES)}")
    return CASES if "all" in names else {name: CASES[name] for name in CASES if name in names}
