"""Compile a recorded launch for a target without a GPU, and read the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch, options

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.int8: "i8",
}


class Source(ASTSource):
    """A kernel whose intermediate module is made from Python once, and read from its text for the other targets.

    Making it takes a quarter of a compilation, and the module is the same for all targets."""

    texts: ClassVar[dict[str, str]] = {}

    def make_ir(self, *arguments: Any) -> Any:
        *_, context = arguments
        if self.hash() not in self.texts:
            module = super().make_ir(*arguments)
            self.texts[self.hash()] = str(module)
            return module
        with tempfile.NamedTemporaryFile("w", suffix=".ttir") as file:
            file.write(self.texts[self.hash()])
            file.flush()
            module = ir.parse_mlir_module(file.name, context)
        module.context = context  # the module does not keep the context alive
        return module


def tensors(launch: Launch) -> dict[str, Tensor]:
    """The tensors of a launch by name (`inputs.x`), in the order of the compiled kernel's parameters."""
    return {name: value for name, _, value in _flat(launch) if isinstance(value, Tensor)}


def parameters(launch: Launch) -> list[str]:
    """The names of the compiled kernel's parameters, in order."""
    return [name for name, _, value in _flat(launch) if value is not None]


def _flat(launch: Launch) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """(name, path, value) of each argument, and of each member of a tuple."""

    def members(name: str, path: tuple[int, ...], value: Any) -> Iterator[tuple[str, tuple[int, ...], Any]]:
        if isinstance(value, tuple):
            for i, (field, member) in enumerate(zip(getattr(value, "_fields", map(str, range(len(value)))), value)):
                yield from members(f"{name}.{field}", (*path, i), member)
        else:
            yield name, path, value

    for position, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments)):
        yield from members(name, (position,), value)


def source(launch: Launch) -> Source:
    """The source for `triton.compile`, with the specialisation that the launcher would choose."""

    def type_of(value: Any) -> Any:
        if isinstance(value, tuple):
            members = [type_of(member) for member in value]
            return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
        if isinstance(value, Tensor):
            return f"*{_TYPES[value.dtype]}"
        return "constexpr" if value is None else "i32"

    names = launch.kernel.arg_names
    signature = dict.fromkeys(names, "constexpr") | {n: type_of(v) for n, v in zip(names, launch.arguments)}
    constants = dict(launch.constants) | {path: None for _, path, value in _flat(launch) if value is None}
    attributes = {path: [["tt.divisibility", 16]] for _, path, value in _flat(launch) if isinstance(value, Tensor)}
    return Source(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_launch(launch: Launch, target: str) -> triton.compiler.CompiledKernel:
    """Build one recorded launch for a target."""
    chosen = options(launch.num_warps, launch.registers, hip=TARGETS[target].backend == "hip")
    return triton.compile(source(launch), target=TARGETS[target], options=chosen)


UNTRACED = "?"


def _loop(lines: list[str]) -> set[int]:
    """Numbers of the lines of the row loop (from a label to the branch back to it), or of all lines without a loop."""
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\$\w+):", line))}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        match = re.search(r"\bbra\S*\s+(\$\w+);", line)
        if match and labels.get(match[1], i) < i:
            inside.update(range(labels[match[1]], i))
    return inside or set(range(len(lines)))


def traffic(ptx: str, arguments: Sequence[str]) -> dict[tuple[str, str], list[int]]:
    """{(argument, "ld" or "st"): bytes that each global instruction of the row loop moves for a thread}.

    Each address is traced from the kernel's parameter through arithmetic to the instruction. If that fails, as it may
    with the PTX of another Triton, the argument is UNTRACED."""
    origin: dict[str, str] = {}
    moved: dict[tuple[str, str], list[int]] = {}
    lines = ptx.splitlines()
    inside = _loop(lines)
    for line in lines * 2:  # twice, because an address that the loop carries may be set further down
        parameter = re.search(r"ld\.param\.b64\s+(%rd\d+), \[\w+_param_(\d+)\]", line)
        arithmetic = re.match(r"\s*[a-z][\w.]*\s+(%rd\d+), (.*);", line)
        if parameter and int(parameter[2]) < len(arguments):
            origin[parameter[1]] = arguments[int(parameter[2])]
        elif arithmetic:
            for register in re.findall(r"%rd\d+", arithmetic[2]):
                if register in origin:
                    origin[arithmetic[1]] = origin[register]
    for i in sorted(inside):
        access = re.search(r"\b(ld|st)\.global(?:\.\w+::\w+)*(?:\.v(\d))?\.[bfu](\d+)\s.*?\[ *(%rd\d+)", lines[i])
        if access:
            size = int(access[2] or 1) * int(access[3]) // 8
            moved.setdefault((origin.get(access[4], UNTRACED), access[1]), []).append(size)
    return moved


def resources(kernel: triton.compiler.CompiledKernel) -> tuple[int, int]:
    """(registers, spills) of a compiled kernel."""
    if "amdgcn" in kernel.asm:
        number = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s*(\d+)", kernel.asm["amdgcn"]))
        return int(number["vgpr_count"]), int(number["vgpr_spill_count"]) + int(number["sgpr_spill_count"])
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    number = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(number["REG"]), int(number["STACK"]) + int(number["LOCAL"])
