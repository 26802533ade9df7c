"""Turn scores into other libraries' settings: skip lists, LayerSkipConfig of diffusers, LoRA, block ids, JSON.

Everything here takes blocks: their names as `LayerScores.names` has them, or a `LayerSelection`.
"single_transformer_blocks.7" is block 7, counted from 0, of the module list `single_transformer_blocks`; layer l of a
`DiT` is its `branches.{2l}` (attention) and `branches.{2l + 1}` (feed-forward).

A low score means that switching off this block alone changes the velocity little. It does not predict the quality after
blocks are removed without fine-tuning: measure that.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import writing
from .foreign.wrapped import bare, unwrap
from .scores import LayerScores, whole_number

if TYPE_CHECKING:
    from diffusers.hooks import LayerSkipConfig

Blocks = Iterable[str] | Any  # names, or a LayerSelection


def lowest(scores: LayerScores, k: int) -> tuple[str, ...]:
    """The names of the k blocks with the lowest mean score, in forward order. If scores are equal, the deeper wins.
    Scores of branches or streams are added up by block.

    Raises:
        ValueError, TypeError: k is not a number from 1 to the number of scored blocks.
    """
    known, mean = _by_layer(scores), dict[int, float]()
    for layer, score in zip(scores.layers, scores.mean.tolist()):
        mean[layer] = mean.get(layer, 0.0) + score
    whole_number("k", k, 1, len(mean), "blocks")
    chosen = sorted(sorted(mean, key=lambda layer: (mean[layer], -layer))[:k])
    return tuple(name for layer in chosen for name in known[layer])


def skip_lists(scores: LayerScores, k: int, times: Iterable[float] | None = None) -> dict[float, tuple[str, ...]]:
    """{time: the k blocks of the lowest score at that time}: the blocks that a sampler may skip at each step.

    Args:
        scores: scores with times (`scores.t`).
        times: the sampler's times, in the unit of `scores.t`; each gets the list of the nearest probed time. None:
            the probed times themselves.

    Raises:
        ValueError: the scores have no times.
    """
    if scores.t is None:
        raise ValueError(
            "scores: have no t; probe samples at several times, with an input that is called timestep or t"
        )
    probed = {t: lowest(scores.at(t), k) for t in scores.t.unique().tolist()}
    if times is None:
        return probed
    return {float(time): probed[min(probed, key=lambda t: abs(t - float(time)))] for time in times}


def block_ids(blocks: Blocks) -> dict[str, list[int]]:
    """{name of the module list: 0-based ids, ascending}, with the lists in the order in which they occur.

    Most trainers take the ids of one list. So does cache-dit, as `DBPruneConfig(non_prune_block_ids=...)`: those are
    the blocks that it never prunes, so give the blocks of the highest scores.

    Raises:
        ValueError: a name does not belong to a block of a list, or occurs twice.
    """
    ids: dict[str, list[int]] = {}
    for name in _names(blocks):
        match = re.fullmatch(r"(.+)\.(\d+)", name)
        if match is None:
            raise ValueError(f"blocks: {name!r} is no block of a module list, such as 'transformer_blocks.3'")
        list_name, number = match[1], int(match[2])
        if number in ids.setdefault(list_name, []):
            raise ValueError(f"blocks: {name!r} occurs twice")
        ids[list_name].append(number)
    return {list_name: sorted(numbers) for list_name, numbers in ids.items()}


def layer_skip(blocks: Blocks, model: nn.Module, **options: Any) -> list[LayerSkipConfig]:
    """diffusers' `LayerSkipConfig` of these blocks, one for each module list; for `apply_layer_skip` and skip guidance.

    Args:
        model: the transformer whose blocks are skipped. diffusers has a rule for each class of block. It lacks a rule
            for many classes, and some of its rules are wrong; such blocks are refused.
        options: other fields of `LayerSkipConfig` (`skip_attention=False`, say).

    Raises:
        ImportError: diffusers is missing.
        ValueError: the model does not have the block, or diffusers cannot skip it exactly.
    """
    try:
        from diffusers.hooks import LayerSkipConfig
    except ImportError as error:
        raise ImportError(f"layer_skip needs diffusers: pip install 'agrepa-fast[models]' ({error})") from error
    whole = options.get("skip_attention", True) and options.get("skip_ff", True)
    configs = []
    for list_name, numbers in block_ids(blocks).items():
        modules = _list(model, list_name, numbers)
        for number in numbers if whole else ():
            reason = _cannot_skip(modules[number])
            if reason:
                takes_skip_layers = "skip_layers" in inspect.signature(type(model).forward).parameters
                hint = f"; give {type(model).__name__} skip_layers={numbers} instead" if takes_skip_layers else ""
                raise ValueError(f"{list_name}.{number}: diffusers' LayerSkipConfig {reason}{hint}")
        configs.append(LayerSkipConfig(indices=numbers, fqn=list_name, **options))
    return configs


def _cannot_skip(block: nn.Module) -> str:
    """Why diffusers' hook does not return this block's input unchanged; "" if it does."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    kind = type(block)
    try:
        rules = TransformerBlockRegistry.get(kind)
    except ValueError:
        return f"has no rule for {kind.__name__}"
    if rules.return_encoder_hidden_states_index not in (None, 1):
        # The hook always returns (hidden_states, encoder_hidden_states), also where the block returns another order.
        return f"would exchange the two streams of {kind.__name__}, which returns the text's first"
    if "hidden_states" not in inspect.signature(kind.forward).parameters:
        return f"looks for an argument hidden_states, which {kind.__name__} does not have"
    return ""


