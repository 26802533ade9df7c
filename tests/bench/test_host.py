"""The host-time measurement times the kernels' eager path, not the reference and not the dispatcher."""

from __future__ import annotations

import re

import torch

from agrepa_fast.bench import host
from agrepa_fast.kernels.launch import record
from agrepa_fast.ops import dispatch, library


def test_every_call_launches_its_kernels_past_the_dispatcher(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    seen = []
    eager = library.eager
    monkeypatch.setattr(library, "eager", lambda x: seen.append(eager(x)) or seen[-1])
    found = {}
    for name, call in host.calls(torch.device("cpu")).items():
        with record("portable") as recording:
            call()
        found[name] = [launch.kernel.__name__ for launch in recording.launches]
    assert all(seen)
    assert found.pop("gated_residual_norm, forward and backward") == [
        "_forward_kernel",
        "_backward_kernel",
        "_sum_kernel",
    ]
    assert found.pop("masked_mean") == ["_mean_kernel"]
    assert found.pop("velocity_delta") == ["_delta_kernel", "_delta_sum_kernel"]
    assert set(map(tuple, found.values())) == {("_forward_kernel",)}


def test_the_printed_figures_are_the_measured_ones(monkeypatch, capsys) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", dispatch.INTERPRETED)
    monkeypatch.setattr(host, "measure", lambda device: {"one": (12.34, 0.5), "two": (100.0, 7.0)})
    host.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [re.sub(r"\s+", " ", line.strip()) for line in lines] == ["12.3 +- 0.5 one", "100.0 +- 7.0 two"]


def test_a_slower_call_measures_slower(monkeypatch) -> None:
    monkeypatch.setattr(host, "ROUNDS", 5)
    monkeypatch.setattr(host, "CALLS", 20)

    def work(n):
        return lambda: sum(range(n))

    monkeypatch.setattr(host, "calls", lambda device: {"short": work(100), "long": work(10_000)})
    found = host.measure(torch.device("cpu"))
    assert found["long"][0] > 10 * found["short"][0] > 0
