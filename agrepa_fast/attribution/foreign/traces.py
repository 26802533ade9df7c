"""How much of a block's argument is in its results: tells a block with a residual connection from one without, and
which of two states of one shape is which.

A block is called again with small random values added to one argument. A result that is this argument plus something
changes by those values plus something that is not correlated with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from .inputs import SEED
from .record import copies, flat, overridden
from .subject import Subject
from .wiring import Site

DRAWS = 4
STEP = 1e-2  # of the argument's root mean square; large beside rounding, small beside the block's curvature
PRESENT, ABSENT = 0.3, 0.15  # correlations from and up to which an argument is in a result, or is not


def traces(subject: Subject, first: int, site: Site, arguments: Sequence[str]) -> dict[tuple[str, str], float]:
    """{(result path, argument path): correlation} of the changes of a block's state results with what was added.

    For the block's first call in a forward of the sample `first`."""
    found: dict[tuple[str, str], float] = {}

    def probe(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if found:
            return forward(*args, **kwargs)
        paths, leaves, spec = flat((args, kwargs))
        again_args, again_kwargs = tree_unflatten(copies(leaves), spec)  # the block may write into them
        base = _tensors(forward(*again_args, **again_kwargs))
        generator = torch.Generator().manual_seed(SEED)
        for argument in arguments:
            place = paths.index(argument)
            sums: dict[str, list[float]] = {path: [0.0, 0.0, 0.0] for path in site.state}
            for _ in range(DRAWS):
                entering = leaves[place]
                added = torch.randn(entering.shape, generator=generator).to(entering)
                added *= (
                    STEP * _reals(entering).float().square().mean().sqrt().to(added) + torch.finfo(entering.dtype).tiny
                )
                changed = copies(leaves)
                changed[place] = entering + added
                again_args, again_kwargs = tree_unflatten(changed, spec)
                after = _tensors(forward(*again_args, **again_kwargs))
                for path, sums_of in sums.items():
                    if path not in base or base[path].shape != added.shape:
                        continue
                    change, step = (_reals(x).double().flatten() for x in (after[path] - base[path], added))
                    for i, value in enumerate((change @ step, change @ change, step @ step)):
                        sums_of[i] += value.item()
            for path, (product, changes, steps) in sums.items():
                found[path, argument] = product / max((changes * steps) ** 0.5, 1e-300)
        return forward(*args, **kwargs)

    with overridden([site.module], probe):
        subject.forward(torch.tensor([first]))
    return found


def settled(subject: Subject, first: int, site: Site) -> dict[str, str] | None:
    """{result path: argument path} of a block with several states of one shape; None where the traces do not tell."""
    arguments = sorted({*site.state.values(), *itertools.chain(*site.places.values())})
    found = traces(subject, first, site, arguments)
    state: dict[str, str] = {}
    for result in site.state:
        ranked = sorted(arguments, key=lambda path: -found[result, path])
        best, next_best = (found[result, path] for path in ranked[:2])
        if best <= max(2 * next_best, ABSENT):
            return None
        state[result] = ranked[0]
    return state if len(set(state.values())) == len(state) else None


def has_residual(subject: Subject, first: int, site: Site) -> bool | None:
    """Whether a block's result is its state plus something; None where that cannot be told."""
    found = traces(subject, first, site, list(site.state.values()))
    present = [abs(found.get(pair, 0.0)) for pair in site.state.items()]
    if min(present) >= PRESENT:
        return True
    return False if max(present) <= ABSENT else None


def _reals(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _tensors(result: Any) -> dict[str, Tensor]:
    paths, leaves, _ = flat(result)
    return {path: leaf.clone() for path, leaf in zip(paths, leaves) if isinstance(leaf, Tensor)}