def lora_layers(
    blocks: Blocks, modules: Sequence[str], model: nn.Module | None = None, by_index: bool = False
) -> dict[str, Any]:
    """Keyword arguments of `peft.LoraConfig` that put adapters on `modules` of exactly these blocks.

    Args:
        modules: the ends of the module names inside a block ("to_q", "ff.net.0.proj").
        model: the model to be adapted; each block and each module is checked against it.
        by_index: return `layers_to_transform` and `layers_pattern`, for trainers that take only these, instead of a
            regular expression for the full names. peft applies them also to lists of the same name inside the blocks.

    Raises:
        ValueError: the model lacks a block or module, or `by_index` is given and the lists have different ids.
    """
    modules = _names(modules, "modules")
    ids = block_ids(blocks)
    inside = rf"(?:.+\.)?(?:{'|'.join(map(re.escape, modules))})"
    places = [rf"{re.escape(name)}\.(?:{'|'.join(map(str, numbers))})" for name, numbers in ids.items()]
    expression = rf"(?:{'|'.join(places)})\.{inside}"
    if model is not None:
        for name, numbers in ids.items():
            _list(model, name, numbers)
            for number in numbers:
                pattern = rf"{re.escape(name)}\.{number}\.{inside}"
                if not any(re.fullmatch(pattern, known) for known, _ in unwrap(model).named_modules()):
                    raise ValueError(f"modules: {name}.{number} has none of {', '.join(modules)}")
    if not by_index:
        return {"target_modules": expression}
    if len({tuple(numbers) for numbers in ids.values()}) > 1:
        raise ValueError(f"by_index: one list of ids for all module lists, got {ids}; leave by_index out")
    return {
        "target_modules": list(modules),
        "layers_to_transform": next(iter(ids.values())),
        "layers_pattern": [re.escape(name) for name in ids],
    }


def to_json(path: str | Path, blocks: Blocks, scores: LayerScores, method: str = "export") -> None:
    """Write blocks as JSON: their ids by module list, and the selection that `LayerSelection.from_json` reads.

    Raises:
        ValueError: a block without a score. UserError: the file cannot be written.
    """
    layers = positions(blocks, scores)
    state: dict[str, Any] = {"layers": layers, "weights": [1 / len(layers)] * len(layers), "method": method}
    known = _by_layer(scores)
    if all(len(known[layer]) == 1 for layer in layers):  # a DiT's layers have numbers alone
        state["names"] = [known[layer][0] for layer in layers]
    with writing(path):
        Path(path).write_text(json.dumps({**state, "blocks": block_ids(blocks)}, indent=1) + "\n", encoding="utf-8")


def positions(blocks: Blocks, scores: LayerScores) -> list[int]:
    """Positions of named blocks among the layers of `scores`, ascending: the layers of a `LayerSelection`.

    Raises:
        ValueError: a block without a score.
    """
    where = {name: layer for layer, known in _by_layer(scores).items() for name in known}
    chosen = _names(blocks)
    missing = [name for name in chosen if name not in where]
    if missing:
        raise ValueError(f"blocks: {missing[0]!r} has no score; scored were {', '.join(where):.300}")
    return sorted({where[name] for name in chosen})


def _by_layer(scores: LayerScores) -> dict[int, tuple[str, ...]]:
    """The names of the modules of each scored layer."""
    if not isinstance(scores, LayerScores):
        raise TypeError(f"scores: expected LayerScores, as attribute_layers returns them, got {type(scores).__name__}")
    if scores.sets is not None:
        raise ValueError("scores: of sets of layers; export scores of single blocks (without sets= and spans=)")
    known: dict[int, tuple[str, ...]] = {}
    branches = scores.branches or ("",) * len(scores.layers)
    for layer, name, branch in zip(scores.layers, scores.names, branches):
        block = name.removesuffix(f".{branch}") if branch else name
        known[layer] = _of_dit(layer) if block.isdigit() else (block,)
    return known


def _of_dit(layer: int) -> tuple[str, ...]:
    """The attention and the feed-forward of a layer of our `DiT`."""
    return (f"branches.{2 * layer}", f"branches.{2 * layer + 1}")


def _names(blocks: Blocks, what: str = "blocks") -> tuple[str, ...]:
    """The names of blocks, at least one; those of a `LayerSelection` too."""
    layers = getattr(blocks, "layers", None)
    if layers is not None:
        named = getattr(blocks, "names", None)
        return tuple(name for layer in layers for name in _of_dit(layer)) if named is None else tuple(map(bare, named))
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise TypeError(f"{what}: expected a sequence of names, or a LayerSelection, got {blocks!r:.60}")
    names = tuple(blocks)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what}: expected at least one name, all of them text, got {names!r:.60}")
    return tuple(map(bare, names))


def _list(model: nn.Module, name: str, numbers: Sequence[int]) -> nn.ModuleList | nn.Sequential:
    model = unwrap(model)
    try:
        modules = model.get_submodule(name)
    except AttributeError:
        modules = None
    if not isinstance(modules, nn.ModuleList | nn.Sequential):
        raise ValueError(f"blocks: {type(model).__name__} has no module list {name!r}")
    if numbers[-1] >= len(modules):
        raise ValueError(f"blocks: {name}.{numbers[-1]}: {type(model).__name__} has {len(modules)} blocks there")
    return modules
