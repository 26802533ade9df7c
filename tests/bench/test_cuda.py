"""How work on a GPU is timed, with a stand-in for CUDA: one timer, a cold cache, graphs' memory, captures that fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agrepa_fast import graphs
from agrepa_fast.bench import cli, gated, protocol, results, runner
from agrepa_fast.bench.case import Problem, Provider, Setup
from agrepa_fast.bench.cases import CASES, foga, residual, sampler, train_step
from agrepa_fast.bench.protocol import CaptureFailed, ColdCache, Effort, Timing, measure_cuda
from agrepa_fast.bench.published import PublishedDiT, published, random_dit
from agrepa_fast.bench.targets import TARGETS

CPU = torch.device("cpu")
EFFORT = Effort(0.0, 3, 3)
LAUNCH = 30e-6


class Clock:
    """The device's time. A call costs its own time, and its launch where Python launches it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.replaying = False

    def call(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds + (0.0 if self.replaying else LAUNCH)

        return run


@pytest.fixture
def clock(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """CUDA events that read the clock; a small L2."""
    clock = Clock()

    class Event:
        def __init__(self, **_: Any) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = clock.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    replay = graphs.Recording.replay

    def replayed(self: graphs.Recording) -> None:
        clock.replaying = True
        replay(self)
        clock.replaying = False

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1 << 20))
    monkeypatch.setattr(graphs.Recording, "replay", replayed)
    monkeypatch.setattr(cuda.default, "synchronize", lambda: None, raising=False)
    return clock


def test_one_timer_for_all_that_can_be_captured(cuda: Any, clock: Clock) -> None:
    """A rival that takes longer than the limit is replayed too where ours is short; its launches are no work."""
    variants = {"ours": clock.call(20e-6), "rival": clock.call(150e-6), "waits": clock.call(40e-6)}
    timings = measure_cuda(variants, CPU, EFFORT, frozenset({"ours", "rival"}))
    assert {name: t.timer for name, t in timings.items()} == {"ours": "graph", "rival": "graph", "waits": "events"}
    assert timings["ours"].median == pytest.approx(20e-6)
    assert timings["rival"].median == pytest.approx(150e-6)
    assert timings["waits"].median == pytest.approx(40e-6 + LAUNCH)
    assert timings["ours"].eager == pytest.approx((20e-6 + LAUNCH,) * 3)
    assert cuda.recordings == 2
    assert len(cuda.streams) == 1


def test_long_work_is_not_captured(cuda: Any, clock: Clock) -> None:
    variants = {"ours": clock.call(110e-6), "rival": clock.call(150e-6), "waits": clock.call(10e-6)}
    timings = measure_cuda(variants, CPU, EFFORT, frozenset({"ours", "rival"}))
    assert {t.timer for t in timings.values()} == {"events"}
    assert cuda.recordings == 0


def test_a_row_that_cannot_be_captured_is_compared_with_the_eager_call_of_ours() -> None:
    rows = {
        name: gated.empty_row(Provider(name, role, list))  # type: ignore[arg-type]
        for name, role in (("ours", "ours"), (gated.AGAIN, "again"), ("captured", "rival"), ("waits", "rival"))
    }
    graph = Timing((10.0,) * 3, 10, "graph", (40.0,) * 3)
    timings = {
        "ours": graph,
        gated.AGAIN: graph,
        "captured": Timing((20.0,) * 3, 10, "graph", (50.0,) * 3),
        "waits": Timing((80.0,) * 3, 1, "events"),
    }
    runner._entry(rows, timings)
    assert rows["captured"]["speedup"] == 2.0
    assert rows["waits"]["speedup"] == 2.0


