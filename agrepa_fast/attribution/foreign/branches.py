"""Branches of other people's blocks: modules inside a block whose results the block adds to its state.

A branch is named by its place in the block ("attn1", "ff"). That a block adds a branch's result, through gates and
projections at most, is found out by running: with the other named branches silent, the block's result must change in
proportion when the branch's result is doubled and when it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .record import overridden
from .subject import eps_of


def branch_names(model: nn.Module, blocks: Sequence[str], branches: Sequence[str]) -> dict[str, tuple[int, str]]:
    """{name of a module: (its block's layer, its name in the block)}, block by block.

    Raises:
        TypeError, ValueError: no names, or one that no block has; lists the modules that the first block has.
    """
    if isinstance(branches, str) or not branches or not all(isinstance(name, str) for name in branches):
        raise TypeError(f"branches: expected names of modules inside the blocks, as ['attn', 'ff'], got {branches!r}")
    modules = dict(model.named_modules())
    for branch in branches:
        if not any(f"{block}.{branch}" in modules for block in blocks):
            have = ", ".join(name for name, _ in modules[blocks[0]].named_children()) or "none"
            raise ValueError(f"branches: no block has a module {branch!r}; the modules of {blocks[0]} are: {have}")
    return {
        f"{block}.{branch}": (layer, branch)
        for layer, block in enumerate(blocks)
        for branch in dict.fromkeys(branches)
        if f"{block}.{branch}" in modules
    }


def check_branches(known: Any, blocks: Sequence[str], names: dict[str, tuple[int, str]]) -> None:
    """Refuse a named module that its block does not add to the state, for each class of blocks once.

    Args:
        known: the `Examination` of the model.

    Raises:
        ValueError: names the module.
    """
    modules = dict(known.model.named_modules())
    checked: set[tuple[type[nn.Module], str]] = set()
    for name, (layer, branch) in names.items():
        block = modules[blocks[layer]]
        if (type(block), branch) in checked:
            continue
        checked.add((type(block), branch))
        others = [modules[other] for other, (at, _) in names.items() if at == layer and other != name]
        without, once, twice = (_block_result(known, block, modules[name], others, factor) for factor in (0, 1, 2))
        effect, bend = (once - without).norm(), (twice - 2 * once + without).norm()
        rounding = 64 * eps_of(known.model, once) * once.norm()
        if effect <= rounding:
            raise ValueError(f"branches: {name} changes nothing in what {blocks[layer]} returns: it is no branch of it")
        if bend > 1e-3 * effect + rounding:
            raise ValueError(
                f"branches: {blocks[layer]} does not add the result of {name} to its state, or other branches of it "
                "come after: name all of its branches (attention, cross-attention, feed-forward) together"
            )


def _block_result(known: Any, block: nn.Module, branch: nn.Module, others: Sequence[nn.Module], factor: int) -> Tensor:
    """A block's results on the first sample, with one branch's result times `factor` and the others' set to zero."""
    results: list[Any] = []

    def scaled(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        if module is block:
            results.append(result)
            return result
        by = factor if module is branch else 0
        return tree_map(
            lambda leaf: leaf * by if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, result
        )

    with overridden([block, branch, *others], scaled):
        known.subject.forward(torch.tensor([known.first]))
    leaves = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.cat([leaf.double().flatten() for leaf in leaves])
