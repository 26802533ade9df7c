"""Find the block lists of a model and the names of their blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

USUAL_NAMES = ("transformer_blocks", "blocks", "layers", "layer", "h", "joint_blocks", "double_blocks", "resblocks")


def find_blocks(model: nn.Module, block_list: str | Sequence[str] | None) -> tuple[list[str], list[nn.Module]]:
    """The blocks of a model and their dotted names, from the named lists or from one under a usual name.

    Raises:
        ValueError: none or several found (lists what there is), a name without a list, or blocks that cannot be driven.
    """
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and name and len(module)
    }
    have = ", ".join(f"{name} ({len(blocks)})" for name, blocks in lists.items()) or "none"
    if block_list is not None:
        chosen = [block_list] if isinstance(block_list, str) else list(block_list)
        for name in chosen:
            if name not in lists:
                raise ValueError(f"block_list: {type(model).__name__} has no module list {name!r}; it has: {have}")
    else:
        usual = {name: blocks for name, blocks in lists.items() if name.rpartition(".")[2] in USUAL_NAMES}
        # Those inside another candidate's blocks are parts of blocks.
        usual = {n: b for n, b in usual.items() if not any(n.startswith(f"{other}.") for other in usual)}
        sizes = {n: sum(p.numel() for block in b for p in block.parameters()) for n, b in usual.items()}
        chosen = [n for n, size in sizes.items() if 10 * size >= max(sizes.values())]
        if not chosen:
            raise ValueError(
                f"no blocks found in {type(model).__name__}: looked for a module list called "
                f"{', '.join(USUAL_NAMES)}; it has: {have}. Name it, as block_list='decoder.stages'"
            )
        if len(chosen) > 1:
            raise ValueError(
                f"several block lists found in {type(model).__name__}: {', '.join(chosen)}. Name the one to score, or "
                "all in the order in which they run, as block_list=['double_blocks', 'single_blocks']"
            )
    named = [(f"{name}.{i}", block) for name in chosen for i, block in enumerate(lists[name])]
    for name, block in named:
        if isinstance(block, nn.ModuleList | nn.ModuleDict):
            raise ValueError(f"{name} is a {type(block).__name__}, which forward cannot call as one block: wrap it")
        if isinstance(block, torch.jit.ScriptModule):
            raise ValueError(f"{name} is a compiled ScriptModule, which cannot be driven: load the model unscripted")
    if len({id(block) for _, block in named}) < len(named):
        raise ValueError(f"{chosen[0]}: the same block stands in it twice, and cannot be switched off apart")
    return [name for name, _ in named], [block for _, block in named]
