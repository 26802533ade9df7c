"""Turn scores into other libraries' settings: skip lists, LayerSkipConfig of diffusers, LoRA, block ids, JSON.

Everything here takes blocks: their names as `LayerScores.names` has them, or a `LayerSelection`.
"single_transformer_blocks.7" is block 7, counted from 0, of the module list `single_transformer_blocks`; layer l of a
`DiT` is its `branches.{2l}` (attention) and `branches.{2l + 1}` (feed-forward).

A low score says that a block changes the velocity little when it alone is switched off. It is no promise about quality
once blocks are removed without fine-tuning: measure that.
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
from .scores import LayerScores, whole_number

if TYPE_CHECKING:
    from diffusers.hooks import LayerSkipConfig

Blocks = Iterable[str] | Any  # names, or a LayerSelection


def lowest(scores: LayerScores, k: int) -> tuple[str, ...]:
    """The names of the k blocks with the lowest mean score, in the order of the forward; of equal scores the deeper.

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
    """{time: the k lowest blocks there}: what a sampler may skip at each of its steps.

    Args:
        scores: of samples at several times, which they know (`scores.t`).
        times: the sampler's times, in the unit of `scores.t`; each gets the list of the nearest probed time. None:
            the probed times themselves.

    Raises:
        ValueError: the scores know no t.
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
    """{name of the module list: 0-based ids, ascending}, lists in the order in which they occur.

    That is the form of cache-dit, `DBPruneConfig(non_prune_block_ids=...)` for one list, and of most trainers.

    Raises:
        ValueError: a name that is no block of a list, or that occurs twice.
    """
    ids: dict[str, list[int]] = {}
    for name in _names(blocks):
        found = re.fullmatch(r"(.+)\.(\d+)", name)
        if found is None:
            raise ValueError(f"blocks: {name!r} is no block of a module list, such as 'transformer_blocks.3'")
        list_name, number = found[1], int(found[2])
        if number in ids.setdefault(list_name, []):
            raise ValueError(f"blocks: {name!r} occurs twice")
        ids[list_name].append(number)
    return {list_name: sorted(numbers) for list_name, numbers in ids.items()}


def layer_skip(blocks: Blocks, model: nn.Module, **options: Any) -> list[LayerSkipConfig]:
    """diffusers' `LayerSkipConfig` of these blocks, one for each module list; for `apply_layer_skip` and skip guidance.

    Args:
        model: the transformer that they are meant for. diffusers skips a block by rules for its class, and has none
            for many classes and wrong ones for some; those are refused here.
        options: other fields of `LayerSkipConfig` (`skip_attention=False`, say).

    Raises:
        ImportError: diffusers is missing.
        ValueError: the model has no such block, or diffusers cannot skip it exactly.
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
                own = "skip_layers" in inspect.signature(type(model).forward).parameters
                hint = f"; give {type(model).__name__} skip_layers={numbers} instead" if own else ""
                raise ValueError(f"{list_name}.{number}: diffusers' LayerSkipConfig {reason}{hint}")
        configs.append(LayerSkipConfig(indices=numbers, fqn=list_name, **options))
    return configs


def _cannot_skip(block: nn.Module) -> str:
    """Why diffusers' hook does not give back what this block is given; "" where it does."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    kind = type(block)
    try:
        rules = TransformerBlockRegistry.get(kind)
    except ValueError:
        return f"has no rule for {kind.__name__}"
    if rules.return_encoder_hidden_states_index not in (None, 1):
        # The hook returns (hidden_states, encoder_hidden_states), in that order, whatever the block returns.
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
        model: what the config will be used on; checks that each block and each module is there.
        by_index: `layers_to_transform` with `layers_pattern`, for trainers that take only those, in place of one
            expression for the full names. peft also applies it to lists of the same name deeper inside the model.

    Raises:
        ValueError: a block or module that the model lacks; `by_index` with lists whose ids differ.
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
                if not any(re.fullmatch(pattern, known) for known, _ in model.named_modules()):
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
    """Write blocks as plain JSON: their ids by module list, and what `LayerSelection.from_json` reads.

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
    for layer, name in zip(scores.layers, scores.names):
        known[layer] = _of_dit(layer) if name.partition(".")[0].isdigit() else (name,)
    return known


def _of_dit(layer: int) -> tuple[str, ...]:
    """The attention and the feed-forward of a layer of our `DiT`."""
    return (f"branches.{2 * layer}", f"branches.{2 * layer + 1}")


def _names(blocks: Blocks, what: str = "blocks") -> tuple[str, ...]:
    """The names of blocks, at least one; those of a `LayerSelection` too."""
    layers = getattr(blocks, "layers", None)
    if layers is not None:
        named = getattr(blocks, "names", None)
        return tuple(name for layer in layers for name in _of_dit(layer)) if named is None else tuple(named)
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise TypeError(f"{what}: expected a sequence of names, or a LayerSelection, got {blocks!r:.60}")
    found = tuple(blocks)
    if not found or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{what}: expected at least one name, all of them text, got {found!r:.60}")
    return found


def _list(model: nn.Module, name: str, numbers: Sequence[int]) -> nn.ModuleList | nn.Sequential:
    try:
        modules = model.get_submodule(name)
    except AttributeError:
        modules = None
    if not isinstance(modules, nn.ModuleList | nn.Sequential):
        raise ValueError(f"blocks: {type(model).__name__} has no module list {name!r}")
    if numbers[-1] >= len(modules):
        raise ValueError(f"blocks: {name}.{numbers[-1]}: {type(model).__name__} has {len(modules)} blocks there")
    return modules
