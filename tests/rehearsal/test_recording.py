"""`graphs.Recording`: what is refused while recording, streams, pools, and what is left after a failure."""

from __future__ import annotations

import contextlib
import inspect
import subprocess
import sys

import pytest
import torch

from agrepa_fast import graphs

DEVICE = torch.device("cuda", 0)
ORIGINAL_GRAPH = torch.cuda.graph


def test_one_side_stream_serves_every_warm_up_and_every_recording(cuda):
    ran_on = []
    for _ in range(5):
        graphs.run_aside(lambda: ran_on.append(cuda.current), DEVICE)
    graphs.Recording(lambda: ran_on.append(cuda.current), DEVICE)
    graphs.run_aside(lambda: ran_on.append(cuda.current), torch.device("cuda"))  # the current device, which is 0
    assert len(cuda.streams) == 1
    assert set(ran_on) == set(cuda.streams)
    assert cuda.current is cuda.default
    [aside] = cuda.streams
    assert aside.waited_for == [cuda.default] * 6  # the work behind it comes first,
    assert cuda.default.waited_for == [aside] * 6  # and what comes after waits for the work


def test_a_replay_writes_into_the_memory_of_the_recording(cuda):
    x = torch.ones(3)
    recording = graphs.Recording(lambda: 2 * x, DEVICE)
    output = recording.output
    x.fill_(5.0)
    assert output.equal(torch.full((3,), 2.0))
    recording.replay()
    assert recording.output is output
    assert output.equal(torch.full((3,), 10.0))


def test_what_would_compile_while_recording_raises_instead(cuda):
    torch._dynamo.reset()
    double = torch.compile(lambda x, y: x + y, backend="eager", dynamic=False)
    one, other = torch.ones(3), torch.ones(3)
    double(one, one)
    graphs.Recording(lambda: double(one, one), DEVICE)
    with pytest.raises(RuntimeError, match=r"cannot be recorded as a CUDA graph: .*recompile"):
        graphs.Recording(lambda: double(one, other), DEVICE)  # two tensors where there was one: another guard
    assert cuda.compiled_while_recording == 0
    double(one, other)  # outside a recording it compiles as ever
    torch._dynamo.reset()


def test_a_failed_recording_puts_the_stream_back_and_says_so(cuda):
    cuda.fail_with = RuntimeError("operation not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph: operation not permitted"):
        graphs.Recording(lambda: None, DEVICE)
    assert cuda.current is cuda.default
    assert len(cuda.living) == 0


def test_the_fake_refuses_a_dead_pool_as_torch_does(cuda):
    """The rule that the step's test rests on."""
    first = graphs.Recording(lambda: None, DEVICE)
    second = graphs.Recording(lambda: None, DEVICE, pool=first)
    assert second.graph.pool() == first.graph.pool()
    dead = first.graph.pool()
    del first, second
    with pytest.raises(RuntimeError, match="use_count"):
        cuda.record(torch.cuda.CUDAGraph(), lambda: None, DEVICE, dead)


def test_other_threads_may_use_cuda_while_recording(monkeypatch):
    """The data loader's thread pins the next batch meanwhile, which torch's default mode takes for an error."""
    given = []

    @contextlib.contextmanager
    def graph(recorded, **options):
        given.append((recorded, options))
        yield

    current, aside = object(), object()
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(graphs, "side_stream", lambda device: aside)
    assert graphs._record("graph", lambda: 3, DEVICE, (0, 7)) == 3
    assert given == [("graph", {"pool": (0, 7), "stream": aside, "capture_error_mode": "thread_local"})]
    # The real one takes these options.
    assert given[0][1].keys() <= inspect.signature(ORIGINAL_GRAPH).parameters.keys()


def test_a_recording_does_not_import_the_compiler():
    """It takes seconds, and a probe needs none."""
    code = "import sys, agrepa_fast.graphs as g; g._compiling_refused(); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
