"""The block lists of a model and the width of its state by their names: what is known before the first forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ...models.dit import DiT

USUAL_NAMES = ("transformer_blocks", "blocks", "layers", "layer", "h", "joint_blocks", "double_blocks", "resblocks")
WIDTH_NAMES = ("inner_dim", "hidden_size", "dim", "embed_dim", "d_model")


def block_lists(model: nn.Module, block_list: str | Sequence[str] | None) -> dict[str, list[tuple[str, nn.Module]]]:
    """{name of a list: its blocks with their dotted names}: the lists named, or the one under a usual name.

    Names are the model's own, without what torch.compile puts in between.

    Raises:
        ValueError: no list or several under usual names, a name without a list, or a block that stands there twice.
    """
    kind = type(model).__name__
    lists = {
        name.replace("._orig_mod", ""): list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and name and len(module)
    }
    have = ", ".join(f"{name} ({len(blocks)})" for name, blocks in lists.items()) or "none"
    if block_list is not None:
        chosen = [block_list] if isinstance(block_list, str) else list(block_list)
        for name in chosen:
            if name not in lists:
                raise ValueError(f"block_list: {kind} has no module list {name!r}; it has: {have}")
    else:
        usual = {name: blocks for name, blocks in lists.items() if name.rpartition(".")[2] in USUAL_NAMES}
        # Those inside another candidate's blocks are parts of blocks.
        usual = {n: b for n, b in usual.items() if not any(n.startswith(f"{other}.") for other in usual)}
        sizes = {n: sum(p.numel() for block in b for p in block.parameters()) for n, b in usual.items()}
        chosen = [n for n, size in sizes.items() if 10 * size >= max(sizes.values())]
        if not chosen:
            raise ValueError(
                f"no blocks found in {kind}: looked for a module list called {', '.join(USUAL_NAMES)}; it has: {have}. "
                "Name it, as block_list='decoder.stages'"
            )
        if len(chosen) > 1:
            raise ValueError(
                f"several block lists found in {kind}: {', '.join(chosen)}. Name one, or all in the order in which "
                "they run, as block_list=['double_blocks', 'single_blocks']"
            )
    found = {name: [(f"{name}.{i}", block) for i, block in enumerate(lists[name])] for name in chosen}
    blocks = [block for members in found.values() for _, block in members]
    if len(set(blocks)) < len(blocks):
        raise ValueError(f"{chosen[0]}: the same block stands in it twice, so its states cannot be told apart")
    return found


def state_width(model: nn.Module) -> int:
    """D of the residual stream [B, T, D], from an attribute of the model or of its configuration.

    Only a first guess: the alignment loss refuses hidden states of another width.

    Raises:
        ValueError: neither has one of the usual names."""
    if isinstance(model, DiT):
        return model.config.width
    config = getattr(model, "config", None)
    for owner in (vars(model), config if isinstance(config, Mapping) else getattr(config, "__dict__", {})):
        for name in WIDTH_NAMES:
            if isinstance(owner.get(name), int):
                return owner[name]
    raise ValueError(f"width: {type(model).__name__} does not say how wide its hidden states are: give width=")
