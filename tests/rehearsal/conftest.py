"""Fake CUDA tensors, and autograd's backward pass on them.

The tensors are those of FakeTensorMode, which have shapes, dtypes and devices and no values. Autograd's engine asks a
driver for the device's streams, so `backward` calls the nodes of its graph one by one; they compute the same as in the
engine.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ops(TorchDispatchMode):
    """The names of the library's ops that run."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function.overloadpacket._qualified_op_name.partition("::")
        if namespace == "agrepa_fast":
            self.seen.add(name)
        if name.startswith("_foreach_"):  # their fake forms do not compare devices
            devices = {value.device for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
            assert len(devices) <= 1, f"{name}: tensors on {devices}"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def ops():
    """On a fake CUDA device: new tensors are there, and the fused ops are the kernels' (their fake forms)."""
    with FakeTensorMode(), Ops() as recorded, torch.device("cuda"):
        yield recorded


def deep_copy(tensor: Tensor, memo: dict[int, Tensor]) -> Tensor:
    """`copy.deepcopy` of a fake tensor, whose storage cannot be copied."""
    if id(tensor) not in memo:
        fresh = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fresh
    return memo[id(tensor)]


@pytest.fixture
def fake_copies(monkeypatch):
    """Let fake tensors be copied by `copy.deepcopy`."""
    for kind in (Tensor, nn.Parameter):
        monkeypatch.setattr(kind, "__deepcopy__", deep_copy)


@pytest.fixture
def backward():
    return walk_back


def walk_back(*outputs: Tensor) -> list[Tensor]:
    """Add the gradients of the leaves to their `grad`, for outputs whose gradients are ones; returns the leaves."""
    arrived: dict = {}  # {node: [gradient of each of its outputs]}
    leaves = []
    for output in outputs:
        add(arrived, output.grad_fn, output.output_nr, torch.ones_like(output))
    with torch.no_grad():
        for node in in_order([output.grad_fn for output in outputs]):
            gradients = arrived.pop(node, None)
            if gradients is None:
                continue
            if hasattr(node, "variable"):
                leaf, gradient = node.variable, gradients[0]
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
                leaves.append(leaf)
                continue
            if hasattr(node, "_forward_cls"):  # written in Python; as if it had not declined zeros
                gradients = [
                    torch.zeros(meta.shape, dtype=meta.dtype) if gradient is None else gradient
                    for gradient, meta in zip(gradients, node._input_metadata, strict=True)
                ]
            results = node.apply(*gradients) if hasattr(node, "_forward_cls") else node(*gradients)
            results = results if isinstance(results, tuple) else (results,)
            for (following, place), result in zip(node.next_functions, results):
                if following is not None and result is not None:
                    add(arrived, following, place, result)
    return leaves


def add(arrived: dict, node, place: int, gradient: Tensor) -> None:
    metadata = node._input_metadata
    wanted = metadata[place]
    assert gradient.device == wanted.device, f"{node.name()}: a gradient on {gradient.device}, not {wanted.device}"
    gradient = gradient.sum_to_size(tuple(wanted.shape)).to(wanted.dtype)
    slots = arrived.setdefault(node, [None] * len(metadata))
    slots[place] = gradient if slots[place] is None else slots[place] + gradient


def in_order(roots) -> list:
    """The nodes, each before those that it passes gradients to."""
    order, seen, ahead = [], set(), [(node, False) for node in roots]
    while ahead:
        node, done = ahead.pop()
        if done:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            ahead.append((node, True))
            ahead += [(following, False) for following, _ in node.next_functions]
    return order[::-1]
