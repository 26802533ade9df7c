"""Launch a kernel that Triton has compiled before, without going through its JIT again.

At each call the JIT binds, classifies and formats every argument, which takes many times longer than the launch. This
module keeps the compiled kernel, under a key that distinguishes everything that the JIT distinguishes. A call goes
through the JIT if Triton's hooks or debugging knobs are set, if this version of Triton launches in another way, or if a
tensor is not an ordinary one.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import Parameter

# The lines by which the JIT of Triton 3.6 to 3.8 launches a compiled kernel. Without them this file does not launch.
_JIT_RUNS = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
)
_ORDINARY = (Tensor, Parameter)
_ENTRIES = 10_000  # batches of as many shapes


class _Entry(NamedTuple):
    run: Any
    function: Any
    packed_metadata: Any
    constants: tuple[Any, ...]  # values of the kernel's last parameters, in order


_entries: dict[tuple[Any, ...], _Entry] = {}


@functools.cache
def known() -> bool:
    """Whether this version of Triton launches kernels in the way that this file assumes."""
    if torch.version.hip is not None:
        return False  # the AMD backend also specialises on the size of a tensor
    try:
        text = inspect.getsource(triton.runtime.jit.JITFunction.run)
        runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
        _ = (runtime.debug, runtime.launch_enter_hook.calls, runtime.launch_exit_hook.calls)
        _ = (compilation.instrumentation_mode, runtime.add_stages_inspection_hook)
    except (AttributeError, OSError, TypeError):
        return False
    return _JIT_RUNS in " ".join(text.split())


def run(
    kernel: Any,
    device: int,
    programs: int,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    options: dict[str, int],
) -> None:
    """`kernel[(programs,)](*arguments, **constants, **options)` on the current stream of `device`, the current device.

    Arguments are tensors, None, integers, tuples of tensors and None, and tuples of integers; the kernel does not
    specialise on integers."""
    key = _key(kernel, device, arguments, constants, options) if known() and _as_usual(kernel) else None
    entry = None if key is None else _entries.get(key)
    if entry is None:
        compiled = kernel[(programs,)](*arguments, **constants, **options)
        if key is not None:
            _keep(key, kernel, compiled, arguments, constants)
        return
    stream = triton.runtime.driver.active.get_current_stream(device)
    run, function, metadata, rest = entry
    run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments, *rest)


def _as_usual(kernel: Any) -> bool:
    """Whether no hook observes launches and no knob asks for another build."""
    runtime = triton.knobs.runtime
    return not (
        runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
        or kernel.pre_run_hooks
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or triton.knobs.compilation.instrumentation_mode
    )


def _key(
    kernel: Any, device: int, arguments: tuple[Any, ...], constants: dict[str, Any], options: dict[str, int]
) -> tuple[Any, ...] | None:
    """A key of everything by which the JIT chooses a compiled kernel; None if an argument has an unknown type.

    It holds the integers themselves. The JIT looks only at whether an integer needs 64 bits, which follows from it."""
    parts = [id(kernel), device, *constants.values(), *options.values()]
    for argument in arguments:
        if type(argument) is int or (isinstance(argument, tuple) and type(argument[0]) in (int, tuple)):
            parts.append(argument)
            continue
        for value in argument if isinstance(argument, tuple) else (argument,):
            if value is None:
                parts.append(None)
            elif type(value) in _ORDINARY:
                # The compiler is told whether an address is a multiple of 16.
                parts.append((value.dtype,) if value.data_ptr() & 15 else value.dtype)
            else:
                return None
    return tuple(parts)


def _keep(
    key: tuple[Any, ...], kernel: Any, compiled: Any, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Keep the compiled kernel, unless it is not ready yet or checks global variables at each launch."""
    complete = all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata"))
    if not complete or kernel.used_global_vals:
        return
    if len(_entries) >= _ENTRIES:
        _entries.clear()
    rest = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
    _entries[key] = _Entry(compiled.run, compiled.function, compiled.packed_metadata, rest)
