"""Hidden states of any model without hooks: `HiddenStates` takes what chosen blocks return on the way through forward.

What a block returns is kept by an `Intercept` of its forward. Models that return hidden states themselves (`DiT`) are
asked for them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...models.dit import DiT
from ..runner import probing
from .drive import BlockModel
from .guard import quiet
from .lists import block_lists
from .register import adapter_of
from .taps import BlockTap, ForwardStart, ListTap, NetworkTap, results_of, version_of
from .wrapped import bare, prefix_of, reshard, resharded, unwrap


def _scored_blocks(model: nn.Module, inputs: Any, block_list: Any) -> list[tuple[str, nn.Module]]:
    """The blocks that `attribute_layers` scores on these inputs, by name and in its order."""
    reshard(model)
    with probing(model), quiet(model), resharded(model):
        blocks = BlockModel(model, inputs, block_list).blocks
    named = []
    for block in blocks:
        module = block.sites[0].module if len(block.sites) == 1 else model.get_submodule(block.name)
        if len(block.sites) > 1 and not isinstance(module, nn.ModuleList):
            raise ValueError(f"{block.name}: the forward takes it apart, so it has no state")
        named.append((block.name, module))
    return named


class HiddenStates:
    """The residual stream after chosen blocks, of any model whose blocks `attribute_layers` finds.

        with ag.HiddenStates(model, layers=[3, 7]) as states:
            velocity = model(**batch)      # as before: the same bits
            hidden = states.read()         # {3: [B, T, D], 7: [B, T, D]}, on the graph of the velocity

    The model may be compiled (before or after, also with fullgraph=True and activation checkpointing), wrapped
    (`DistributedDataParallel`, `fully_shard`, PEFT, accelerate) or get LoRA layers while this is attached. A probe
    (`attribute_layers`) keeps nothing here. Copies of the model (an EMA) and its state dict hold no trace of it.

    Args:
        model: a `DiT`, or any module whose forward runs a list of blocks; wrappers are looked through.
        layers: which blocks, by number (0-based, as `attribute_layers` counts them) or by the model's own name
            ("transformer_blocks.3"); None: all. Where a layer is a list of modules that the forward calls one by one,
            its state is what the first module of the next layer takes; the last such layer has none.
        state: where a block returns several tensors, which one is wanted: the name of the argument under which the next
            block takes it ("hidden_states"), or its position in the result. None: the only one that goes on.
        block_list: dotted name(s) of the block lists, in the order in which they run; None: those registered for the
            class, or the one under a usual name. Numbers are positions in these lists.
        inputs: a batch as `attribute_layers` takes it: blocks and numbers are then those that it scores by itself, also
            of several lists.
        copy: keep copies, for blocks that write into their input (an error says so, except in compiled code).

    Attributes:
        layers: the numbers, ascending. names: {number: the model's own name} of all blocks. block_list: the lists
            (of `inputs`: the blocks), or None for a `DiT`.

    Raises:
        ValueError: no block list, or a layer that does not exist; names what there is.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int | str] | None = None,
        state: str | int | None = None,
        block_list: str | Sequence[str] | None = None,
        copy: bool = False,
        inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if state is not None and (isinstance(state, bool) or not isinstance(state, str | int)):
            raise TypeError(f"state: expected the name of an argument or a position, got {state!r:.60}")
        if isinstance(model, nn.DataParallel):
            raise ValueError("model: nn.DataParallel copies the network in every forward: use DistributedDataParallel")
        self.model, self._prefix = unwrap(model), prefix_of(model)
        self.state, self.copy = state, copy
        self.attached = False
        self.block_list: list[str] | None = None
        self._native: NetworkTap | None = None
        self._taps: list[BlockTap] = []
        self._start = ForwardStart(self.model, self._taps)
        if isinstance(self.model, DiT):
            self.names = {layer: str(layer) for layer in range(self.model.depth)}
            self._native = NetworkTap(self.model, ())
        else:
            block_list = block_list or adapter_of(self.model).block_list
            if inputs is None:
                lists = block_lists(self.model, block_list)
                self.block_list = list(lists)
                named = [pair for members in lists.values() for pair in members]
            else:
                named = _scored_blocks(self.model, inputs, block_list)
                self.block_list = [name for name, _ in named]
            self.names = {layer: name for layer, (name, _) in enumerate(named)}
            place = [-1]
            for number, (_, block) in enumerate(named):
                block, before = unwrap(block), self._taps[-1] if self._taps else None
                if isinstance(block, nn.ModuleList):
                    self._taps.append(ListTap(block, before, number, place))
                else:
                    self._taps.append(BlockTap(block, before))
        if layers is None:
            layers = list(self.names)[: -1 if self._taps and isinstance(self._taps[-1], ListTap) else None]
        self.select(layers)

    def select(self, layers: Sequence[int | str]) -> None:
        """Keep the states of these layers from now on. A compiled model is compiled once more for each set."""
        self.layers = tuple(sorted(set(self.numbers(layers))))
        if not self.layers:
            raise ValueError("layers: expected at least one layer")
        last = len(self._taps) - 1
        if last in self.layers and isinstance(self._taps[last], ListTap):
            raise ValueError(
                f"layers: {self.names[last]!r} is a list of modules that the forward calls one by one, and no layer "
                f"follows that would take its state: choose among 0 to {last - 1}"
            )
        if self._native is not None:
            self._native.layers = self.layers
        for number, tap in enumerate(self._taps):
            # Nothing follows the last block: which of its results is which, the block before it tells.
            tap.keep = number in self.layers or (number == last - 1 and last in self.layers)
            tap.copy = self.copy
        self.clear()

    def numbers(self, layers: Sequence[int | str]) -> list[int]:
        """The numbers of layers that are given by number or name.

        Raises:
            TypeError, ValueError: no sequence, or a layer that does not exist; names what there is.
        """
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise TypeError(f"layers: expected a list of numbers or names, got {layers!r:.60}")
        numbers = {name: layer for layer, name in self.names.items()} | {layer: layer for layer in self.names}
        layers = [bare(x, self._prefix) if isinstance(x, str) else x for x in layers]
        for layer in layers:
            if isinstance(layer, bool) or layer not in numbers:
                raise ValueError(
                    f"layers: {type(self.model).__name__} has no layer {layer!r}, only 0 to {len(self.names) - 1} "
                    f"({self.names[0]!r} to {self.names[len(self.names) - 1]!r})"
                )
        return [numbers[layer] for layer in layers]

    @property
    def on(self) -> bool:
        """Whether states are kept; switched off, an attached model runs as it would without."""
        return self._intercepts()[0].on

    @on.setter
    def on(self, value: bool) -> None:
        for intercept in self._intercepts():
            intercept.on = value
        if not value:
            self.clear()

    def attach(self) -> HiddenStates:
        """Take part in the model's forward from now on; also entered by `with`."""
        if not self.attached:
            for intercept in self._intercepts():
                intercept.install()
            self.attached = True
        return self

    def detach(self) -> None:
        """Leave the model as it was."""
        if self.attached:
            for intercept in reversed(self._intercepts()):
                intercept.remove()
            self.attached = False
        self.clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.attached:  # the copy would take part in the forward of a copied model that nobody detaches
            raise TypeError(
                "HiddenStates and Aligner cannot be copied or pickled while they are attached: detach first, or make a "
                "new one for the copy, and save Aligner.state_dict()"
            )
        return super().__reduce_ex__(protocol)

    def __enter__(self) -> HiddenStates:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def clear(self) -> None:
        """Forget the states of the last forward."""
        for tap in self._taps if self._native is None else [self._native]:
            tap.clear()

    def _check_thread(self) -> None:
        taps = [self._native] if self._native is not None else [self._taps[layer] for layer in self.layers]
        if {tap.thread for tap in taps} - {None, threading.get_ident()}:
            raise ValueError(
                "hidden states: another thread has run the model's forward since: run forward and read (or the "
                "aligner's loss) in one thread, and no other forward between them"
            )

    def read(self) -> dict[int, Tensor]:
        """{layer: state} of the last forward, once: the next read needs another forward.

        Raises:
            ValueError: no forward since the last read; a forward without gradient, where gradients are recorded now, or
                in another thread; several results of a block without `state`, or none that it names.
        """
        if self._native is not None:
            states, with_grad = dict(self._native.states), self._native.with_grad
            if not states:
                self._refuse_missing(self.layers[0])
        else:
            states = {layer: self._pick(layer) for layer in self.layers}
            with_grad = all(self._taps[layer].with_grad for layer in self.layers)
        if not torch.compiler.is_compiling():
            self._check_thread()
        if torch.is_grad_enabled() and not with_grad:
            raise ValueError(
                "hidden states: the last forward recorded no gradient: read them (or ask for the aligner's loss) right "
                "after the training forward; activation checkpointing needs use_reentrant=False"
            )
        self.clear()
        return states

    def _intercepts(self) -> list[Any]:
        return [self._start, *self._taps] if self._native is None else [self._native]

    def _refuse_missing(self, layer: int) -> None:
        if not self.attached:
            raise ValueError("hidden states: not attached; use `with states:` around the forward, or states.attach()")
        if self._native is None and self._replaced(layer):
            raise ValueError(
                f"hidden states: another module has taken the place of {self.names[layer]} (layer {layer}): make a new "
                f"HiddenStates (or Aligner) of the changed model"
            )
        raise ValueError(
            f"hidden states: none of {self.names[layer]} (layer {layer}) since the last read: run the model's forward "
            "before each read"
        )

    def _replaced(self, layer: int) -> bool:
        """Whether the block that was tapped is no longer a part of the model."""
        block = self._taps[layer].module
        return all(unwrap(module) is not block for module in self.model.modules())

    def _pick(self, layer: int) -> Tensor:
        tap = self._taps[layer]
        if tap.output is None:
            self._refuse_missing(layer)
        results = results_of(tap.output)
        if len(results) == 1 and (self.state is None or isinstance(tap.output, Tensor)):
            return self._unchanged(tap, *results)
        names = tap.goes_on
        if not names and tap.before is not None and layer == len(self._taps) - 1:
            names = tap.before.goes_on
        key = self.state
        if isinstance(key, str):
            key = names.get(key, key)  # of a mapping, its own keys are names as well
        elif key is None and len(set(names.values()) & set(results)) == 1:
            [key] = set(names.values()) & set(results)
        if key is None or key not in results:
            raise ValueError(self._options(layer, results, names))
        return self._unchanged(tap, key)

    def _unchanged(self, tap: BlockTap, key: Any) -> Tensor:
        """A result as the block returned it."""
        if self.copy:
            return tap.copies[key]
        state = results_of(tap.output)[key]
        if tap.versions and tap.versions[key] != version_of(state):
            raise ValueError(
                f"{self.names[self._taps.index(tap)]}: what follows it writes into its result: use "
                "HiddenStates(..., copy=True)"
            )
        return state

    def _options(self, layer: int, results: Mapping[Any, Tensor], names: Mapping[str, Any]) -> str:
        by_key = {key: name for name, key in names.items()}
        options = ", ".join(
            f"{by_key[key]!r} (result {key!r}, {list(value.shape)})"
            if key in by_key
            else f"{key!r} {list(value.shape)}"
            for key, value in results.items()
        )
        wanted = "" if self.state is None else f", none of which is {self.state!r}"
        return (
            f"state: {self.names[layer]} (layer {layer}) returns {options or 'no tensor'}{wanted}: "
            "choose one by name or position, as HiddenStates(..., state=...)"
        )
