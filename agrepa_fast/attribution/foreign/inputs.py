"""The inputs of another model: which of them carry the N samples, and how a few samples are taken out of them.

An input carries the samples when its first dimension, or its length as a Python list, counts them. Sizes alone do not
tell (a table may have N rows by coincidence), so each choice is a hypothesis that `drive` tests by running the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TIME_NAMES = ("t", "time", "timestep", "timesteps", "sigma")
CONDITIONS = ("encoder", "text", "context", "caption", "cross", "memory")  # in names of masks that are not the frames'
SEED = 0x5EED_F06A  # of what is added to a user's values, which are often drawn with seed 0: they must differ
TRIALS = 48  # hypotheses tried before the user is asked


@dataclass(frozen=True)
class Node:
    """A tensor, or a Python list or tuple, somewhere in the inputs; `path` is dotted: "x", "extra.masks.0"."""

    path: str
    size: int
    value: Any

    def __str__(self) -> str:
        shape = list(self.value.shape) if isinstance(self.value, Tensor) else f"a list of {self.size}"
        return f"{self.path!r} {shape}"


class Inputs:
    """Positional and keyword arguments of a forward; `batched` holds what carries the `samples`, and where.

    Args:
        named: the arguments by name, for paths (`positions` maps them back to args and kwargs).
        batched: None; the paths of all inputs that carry the samples; or {path: whether it does} for some.

    Raises:
        TypeError, ValueError: no tensor, no sample, or a path that does not exist or has another size.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        named: Mapping[str, Any],
        batched: Sequence[str] | Mapping[str, bool] | None = None,
    ) -> None:
        self.args, self.kwargs, self.named = args, kwargs, named
        positional = list(named)[: len(args)]
        # A variadic *args has one name for many values.
        self._names = positional if len(positional) == len(args) else [str(i) for i in range(len(args))]
        self.nodes = {node.path: node for name, value in self._top() for node in _nodes(name, value)}
        if not any(isinstance(node.value, Tensor) for node in self.nodes.values()):
            raise TypeError("inputs: expected at least one tensor with the samples first")
        if isinstance(batched, str):
            batched = [batched]
        if batched is not None and not isinstance(batched, Iterable):
            raise TypeError(f"batched: expected names of inputs that carry the samples, got {batched!r:.60}")
        self._complete = batched is not None and not isinstance(batched, Mapping)
        self._fixed = dict(batched) if isinstance(batched, Mapping) else dict.fromkeys(batched or (), True)
        for path in self._fixed:
            if path not in self.nodes:
                known = ", ".join(map(str, self.nodes.values()))
                raise ValueError(f"batched: the inputs have no tensor or list {path!r}; they have {known}")
        self.samples, self.batched = next(self.hypotheses())
        if self.samples == 0:
            raise ValueError("inputs: expected at least one sample, got a batch of 0")

    def _top(self) -> Iterator[tuple[str, Any]]:
        yield from zip(self._names, self.args)
        yield from self.kwargs.items()

    def hypotheses(self) -> Iterator[tuple[int, dict[str, int]]]:
        """(N, {path: dimension} of what carries the samples), the likeliest first.

        The likeliest is the first dimension of all that has N there; then one input is otherwise, then two, ..."""
        wanted = [self.nodes[path].size for path, carries in self._fixed.items() if carries]
        if len(set(wanted)) > 1:
            shown = ", ".join(str(self.nodes[path]) for path, carries in self._fixed.items() if carries)
            raise ValueError(f"batched: expected one number of samples, got {shown}")
        for samples in wanted[:1] or self._sizes():
            start: dict[str, int | None] = dict.fromkeys((p for p, carries in self._fixed.items() if carries), 0)
            others = {} if self._complete else self._options(samples)
            start.update({path: options[0] for path, options in others.items()})
            changes = [(path, option) for path, options in others.items() for option in options[1:]]
            changes.sort(key=lambda change: self._suspicion(*change))
            for count in range(len(changes) + 1):
                for changed in itertools.combinations(changes, count):
                    if len(dict(changed)) == count:
                        guess = start | dict(changed)
                        yield samples, {path: dim for path, dim in guess.items() if dim is not None}

    def _options(self, samples: int) -> dict[str, list[int | None]]:
        """{path: dimensions that may carry the samples, None for none}, the likeliest first."""
        options: dict[str, list[int | None]] = {}
        for path, node in self.nodes.items():
            if path in self._fixed:
                continue
            value = node.value
            if node.size == samples:
                # A tuple is rather a pair of tables (cos, sin) than a list of samples; a list of tensors that carry the
                # samples themselves is a structure.
                options[path] = [None, 0] if _is_structure(value, samples) else [0, None]
            if isinstance(value, Tensor) and value.dim() > 2 and value.shape[1] == samples:
                options.setdefault(path, [None]).append(1)
        return options

    def _sizes(self) -> list[int]:
        """Numbers of samples that the inputs may have: the first input's, then the most frequent sizes."""
        top = [self.nodes[name] for name, _ in self._top() if name in self.nodes and self._fixed.get(name, True)]
        top = [node for node in top if not isinstance(node.value, tuple)] or list(self.nodes.values())
        sizes = [node.size for node in top]
        return list(dict.fromkeys([sizes[0], *sorted(sizes, key=lambda size: -sizes.count(size))]))

    def _suspicion(self, path: str, option: int | None) -> tuple[int, int, int]:
        """Sort key: small tables, and what comes late in the inputs, rather carry no samples."""
        value = self.nodes[path].value
        dims = value.dim() if isinstance(value, Tensor) else 0
        return (option == 1, dims if dims != 1 else 9, -list(self.nodes).index(path))

    def take(self, rows: Tensor, repeats: int = 1, replace: Mapping[str, Any] | None = None) -> tuple[Any, dict]:
        """args and kwargs of the samples `rows` [R], the whole of them `repeats` times.

        replace: {path: its value for these R rows}, for some that carry the samples."""

        def walk(path: str, value: Any) -> Any:
            if path in self.batched:
                if replace is not None and path in replace:
                    return replace[path]
                if isinstance(value, Tensor):
                    return value.index_select(self.batched[path], rows.to(value.device).repeat(repeats))
                return type(value)([value[row] for row in rows.tolist()] * repeats)
            if isinstance(value, Mapping):
                return {key: walk(f"{path}.{key}", part) for key, part in value.items()}
            if isinstance(value, list) or type(value) is tuple:
                return type(value)(walk(f"{path}.{i}", part) for i, part in enumerate(value))
            return value

        values = [walk(name, value) for name, value in zip(self._names, self.args)]
        return tuple(values), {name: walk(name, value) for name, value in self.kwargs.items()}

    def state_path(self, velocity: torch.Size) -> str | None:
        """Path of the noisy state among what carries the samples: the one of the velocity's shape, or the nearest."""

        def shape_of(node: Node) -> tuple[torch.Size, bool]:
            if isinstance(node.value, Tensor):
                return node.value.shape[1:], node.value.is_floating_point()
            first = node.value[0]
            return (first.shape, first.is_floating_point()) if isinstance(first, Tensor) else (torch.Size(), False)

        def likeness(path: str) -> tuple[bool, int, int]:
            shape, _ = shape_of(self.nodes[path])
            same = sum(a == b for a, b in zip(shape, velocity)) if len(shape) == len(velocity) else 0
            return (shape == velocity, same, shape.numel() if len(shape) else 0)

        floating = [path for path in self.nodes if self.batched.get(path) == 0 and shape_of(self.nodes[path])[1]]
        return max(floating, key=likeness, default=None)

    def token_path(self, velocity: torch.Size) -> str | None:
        """Path of integer tokens that are the state, as of a masked or a causal model: they come before every floating
        input and none of those has the velocity's shape."""
        state = self.state_path(velocity)
        if state is not None and getattr(self.nodes[state].value, "shape", (0,))[1:] == velocity:
            return None
        for path, node in self.nodes.items():
            if path == state:
                return None
            value = node.value
            if self.batched.get(path) == 0 and isinstance(value, Tensor) and value.dim() > 1:
                whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
                if whole and not ((value == 0) | (value == 1)).all():
                    return path
        return None

    def disturbed(self, path: str, rows: Tensor, which: int) -> Any:
        """The input `path` of the samples `rows`, with sample number `which` of them replaced by random values; of
        integers by its own in another order."""
        value = self.nodes[path].value
        parts = [value[row] for row in rows.tolist()]
        generator = torch.Generator().manual_seed(SEED)
        old = parts[which]
        if not old.is_floating_point():
            order = torch.randperm(old.numel(), generator=generator).to(old.device)
            parts[which] = old.flatten()[order].view_as(old)
            return torch.stack(parts) if isinstance(value, Tensor) else type(value)(parts)
        fresh = torch.randn(old.shape, generator=generator, dtype=torch.float32).to(old.device)
        scale = old.float().abs().mean() + 1e-3
        parts[which] = (fresh * scale).to(old.dtype)
        return torch.stack(parts) if isinstance(value, Tensor) else type(value)(parts)

    def named_value(self, names: Sequence[str]) -> Any:
        """The first of the named inputs that carries the samples; None where there is none."""
        values = [self.named[name] for name in names if self.batched.get(name) == 0 and name in self.named]
        return values[0] if values else None

    @property
    def t(self) -> Tensor | None:
        """[N] the samples' flow time where the inputs name one (t, time, timestep, ...)."""
        t = self.named_value(TIME_NAMES)
        return t if isinstance(t, Tensor) and t.shape == (self.samples,) else None

    def masks(self, frames: set[int]) -> dict[str, Tensor]:
        """Inputs that look like masks of the frames: of 0 and 1, both of them, [N, T] with T among `frames`."""
        found = {}
        for path, dim in self.batched.items():
            value = self.nodes[path].value
            if dim or any(word in path for word in CONDITIONS):
                continue
            if not isinstance(value, Tensor) or value.is_complex() or value.dim() < 2:
                continue
            flat = value.flatten(1)
            if flat.shape[1] in frames and max(value.shape[1:]) == flat.shape[1]:
                ones = flat == 1
                if (ones | (flat == 0)).all() and ones.any() and not ones.all():
                    found[path] = ones
        return dict(sorted(found.items()))

    def frame_mask(self) -> Tensor | None:
        """[N, T] bool: the input called `mask`, where its values say that True is a real frame.

        They do when each sample begins with True and all after its first False is False: frames, then padding."""
        mask = self.named_value(("mask",))
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[1] == 0:
            return None
        later = mask[:, 1:] & ~mask[:, :-1]
        return mask if mask[:, 0].all() and not later.any() else None

    def longest(self) -> int:
        """The sample with the most values by a mask or list of the inputs; some models cut a batch to its longest."""
        for path in sorted(self.batched):
            value = self.nodes[path].value
            if isinstance(value, Tensor) and value.dtype == torch.bool and value.dim() == 2:
                return int(value.sum(1).argmax())
        lists = [self.nodes[path].value for path in self.batched if not isinstance(self.nodes[path].value, Tensor)]
        lengths = [sum(_length(parts[row]) for parts in lists) for row in range(self.samples)]
        return lengths.index(max(lengths)) if lengths else 0


def _length(part: Any) -> int:
    return part.numel() if isinstance(part, Tensor) else len(part) if isinstance(part, Sequence) else 0


def _is_structure(value: Any, samples: int) -> bool:
    if isinstance(value, Tensor):
        return False
    batched = [isinstance(part, Tensor) and part.dim() > 0 and part.shape[0] == samples for part in value]
    return isinstance(value, tuple) or all(batched)


def _nodes(path: str, value: Any) -> Iterator[Node]:
    if isinstance(value, Tensor):
        if value.dim():
            yield Node(path, value.shape[0], value)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _nodes(f"{path}.{key}", part)
    elif isinstance(value, list) or type(value) is tuple:
        if value:
            yield Node(path, len(value), value)
        for i, part in enumerate(value):
            yield from _nodes(f"{path}.{i}", part)