def test_the_cache_is_flushed_by_reading(clock: Clock) -> None:
    """All of a buffer twice as large as the cache is read, and nothing larger than a number is written."""
    written: list[int] = []
    read: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for argument, value in zip(function._schema.arguments, args):
                if isinstance(value, torch.Tensor):
                    changed = argument.alias_info is not None and argument.alias_info.is_write
                    (written if changed else read).append(value.nbytes)
            written.extend(v.nbytes for v in (kwargs or {}).values() if isinstance(v, torch.Tensor))
            return function(*args, **(kwargs or {}))

    cold = ColdCache(CPU)
    with Watch():
        cold()
    assert read == [64 << 20]
    assert sum(written) <= 4


def test_a_replay_needs_the_pool_of_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [
        {"device": 0, "segment_pool_id": (0, 0), "total_size": 5000},
        {"device": 0, "segment_pool_id": (0, 7), "total_size": 300},
        {"device": 0, "segment_pool_id": (0, 7), "total_size": 40},
        {"device": 0, "segment_pool_id": (0, 8), "total_size": 1},
        {"device": 1, "segment_pool_id": (0, 7), "total_size": 9000},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 102)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
    device = torch.device("cuda", 0)
    assert protocol.peak_bytes(lambda: None, device, {(0, 7)}) == 342
    assert protocol.peak_bytes(lambda: None, device) == 2
    found = iter([{}, {(0, 7): 340}])
    monkeypatch.setattr(protocol, "private_pools", lambda _: next(found))
    setup = Setup((Provider("ours", "ours", lambda: lambda: (torch.ones(2),)),), lambda: (torch.ones(2),), {"y": 1e-6})
    admitting = gated.Gated(setup, device, runner.Deadline(None))
    assert admitting.admit(setup.providers[0]) is not None
    assert admitting.pools["ours"] == {(0, 7)}


def test_a_failed_capture_names_its_provider(cuda: Any, clock: Clock) -> None:
    cuda.fail_with = RuntimeError("operation not permitted when stream is capturing")
    with pytest.raises(CaptureFailed, match=r"ours cannot be captured .*: .*not permitted") as caught:
        measure_cuda({"ours": clock.call(20e-6)}, CPU, EFFORT, frozenset({"ours"}))
    assert caught.value.name == "ours"


def _problem(key: int, *providers: Provider) -> Problem:
    ours = Provider("ours", "ours", lambda: lambda: (torch.ones(2),))
    setup = Setup((ours, *providers), lambda: (torch.ones(2),), {"y": 1e-6})
    return Problem({"n": key}, "float32", None, None, lambda device: setup)


