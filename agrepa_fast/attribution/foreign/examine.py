"""Examine another model on a few of its samples: inputs, velocity, blocks in the order of the forward, wiring, noise.

It costs a forward of one sample that records all calls, one of four samples, one of one sample for the noise floor,
and one or two of two samples only where a block's results do not go into the next block as they are.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from ..native import nudged
from .choose import Choice
from .find import find, named_blocks, names_of
from .inputs import TRIALS
from .record import Call, flat, overridden, record
from .register import Adapter
from .subject import NoVelocity, Subject, difference, eps_of, out_of_memory
from .wiring import DISTURBED, Watcher


class Examination:
    """Facts about a model and its inputs. Use it inside `guard.quiet`, in eval mode without gradient.

    Attributes:
        blocks: in the order in which the forward calls them.
        calls: of a forward of the sample `first` alone. watcher: what four samples showed.
        references: {sample: velocity} of some samples. noise: relative mean square change of the velocity when the
            state enters the first block a last bit away.

    Raises:
        TypeError: inputs that do not fit the forward, or a velocity that is no floating tensor.
        ValueError: see `attribute_layers`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        adapter: Adapter,
        block_list: str | Sequence[str] | None,
        batched: Sequence[str] | Mapping[str, bool] | None,
        mask: Tensor | None,
        coupled: bool = False,
    ) -> None:
        self.subject = Subject(model, inputs, adapter, batched)
        self.model, self.kind, self.inputs = model, self.subject.kind, self.subject.inputs
        self.block_list = block_list or adapter.block_list
        self.references: dict[int, Tensor] = {}
        self.first, calls, velocity = self._settle(coupled)
        self.mask = self._frame_mask(mask, velocity.shape[1:])
        self.velocity_shape, self.dtype = velocity.shape[1:], velocity.dtype
        self.calls = calls
        choice = Choice(
            self.subject,
            self.first,
            calls,
            self.watcher,
            self.found,
            self.automatic,
            named=self.block_list is not None,
            state=self.inputs.state_path(self.velocity_shape),
        )
        self.blocks = choice.blocks
        self.noise = difference(velocity, self._nudged()) ** 2

    def _settle(self, coupled: bool) -> tuple[int, list[Call], Tensor]:
        """The sample to examine, its recorded calls and its velocity, with `inputs.batched` settled."""
        failure: Exception | None = None
        dependent: int | None = None
        guesses = list(itertools.islice(self.inputs.hypotheses(), TRIALS))
        for guess in guesses:
            self.inputs.samples, self.inputs.batched = guess
            sample = self.inputs.longest()
            other = (sample + 1) % self.inputs.samples if self.inputs.samples else 0
            try:
                velocity, calls = record(self.model, partial(self.subject.forward, torch.tensor([sample])))
            except Exception as error:
                if isinstance(error, NoVelocity) or out_of_memory(error):
                    raise
                failure = failure or error
                continue
            self._watch(calls)
            try:
                four = self._run_four(sample, other, velocity)
            except Exception as error:
                if out_of_memory(error):
                    raise
                failure = failure or error
                continue
            if self.subject.same(velocity, four[1:2]):
                self.references = {other: four[0], sample: four[1]}
                return sample, calls, velocity
            if dependent is None:
                self._refuse_random(sample, velocity)
                dependent = sample
                if coupled:
                    self.references = {sample: velocity[0]}
                    return sample, calls, velocity
        self.inputs.samples, self.inputs.batched = guesses[0]
        if dependent is not None:
            raise ValueError(
                f"{self.kind}: the velocity of sample {dependent} depends on which samples run beside it (statistics "
                "of the batch, dynamic quantisation), or an input that carries the samples is not known to: say with "
                f"batched= which of {self._shown()} do; or score each sample by itself: engine='loop', max_samples=1"
            )
        assert failure is not None
        try:
            self.model(*self.inputs.args, **self.inputs.kwargs)
        except Exception:
            raise failure from None  # the inputs do not fit the model as they are
        raise ValueError(
            f"{self.kind}: forward runs on all {self.inputs.samples} samples but not on one of them ({failure}): say "
            f"with batched= which of {self._shown()} carry the samples"
        ) from failure

    def _refuse_random(self, sample: int, velocity: Tensor) -> None:
        again = self.subject.forward(torch.tensor([sample]))
        if difference(velocity, again) > 64 * eps_of(self.model, velocity):
            raise ValueError(
                f"{self.kind}: two runs of forward on the same input differ: it draws random numbers "
                "(noise, masks, dropout by function) that ablations must share; draw them outside and pass them in"
            )

    def _shown(self) -> str:
        return ", ".join(str(node) for node in self.inputs.nodes.values())

    def _watch(self, calls: list[Call]) -> None:
        """Choose which modules of the recorded calls to watch while four samples run."""
        self.automatic = find(self.model, calls)
        self.found = self.automatic if self.block_list is None else named_blocks(self.model, calls, self.block_list)
        names = names_of(self.model)
        watched = self.found.blocks | self.automatic.blocks | self.automatic.left_out
        for group in (*self.found.groups, *self.automatic.groups):
            watched.update({names[call.module]: call.module for call in group.calls})
        self.watcher = Watcher(calls, {module: name for name, module in watched.items()})

    def _run_four(self, sample: int, other: int, velocity: Tensor) -> Tensor:
        rows = torch.tensor([other, sample, sample, sample])
        path = self.inputs.state_path(velocity.shape[1:])
        replace = None if path is None else {path: self.inputs.disturbed(path, rows, DISTURBED)}
        return self.watcher.run(self.model, lambda: self.subject.forward(rows, replace=replace))

    def _nudged(self) -> Tensor:
        """The velocity of the first sample when the state around the first block is a last bit away."""
        site = self.blocks[0].sites[0]

        def enter(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            paths, leaves, spec = flat(forward(*args, **kwargs) if site.adds else (args, kwargs))
            places = site.state if site.adds else site.state.values()
            for i, path in enumerate(paths):
                if path in places:
                    if not leaves[i].is_floating_point():
                        raise TypeError(
                            f"{site.name}: expected a floating residual state, got {leaves[i].dtype}: give the "
                            "model inputs of its own dtype"
                        )
                    leaves[i] = nudged(leaves[i])
            if site.adds:
                return tree_unflatten(leaves, spec)
            args, kwargs = tree_unflatten(leaves, spec)
            return forward(*args, **kwargs)

        with overridden([site.module], enter):
            return self.subject.forward(torch.tensor([self.first]))

    def _frame_mask(self, mask: Tensor | None, shape: torch.Size) -> Tensor | None:
        samples, frames = self.inputs.samples, {size for size in shape if size > 1}
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
                got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(
                    f"mask: expected a bool tensor [samples, frames], True for a frame that counts, got {got}"
                )
            if mask.shape[0] != samples or mask.shape[1] not in shape[:2] or len(shape) != 2:
                raise ValueError(
                    f"mask: expected [{samples}, frames] for a velocity {[samples, *shape]}, got {list(mask.shape)}"
                )
            return mask
        path = self.inputs.state_path(shape)
        if path is not None and isinstance(self.inputs.nodes[path].value, Tensor):
            frames |= set(self.inputs.nodes[path].value.shape[1:])
        if len(shape) != 2:
            frames = set()  # an image or a vector
        used = self.inputs.frame_mask()
        if used is not None and (len(shape) != 2 or used.shape[1] not in shape):
            used = None
        unused = [name for name in self.inputs.masks(frames) if used is None or name != "mask"]
        if used is None and unused:
            warnings.warn(
                f"{', '.join(map(repr, unused))} may say which frames are real, but not by which of its values: all "
                "frames count; pass mask= ([samples, frames] bool, True for a frame that counts)",
                stacklevel=6,
            )
        return used
