"""One thread; Hypothesis' settings; registries of one test; a stand-in for the streams, graphs and pools of CUDA.

The stand-in runs the control flow of a GPU run without a GPU. It keeps the rules that a GPU enforces: a recording
computes nothing, a replay writes into the memory of the recording, a pool dies with its last graph, and nothing may be
compiled while recording. It cannot know what a kernel computes.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

from agrepa_fast import graphs
from agrepa_fast.attribution.foreign import register as adapter_registry
from agrepa_fast.teachers import registry as teacher_registry

try:
    import hypothesis
except ModuleNotFoundError:  # a machine with a GPU may have little more than torch, Triton and pytest
    pass
else:
    # Timings say nothing on a loaded machine; and what continuous integration tries is the same in every run.
    hypothesis.settings.register_profile("agrepa", deadline=None, derandomize=bool(os.environ.get("CI")))
    hypothesis.settings.load_profile("agrepa")


class Stream:
    """Work on it runs at once; it keeps the order in which it was told to wait."""

    def __init__(self, device=None, **options):
        self.device = device
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


class Graph:
    """What torch.cuda.CUDAGraph does for its callers."""

    def __init__(self):
        self.work = self.pool_id = None
        self.generators = []
        self.replays = 0

    def register_generator_state(self, generator):
        assert self.pool_id is None, "a generator is registered before the recording begins"
        self.generators.append(generator)

    def pool(self):
        assert self.pool_id is not None, "a graph has a pool once it has been recorded"
        return self.pool_id

    def replay(self):
        self.replays += 1
        if self.work is None:
            return
        fresh = self.work()
        with torch.no_grad():
            for kept, value in zip(tree_leaves(self.output), tree_leaves(fresh), strict=True):
                if isinstance(kept, Tensor):
                    kept.copy_(value)


class Cuda:
    """The fake device: `streams` and `living` graphs; `recordings` and `compiled` count.

    state: returns the tensors that the recorded work changes. A recording must not compute, so they are put back after
    the work has run in it.
    """

    def __init__(self):
        self.default = Stream()
        self.current = self.default
        self.streams: list[Stream] = []
        self.living: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.recordings = 0
        self.compiled_while_recording = 0
        self.recording = False
        self.fail_with: Exception | None = None
        self.state: Callable[[], Iterable[Tensor]] = tuple
        self.replays_compute = True  # False where a test is about what a graph keeps alive
        self._pools = 0

    def new_stream(self, *arguments, **options):
        self.streams.append(Stream(*arguments, **options))
        return self.streams[-1]

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def record(self, graph, work, device, pool):
        assert not self.recording, "one recording at a time"
        if pool is not None and pool not in {other.pool_id for other in self.living}:
            raise RuntimeError("INTERNAL ASSERT FAILED: use_count > 0")  # as torch refuses the pool of a dead graph
        self._pools += pool is None
        self.recordings += 1
        held = [(tensor, tensor.clone()) for tensor in self.state()]
        random, own = torch.get_rng_state(), [(g, g.get_state()) for g in graph.generators]
        compiled = counters["stats"]["unique_graphs"]
        self.recording = True
        try:
            with self.stream(graphs.side_stream(device)):
                graph.output = work()
            if self.fail_with is not None:
                raise self.fail_with
        finally:
            self.recording = False
            self.compiled_while_recording += counters["stats"]["unique_graphs"] - compiled
            torch.set_rng_state(random)
            for generator, state in own:
                generator.set_state(state)
            with torch.no_grad():
                for tensor, value in held:
                    tensor.copy_(value)
        # A real graph holds addresses, not the Python objects behind the work.
        graph.work = work if self.replays_compute else None
        graph.pool_id = self._pools if pool is None else pool
        self.living.add(graph)
        return graph.output


# Equal bits are compared, and with more threads sums round otherwise. Here for fixtures that serve several tests.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread():
    """A run of the trainer sets the threads of its process."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_verdicts(tmp_path_factory):
    """What is remembered of checked files stays out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGREPA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_registries(monkeypatch):
    """What a test registers is forgotten after it, so that tests do not depend on their order."""
    monkeypatch.setattr(teacher_registry, "_FACTORIES", dict(teacher_registry._FACTORIES))
    monkeypatch.setattr(adapter_registry, "_ADAPTERS", dict(adapter_registry._ADAPTERS))


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    fake = Cuda()
    monkeypatch.setattr(torch.cuda, "Stream", fake.new_stream)
    monkeypatch.setattr(torch.cuda, "stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: fake.current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(graphs, "_record", fake.record)
    graphs._stream.cache_clear()
    yield fake
    graphs._stream.cache_clear()
