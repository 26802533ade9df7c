"""The largest problems of the bench on a GPU, on paper: what each holds at once fits a card of 80 GB.

The tensors are fake: they have a size and no memory. Everything that a problem does runs on them, provider by provider,
as the runner builds them. Where fake tensors cannot follow, more is reckoned than a GPU needs: a backward keeps the
whole graph while it makes the gradients, and what compilation fuses away is there.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agrepa_fast.attribution import graph
from agrepa_fast.attribution import runner as attribution
from agrepa_fast.bench.case import Problem, Unavailable
from agrepa_fast.bench.cases import CASES, foga
from agrepa_fast.bench.gated import with_again
from agrepa_fast.training.step import TrainStep

CARD = 80e9
FREE = 0.9 * CARD  # the rest is CUDA's own, libraries' workspaces, the cache's buffer, and gaps between blocks
CUDA = torch.device("cuda")


class Memory(TorchDispatchMode):
    """Bytes of the fake tensors that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.device.type == "cuda":
                self._count(value.untyped_storage())
        return out

    def _count(self, storage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.held += self._sizes[key]
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.held -= self._sizes.pop(key)


class HostReads(TorchFunctionMode):
    """Answers what the host asks of values that are not there; a mask picks all rows."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__bool__:
            return True
        if function is Tensor.item:
            return 1.0
        if function is Tensor.__getitem__:
            first, *rest = args[1] if isinstance(args[1], tuple) else (args[1],)
            if isinstance(first, Tensor) and first.dtype == torch.bool:
                return args[0][(slice(None), *rest)].clone()
        return function(*args, **(kwargs or {}))


class Attention(torch.autograd.Function):
    """What a fused attention keeps; without a device torch would take the form that writes the scores out."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def backward(loss: Tensor, *_, **__) -> None:
    """Gradients of all parameters, while the graph is still there."""
    seen, ahead = set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            node.variable.grad = torch.empty_like(node.variable)
        ahead += [following for following, _ in node.next_functions]


def adamw(optimizer: torch.optim.Optimizer, *_) -> None:
    """The two moments of every parameter that has a gradient."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p not in optimizer.state:
                optimizer.state[p] = {"exp_avg": torch.empty_like(p), "exp_avg_sq": torch.empty_like(p)}


def converted(module: nn.Module, *wanted) -> nn.Module:
    """`module.to`: fake parameters cannot be changed in place, so they are replaced."""
    dtypes = [value for value in wanted if isinstance(value, torch.dtype)]
    for part in module.modules() if dtypes else ():
        for table in (part._parameters, part._buffers):
            for name, value in table.items():
                if value is not None and value.is_floating_point():
                    cast = value.detach().to(dtypes[0])
                    table[name] = nn.Parameter(cast) if table is part._parameters else cast
    return module


class Generator(torch.Generator):
    """A generator of the fake device; one of a real device needs a driver."""

    def __new__(cls, device=None):
        return super().__new__(cls, "cpu")

    def __deepcopy__(self, memo):
        return self


@pytest.fixture
def paper(monkeypatch, fake_copies) -> Iterator[Memory]:
    monkeypatch.setattr(nn.Module, "to", converted)
    monkeypatch.setattr(nn.Module, "double", lambda module: converted(module, torch.float64))
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", lambda outputs, inputs, *_, **__: tuple(map(torch.empty_like, inputs)))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.optim.AdamW, "step", adamw)
    monkeypatch.setattr(torch.random, "fork_rng", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(graph, "why_not", lambda *_: "a fake device records nothing")
    attend = lambda q, k, v, **_: Attention.apply(q, k, v)  # noqa: E731
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch, "Generator", Generator)
    # A recording holds the memory of one step, as a step does; the warm-up's is free by then.
    monkeypatch.setattr(TrainStep, "_replay", lambda step, inputs: step._run([inputs]))
    with FakeTensorMode(), CUDA, HostReads(), Memory() as memory:
        yield memory


def on_paper(problem: Problem, memory: Memory) -> dict[str, int]:
    """{provider: the most bytes that were held while it was built and called}.

    Without graphs and compilation, what a name adds to another provider's is left out where one is built at a time."""
    setup = problem.build(CUDA)
    outputs = setup.reference()
    peaks = {"reference": memory.peak}
    calls = []
    for provider in with_again(setup):
        if provider.name == "captum" or (problem.alone and ("compiled" in provider.name or provider.role == "again")):
            continue  # captum reads its masks; it holds one forward, as the loops do
        memory.peak = memory.held
        with contextlib.suppress(Unavailable):
            call = provider.make()
            call()
            calls += [] if problem.alone else [call]
            del call
        gc.collect()
        peaks[provider.name] = memory.peak
    del outputs
    return peaks


def largest(case: str) -> Problem:
    """The problem of a case that moves most, among those whose providers are all in memory and among the others."""
    return max(CASES[case].problems("full", CUDA), key=lambda problem: (problem.alone, problem.bytes or 0))


PROBLEMS = {case: largest(case) for case in ("residual", "pooling", "alignment", "foga", "train_step", "trainer")}


@pytest.mark.parametrize("case", PROBLEMS)
def test_the_largest_problem_fits_a_card(paper, monkeypatch, case):
    def two_forwards(network, inputs, host_sync=False, run_block=None):  # as the loop over all layers, in less time
        with torch.no_grad():
            base, _ = network(**inputs, run_block=run_block)
            velocity, _ = network(**inputs, run_block=run_block, skip=0)
            return (velocity - base).square().mean((-2, -1))

    monkeypatch.setattr(foga, "foga_loop", two_forwards)
    monkeypatch.setattr(foga, "_graphed", lambda run: run)
    monkeypatch.setattr(attribution, "check_finite", lambda *_: None)
    peaks = on_paper(PROBLEMS[case], paper)
    assert {"ours", "reference"} <= peaks.keys()
    too_much = {name: f"{peak / 1e9:.0f} GB" for name, peak in peaks.items() if peak > FREE}
    assert not too_much
    if case == "train_step":  # the paper is no blank sheet: the released form keeps attention's weights for backward
        assert peaks["released form, float32"] > 50e9
        assert peaks["ours"] < peaks["SDPA form"] < peaks["released form, float32"]


class OnHost(TorchDispatchMode):
    """Bytes of the largest tensor that is made on the host."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [v.nbytes for v in tree_leaves(out) if isinstance(v, Tensor) and v.device.type == "cpu"]
        self.largest = max(self.largest, *sizes, 0)
        return out


@pytest.mark.parametrize("case", ["foga", "train_step"])
def test_networks_are_made_on_the_device(monkeypatch, fake_copies, case):
    """One core takes many seconds for the random weights of the paper's network, and each provider has its own."""
    monkeypatch.setattr(foga, "_graphed", lambda run: run)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(nn.Module, "to", converted)
    with FakeTensorMode(), OnHost() as host:
        for provider in PROBLEMS[case].build(CUDA).providers:
            with contextlib.suppress(Unavailable):
                provider.make()
    assert host.largest < 10_000


def test_the_paper_counts_what_is_alive(paper):
    x = torch.randn(1000, 1000)
    y = x + 1
    del x
    z = y @ y
    assert (paper.held, paper.peak) == (8_000_000, 8_000_000)
    view = z[:10]
    del y, z
    assert (paper.held, len(view)) == (4_000_000, 10)
