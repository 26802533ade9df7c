"""A compiled kernel launched directly, against Triton's own launch of it. No GPU: a stand-in takes the launches.

Triton's JIT compiles the real kernels (for sm90, which needs no device); the stand-in for the driver's launcher records
what would reach the device.
"""

from __future__ import annotations

import types

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from agrepa_fast.kernels import cosine, direct, launch, pooling, residual, residual_backward, residual_sums

KERNELS = [
    value
    for module in (cosine, pooling, residual, residual_backward, residual_sums)
    for name, value in vars(module).items()
    if name.endswith("_kernel")
]


class Driver:
    """As much of Triton's driver as the JIT and the direct launch use; `launched` holds the launcher's arguments."""

    def __init__(self) -> None:
        self.launched: list[tuple] = []
        self.loaded = 0
        self.device: int | None = None  # the index of a CPU device
        driver = self

        class Launcher:
            def __init__(self, source, metadata) -> None: ...

            def __call__(self, *arguments) -> None:
                driver.launched.append(arguments)

        def load_binary(name, kernel, shared, device):
            self.loaded += 1
            return f"module {self.loaded}", f"function {self.loaded}", 32, 0, 1024

        self.launcher_cls = Launcher
        self.utils = types.SimpleNamespace(
            load_binary=load_binary,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int | None:
        return self.device

    def get_current_stream(self, device: int | None) -> str:
        return f"stream of {device}"


@pytest.fixture
def driver(monkeypatch) -> Driver:
    """CPU tensors pass for tensors on device 0, whose launches are recorded."""
    stand_in = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", stand_in)
    monkeypatch.setattr(launch, "_is_cuda", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_device", stand_in.get_current_device)
    monkeypatch.setattr(direct, "_entries", {})
    for kernel in KERNELS:  # not what another test has compiled with another driver
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    return stand_in


@pytest.fixture
def by_jit(driver, monkeypatch) -> list:
    """The calls that go through the JIT."""
    calls = []
    for kernel in KERNELS:
        run = kernel.run
        monkeypatch.setattr(kernel, "run", lambda *a, run=run, **k: calls.append(k) or run(*a, **k))
    return calls


def call(dtype=torch.bfloat16, frames=4, shift=0, modulation=torch.float32, width=64, norm="layer", per_token=False):
    """The forward; `shift` elements off 16-byte alignment."""
    flat = torch.randn(2 * frames * width + shift).to(dtype)[shift:]
    x = flat.view(2, frames, width)
    rows = (2, frames, width) if per_token else (2, width)
    gate, scale, add = torch.randn(3, *rows, dtype=modulation).unbind()
    return residual.forward(x, x, gate, add, scale, *[None] * 5, 1e-6, norm)


def test_this_triton_launches_as_written_down() -> None:
    assert direct.known()


def test_the_second_launch_reaches_the_launcher_as_the_first_did(driver, by_jit) -> None:
    """Once with tensors of its own, each in its place, and with the same tensors again: the same arguments."""
    x, m = torch.randn(2, 4, 64), torch.randn(2, 64)
    results = [residual.forward(x, x, m, m, m, *[None] * 5, 1e-6, "layer") for _ in range(2)]
    assert len(by_jit) == 1
    jit, ours = driver.launched
    assert jit[:6] == ours[:6], "grid, stream, function, metadata"
    assert ours[6:9] == (None, None, None), "what the JIT gives to listeners, of which there are none"
    assert len(jit) == len(ours)
    for position, (one, other) in enumerate(zip(jit[9:], ours[9:])):
        if isinstance(one, residual.Results):
            for written, result in zip((one, other), results):
                assert [value.data_ptr() for value in written] == [value.data_ptr() for value in result]
        elif isinstance(one, residual.Inputs):
            assert all(a is b for a, b in zip(one, other)), position
        else:
            assert (type(one), one) == (type(other), other), position


CHANGES = {
    "dtype": {"dtype": torch.float16},
    "dtype of the modulation": {"modulation": torch.bfloat16},
    "alignment": {"shift": 1},
    "width": {"width": 96},
    "norm": {"norm": "rms"},
    "per token": {"per_token": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_jit_tells_apart_takes_another_kernel(driver, by_jit, change) -> None:
    call()
    call(**CHANGES[change])
    call(**CHANGES[change])
    call()
    assert len(by_jit) == 2, "another entry, which is used the second time"
    functions = [launched[4] for launched in driver.launched]
    assert functions == ["function 1", "function 2", "function 2", "function 1"]


def test_another_batch_is_the_same_kernel_with_other_numbers(driver, by_jit) -> None:
    for frames in (4, 5, 5):
        call(frames=frames)
    assert len(by_jit) == 2
    assert [launched[4] for launched in driver.launched] == ["function 1"] * 3
    sizes = [next(a for a in launched if isinstance(a, residual.Sizes)) for launched in driver.launched]
    assert [size.frames >> 4 for size in sizes] == [4, 5, 5]


def test_each_device_has_kernels_of_its_own(driver, by_jit) -> None:
    call()
    arguments, constants = driver.launched[0][9:13], by_jit[0] | {"grid": None}
    names = ("EPS", "RMS", "GATE_PER_TOKEN", "NORM_PER_TOKEN", "WIDTH", "BLOCK_D", "BLOCK_T", "UNIT", "ACC")
    constants = {name: constants[name] for name in names}
    for device in (1, 1, None):
        driver.device = device
        direct.run(residual._forward_kernel, device, 2, arguments, constants, launch.options(4))
    assert [launched[3:5] for launched in driver.launched] == [
        ("stream of None", "function 1"),
        ("stream of 1", "function 2"),
        ("stream of 1", "function 2"),
        ("stream of None", "function 1"),
    ]


def test_the_backward_and_its_sums(driver, by_jit) -> None:
    """Two kernels, both launched directly from the second time on, in any number of rows."""
    for frames in (4, 4, 5, 5):
        x, m = torch.randn(2, frames, 64), torch.randn(2, 64)
        rows = torch.randn(2, frames)
        residual_backward.backward(x, x, x, x, m, m, *[None] * 4, rows, rows, "layer")
    assert len(by_jit) == 3  # the sums are of as many rows again
    assert [launched[4] for launched in driver.launched] == ["function 1", "function 2"] * 4


LISTENERS = {
    "enter": ("launch_enter_hook", "calls", [print]),
    "exit": ("launch_exit_hook", "calls", [print]),
    "debug": (None, "debug", True),
    "stages": (None, "add_stages_inspection_hook", print),
}


@pytest.mark.parametrize("name", [*LISTENERS, "pre-run hook", "another launch", "AMD", "a subclass"])
def test_anything_unusual_goes_through_the_jit(driver, by_jit, monkeypatch, name) -> None:
    call()
    if name in LISTENERS:
        where, attribute, value = LISTENERS[name]
        runtime = triton.knobs.runtime
        monkeypatch.setattr(runtime if where is None else getattr(runtime, where), attribute, value)
        monkeypatch.setattr(residual._forward_kernel, "run", lambda *a, **k: by_jit.append(k))
    elif name == "pre-run hook":
        monkeypatch.setattr(residual._forward_kernel, "pre_run_hooks", [lambda *a, **k: None])
    elif name == "a subclass":

        class Other(torch.Tensor): ...

        monkeypatch.setattr(residual, "fresh", lambda x: torch.empty_like(x).as_subclass(Other))
    else:
        direct.known.cache_clear()
        if name == "AMD":
            monkeypatch.setattr(torch.version, "hip", "6.3")
        else:
            monkeypatch.setattr(direct, "_JIT_RUNS", "kernel.run(grid_0, stream, *bound_args.values())")
        assert not direct.known()
    call()
    call()
    direct.known.cache_clear()
    assert len(by_jit) == 3


def test_a_kernel_that_is_not_there_yet_is_not_kept(driver, monkeypatch) -> None:
    """A hook may keep the JIT from compiling; a compilation that goes on beside has no `run`."""
    for compiled in (None, types.SimpleNamespace(result=None)):
        monkeypatch.setattr(residual._forward_kernel, "run", lambda *a, compiled=compiled, **k: compiled)
        call()
        assert not direct._entries


def test_the_kept_kernels_are_bounded(driver, by_jit, monkeypatch) -> None:
    monkeypatch.setattr(direct, "_ENTRIES", 2)
    for frames in (4, 5, 6, 7, 8):
        call(frames=frames)
        assert len(direct._entries) <= 2


def test_every_kernel_that_takes_tuples_of_integers_leaves_them_unspecialised(driver) -> None:
    """Batches of 1, of 16 and of other numbers of sequences and frames run one build of each kernel."""
    for batch, frames in ((1, 1), (16, 16), (3, 7), (2, 160)):
        x, m = torch.randn(batch, frames, 64), torch.randn(batch, frames, 64)
        rows, index = torch.randn(batch, frames), torch.arange(batch)
        residual.forward(x, x, m, m, m, None, None, None, index, None, 1e-6, "layer")
        residual_backward.backward(x, x, x, x, m, m, None, None, None, index, rows, rows, "layer")
        cosine.cosine_rows(x[0], x[0], None, None, 1e-8, False, rows[0].contiguous(), None)
        pooling.masked_mean(x, None)
        pooling.velocity_delta(x[None].repeat(3, 1, 1, 1), None)
    assert driver.loaded == 7


@pytest.mark.parametrize("value", [0, 1, 2, 16, 2**27 - 1, 2**31, 2**40])
def test_unspecialised_integers(value) -> None:
    told = launch.unspecialised(value)
    assert told != 1
    assert told % 16
    assert told >> 4 == value