def test_after_a_failed_capture_a_new_process_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was measured, and without that capture; the old process measures nothing more."""

    def broken() -> Any:
        raise CaptureFailed("graphed", "not permitted")

    problems = [_problem(1), _problem(2, Provider("graphed", "rival", broken)), _problem(3)]
    out = tmp_path / "r.json"

    class Replaced(Exception):
        pass

    started: list[list[str]] = []

    def execv(_: str, arguments: list[str]) -> None:
        started.append(arguments)
        raise Replaced

    monkeypatch.setattr("os.execv", execv)
    monkeypatch.setattr(cli.CASES["demo"], "problems", lambda scale, device: problems)
    command = ["run", "demo", "--toy", "--device", "cpu", "--out", str(out)]
    with pytest.raises(Replaced):
        cli.main(command)
    assert [p["key"] for p in results.read(out)["problems"]] == ["n=1"]
    [arguments] = started
    assert arguments[1:3] == ["-m", "agrepa_fast.bench"]
    assert arguments[arguments.index("--barred") + 1 :][:3] == ["demo", "n=2", "graphed"]
    assert cli.main(arguments[3:]) == 0
    result = results.read(out)
    assert [p["key"] for p in result["problems"]] == ["n=1", "n=2", "n=3"]
    [row] = [row for row in result["problems"][1]["rows"] if row["provider"] == "graphed"]
    assert row["status"] == "failed"
    assert "not permitted" in row["reason"]


def test_without_a_new_process_nothing_more_is_measured(tmp_path: Path) -> None:
    def broken() -> Any:
        raise CaptureFailed("graphed", "not permitted")

    problems = [_problem(2, Provider("graphed", "rival", broken)), _problem(3)]
    result = cli.run({"demo": problems}, CPU, "toy", tmp_path / "r.json")
    assert result["problems"] == []
    assert [item["key"] for item in result["skipped"]] == ["n=2", "n=3"]
    assert all("nothing more can be trusted in this process" in item["reason"] for item in result["skipped"])


def test_a_barred_provider_that_can_run_eagerly_does() -> None:
    barred = {"rival": "not permitted", gated.AGAIN: "not permitted"}
    rival = Provider("rival", "rival", list, capturable=True)  # type: ignore[arg-type]
    ours = Provider("ours", "ours", list, capturable=True)  # type: ignore[arg-type]
    kept = gated.without_broken(Setup((ours, rival), tuple, {}), barred)  # type: ignore[arg-type]
    assert [provider.capturable for provider in kept.providers] == [False, False]


# What the rivals are.


def small() -> tuple[PublishedDiT, dict[str, torch.Tensor]]:
    network = published(random_dit(foga.TOY), keep_weights=False).eval()
    return network, foga.draw_inputs(foga.TOY, 2, 16, CPU)


def test_a_forward_of_the_rivals_takes_nothing_from_the_host() -> None:
    """A table made or kept on the CPU is copied in every forward: a wait, and no capture."""

    class Devices(TorchDispatchMode):
        seen: set[str] = set()  # noqa: RUF012

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            tensors = [v for v in tree_leaves((args, kwargs, out)) if isinstance(v, torch.Tensor)]
            self.seen |= {tensor.device.type for tensor in tensors}
            return out

    network, inputs = small()
    network.to("meta")
    moved = {name: value.to("meta") for name, value in inputs.items()}
    with Devices() as devices:
        network(**moved)
    assert devices.seen == {"meta"}


@pytest.mark.parametrize("cast", [False, True], ids=["autocast", "bfloat16 model"])
def test_the_rivals_stream_is_bfloat16(cast: bool) -> None:
    """A float32 table would promote it, and every norm and gate would move twice the bytes."""
    network, inputs = small()
    wanted, _ = network(**inputs)
    if cast:
        network.to(torch.bfloat16)
        inputs = {name: value if name == "t" else value.to(torch.bfloat16) for name, value in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=not cast):
        velocity, hidden = network(**inputs, hidden_layers=(0, 2))
    assert {value.dtype for value in hidden.values()} == {torch.bfloat16}
    torch.testing.assert_close(velocity.float(), wanted, rtol=0.1, atol=0.1)


def _providers(problem: Problem) -> list[str]:
    # Parameters are made on the fake device, and those of FakeTensorMode cannot be moved.
    with FakeTensorMode(), torch.device("cuda"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", lambda self, *_: self)
        return [provider.name for provider in problem.build(torch.device("cuda")).providers]


def test_bfloat16_problems_have_a_bfloat16_model_and_name_the_released_dtype() -> None:
    """Small ones of each kind: the providers do not depend on the size."""
    built = {
        "foga": foga.problem("x", foga.TOY, 2, 16, "bfloat16"),
        "train_step": train_step._problem("x", foga.TOY, 2, 16, "on", "bfloat16"),
        "sampler": sampler._problem("x", foga.TOY, 2, 16, 4, "bfloat16"),
    }
    names = {case: _providers(problem) for case, problem in built.items()}
    for case, found in names.items():
        assert any(name.endswith("bfloat16 model") for name in found), case
        assert [name for name in found if name.startswith("released")] in (
            ["released loop, float32"],
            ["released form, float32"],
        )
    assert "compiled loop, bfloat16 model" in names["foga"]
    assert "SDPA form, compiled, bfloat16 model" in names["train_step"]


RMS = {
    "gated_residual_norm": {"Liger modulated RMSNorm", "Liger fused add + RMSNorm", "quack rmsnorm(residual=)"},
    "layer_norm_modulate": {"Liger modulated RMSNorm"},
}


@pytest.mark.parametrize("op", RMS)
def test_rivals_of_the_norm_without_a_mean(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are there on a GPU, and called so that they compute the same, if their ops do what their names say."""
    assert any(
        p.params.get("norm") == "rms" and p.params["op"] == op
        for p in CASES["residual"].problems("full", torch.device("cuda"))
    )
    assert RMS[op] <= set(_providers(residual._problem(op, "both", 2, 8, 24, "bfloat16", "rms", rivals=True)))

    def rms(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    liger = ModuleType("liger_kernel.transformers.functional")
    liger.liger_modulated_rms_norm = lambda X, W, scale, shift, eps, in_place: (  # type: ignore[attr-defined]
        rms(X, W, eps) * (1 + scale[:, None]) + shift[:, None]
    )
    liger.liger_fused_add_rms_norm = lambda X, R, W, eps, in_place: (rms(X + R, W, eps), X + R)  # type: ignore[attr-defined]
    quack = ModuleType("quack")
    quack.rmsnorm = lambda x, weight, residual, eps, prenorm: (rms(x + residual, weight, eps), x + residual)  # type: ignore[attr-defined]
    for module in (ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers"), liger, quack):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    x, branch = torch.randn(2, 2, 8, 24).unbind()
    gate, shift, scale = torch.randn(3, 2, 24).unbind()
    inputs = (x, branch, gate, shift, scale) if op == "gated_residual_norm" else (x, shift, scale)
    wanted = residual.expression(op, "rms")(*inputs)
    rivals = [residual.liger_modulated(op)]
    if op == "gated_residual_norm":
        rivals += [residual.liger_added(), residual.quack_added()]
    for rival in rivals:
        torch.testing.assert_close(rival(*inputs), wanted, rtol=1e-5, atol=1e-5)


RIVALS = {
    "liger_layer_norm": lambda: residual.liger("layer_norm_modulate"),
    "liger_modulated_rms_norm": lambda: residual.liger_modulated("layer_norm_modulate"),
    "liger_fused_add_rms_norm": residual.liger_added,
    "rmsnorm": residual.quack_added,
}


@pytest.mark.parametrize("name", RIVALS)
def test_a_rivals_package_without_the_op_is_unavailable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of a rival is a row that says so, and no failure in the middle of its first call."""
    for module in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional", "quack"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    package = "quack" if name == "rmsnorm" else "liger_kernel"
    with pytest.raises(residual.Unavailable, match=f"^the installed {package} has no {name}$"):
        RIVALS[name]()


@pytest.mark.parametrize("name", RIVALS)
def test_a_rivals_package_that_breaks_as_it_is_imported_is_unavailable(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for package in ("liger_kernel", "quack"):
        monkeypatch.delitem(sys.modules, package, raising=False)
        (tmp_path / f"{package}.py").write_text("raise RuntimeError('0 active drivers')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(residual.Unavailable, match="cannot be imported: RuntimeError: 0 active drivers"):
        RIVALS[name]()


def test_shares_of_a_copy_are_asked_for_only_where_the_work_is_long() -> None:
    """25 MB take 8 us, of which launch and tail are a tenth: no kernel has 90 % there."""

    def fits(rows: int, width: int, claim: str) -> bool:
        params = {"op": "gated_residual_norm", "mode": "forward", "rows": rows, "width": width, "dtype": "bfloat16"}
        problem = {"case": "residual", "params": params}
        return any(t.fits(problem) and claim in t.claim for t in TARGETS if t.device == "cuda")

    assert fits(32768, 1024, "share of a copy")
    assert not fits(8192, 384, "share of a copy")
    assert fits(8192, 384, "compiled")
    assert not fits(4096, 1024, "compiled")
    assert not fits(32768, 2048, "share of a copy")
