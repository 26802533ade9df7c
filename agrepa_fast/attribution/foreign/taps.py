"""Taps keep the states of a network's blocks during its forward, and `HiddenStates` reads them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...models.dit import DiT
from .intercept import Intercept, forward_signature, records


class BlockTap(Intercept):
    """Keeps what a block returns, and which of its results go on to the next block under which argument's name."""

    def __init__(self, module: nn.Module, before: BlockTap | None) -> None:
        super().__init__(module)
        self.before = before
        self.keep = False
        self.copy = False
        self.parameters: list[str] = []
        self.clear()

    def install(self) -> None:
        self.parameters = list(forward_signature(self.module).parameters)
        super().install()

    def clear(self) -> None:
        self.output: Any = None
        self.copies: dict[Any, Tensor] = {}
        self.versions: dict[Any, int] = {}
        self.goes_on: dict[str, Any] = {}
        self.with_grad = False
        self.thread: int | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recording = self.on and records()
        if recording and self.before is not None:
            self.before.note({**dict(zip(self.parameters, args)), **kwargs})
        output = self.own(*args, **kwargs)
        if recording and self.keep:
            self.output, self.with_grad = output, torch.is_grad_enabled()
            self.keep_versions()
            self.thread = current_thread()
        return output

    def keep_versions(self) -> None:
        """Copy what is kept, or note its version, which tells later whether it was written into."""
        if self.copy:
            self.copies = {key: value.clone() for key, value in results_of(self.output).items()}
        elif not torch.compiler.is_compiling():
            self.versions = {key: version_of(value) for key, value in results_of(self.output).items()}

    def note(self, arguments: Mapping[Any, Any]) -> None:
        """Which of the results kept are the next block's arguments."""
        results = results_of(self.output)
        if len(results) > 1:
            self.goes_on = {
                name: key
                for name, value in arguments.items()
                for key, result in results.items()
                if isinstance(value, Tensor) and value is result
            }


class ListTap(BlockTap):
    """Stands for a layer that is a list of modules, which the forward calls one by one.

    No module returns its state. What the first module of the next layer takes is kept; nothing follows the last layer.

    Args:
        place: the position of the layer that runs, [number], shared by all taps of a network.
    """

    def __init__(self, module: nn.ModuleList, before: BlockTap | None, number: int, place: list[int]) -> None:
        super().__init__(module, before)
        self.number, self.place = number, place
        self.parts = [PartTap(part, self) for part in _called(module)]

    def install(self) -> None:
        for part in self.parts:
            part.install()
        self.installed = True

    def remove(self) -> None:
        for part in reversed(self.parts):
            part.remove()
        self.installed = False

    def enter(self, arguments: Sequence[Any]) -> None:
        """A module of this layer is called; the first one takes the state of the layer before."""
        if self.place[0] != self.number:
            self.place[0] = self.number
            if self.before is not None:
                self.before.note(dict(enumerate(arguments)))

    def note(self, arguments: Mapping[Any, Any]) -> None:
        """Keep the first tensor that the next layer takes."""
        if self.keep:
            self.output = next((value for value in arguments.values() if isinstance(value, Tensor)), None)
            self.with_grad = torch.is_grad_enabled()
            self.keep_versions()
            self.thread = current_thread()


class PartTap(Intercept):
    """Tells a layer that is a list of modules when one of them is called."""

    def __init__(self, module: nn.Module, layer: ListTap) -> None:
        super().__init__(module)
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.on and self.layer.on and records():
            self.layer.enter((*args, *kwargs.values()))
        return self.own(*args, **kwargs)


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of a list, also of lists in it, which no forward calls themselves."""
    for part in module.children():
        if isinstance(part, nn.ModuleList):
            yield from _called(part)
        else:
            yield part


class ForwardStart(Intercept):
    """Drops the states of the forward before, and those of a forward that ends in an exception."""

    def __init__(self, module: nn.Module, taps: Sequence[BlockTap]) -> None:
        super().__init__(module)
        self.taps = taps

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recording = self.on and records()
        if recording:
            self._drop()
        if torch.compiler.is_compiling():
            return self.own(*args, **kwargs)
        try:
            return self.own(*args, **kwargs)
        except BaseException:
            if recording:
                self._drop()
            raise

    def _drop(self) -> None:
        for tap in self.taps:
            if tap.keep:
                tap.output = None


class NetworkTap(Intercept):
    """Asks a `DiT`, which returns hidden states itself, for those of some layers."""

    def __init__(self, module: DiT, layers: Sequence[int]) -> None:
        super().__init__(module)
        self.layers = tuple(layers)
        self.clear()

    def clear(self) -> None:
        self.states: dict[int, Tensor] = {}
        self.with_grad = False
        self.thread: int | None = None

    def __call__(self, *args: Any, hidden_layers: Sequence[int] | None = None, **kwargs: Any) -> Any:
        if len(args) > 4:
            *args, hidden_layers = args  # type: ignore[assignment]
        if not self.on:
            return self.own(*args, hidden_layers=hidden_layers, **kwargs)
        self.states = {}  # as `ForwardStart` does
        velocity, states = self.own(*args, hidden_layers=(*self.layers, *(hidden_layers or ())), **kwargs)
        self.states, self.with_grad = {layer: states[layer] for layer in self.layers}, torch.is_grad_enabled()
        self.thread = current_thread()
        if hidden_layers is None:
            return velocity
        return velocity, {layer: states[layer] for layer in hidden_layers}


def current_thread() -> int | None:
    """The thread that runs this; None in compiled code, which cannot tell."""
    return None if torch.compiler.is_compiling() else threading.get_ident()


def version_of(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def results_of(output: Any) -> dict[Any, Any]:
    """The tensors that a block returns, by position or key."""
    if isinstance(output, Tensor):
        return {0: output}
    if isinstance(output, Mapping):
        return {key: value for key, value in output.items() if isinstance(value, Tensor)}
    if isinstance(output, tuple | list):
        return {key: value for key, value in enumerate(output) if isinstance(value, Tensor)}
    return {}
