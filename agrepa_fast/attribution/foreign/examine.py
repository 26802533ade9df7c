"""Examine another model on a few of its samples: inputs, velocity, blocks in the order of the forward, wiring, noise.

It costs a forward of one sample that records all calls, one of four samples, one of one sample for the noise floor
where the four do not show it, and one or two of two samples only where a block's results do not go into the next block
as they are.
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
from .choose import Block, Choice, Unclear
from .find import find, holds_blocks, named_blocks, names_of
from .guard import kept_tensors
from .inputs import TRIALS
from .record import Call, flat, has_values, overridden, record, with_leaves
from .register import Adapter
from .subject import NoVelocity, Subject, difference, eps_of, out_of_memory
from .wiring import AGAIN, DISTURBED, FIRST, OTHER, Watcher, Zeroing


class Examination:
    """Facts about a model and its inputs. Use it inside `guard.quiet`, in eval mode without gradient.

    Attributes:
        blocks: in the order in which the forward calls them.
        calls: of a forward of the sample `first` alone. watcher: what four samples showed.
        references: {sample: velocity} of some samples.
        nudged: the velocity [1, ...] of the sample `first`, and that with the state a last bit away where it enters the
            first block (both of one forward). noise: the relative mean square difference of the two.

    Args:
        coupled: whether samples may depend on each other. whole: whether block_list names modules, not lists of them.

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
        whole: bool = False,
    ) -> None:
        self.subject = Subject(model, inputs, adapter, batched)
        self.model, self.kind, self.inputs = model, self.subject.kind, self.subject.inputs
        self.block_list, self.whole = block_list or adapter.block_list, whole
        self.references: dict[int, Tensor] = {}
        self.opened: set[nn.Module] = set()
        self.first, calls, velocity = self._settle(coupled)
        self.mask = self._frame_mask(mask, velocity.shape[1:])
        self.velocity_shape, self.dtype, self.device = velocity.shape[1:], velocity.dtype, velocity.device
        self.calls = calls
        self.blocks = self._choose(calls, velocity)
        self.nudged = self._nudged(velocity)
        self.noise = difference(*self.nudged) ** 2

    def _choose(self, calls: list[Call], velocity: Tensor) -> list[Block]:
        """The blocks. A stage of a U-Net whose state is not clear, since it gets several of one shape, is opened."""
        unclear: Unclear | None = None
        while True:
            try:
                return Choice(
                    self.subject,
                    self.first,
                    calls,
                    self.watcher,
                    self.found,
                    self.automatic,
                    named=self.block_list is not None,
                    state=self.inputs.state_path(self.velocity_shape),
                ).blocks
            except ValueError as error:
                stages = error.modules if isinstance(error, Unclear) and self.block_list is None else set()
                if not stages or not all(holds_blocks(stage, calls) for stage in stages):
                    raise unclear or error from None
                unclear = unclear or error  # type: ignore[assignment]
                self.opened |= stages
                self._watch(calls, velocity)
                self._run_four(calls, self.first, (self.first + 1) % self.inputs.samples, velocity)

    def _settle(self, coupled: bool) -> tuple[int, list[Call], Tensor]:
        """The sample to examine, its recorded calls and its velocity, with `inputs.batched` settled."""
        failure: Exception | None = None
        dependent: int | None = None
        guesses = list(itertools.islice(self.inputs.hypotheses(), TRIALS))
        for guess in guesses:
            self.inputs.samples, self.inputs.batched = guess
            sample, kept = self.inputs.longest(), kept_tensors(self.model)
            other = (sample + 1) % self.inputs.samples if self.inputs.samples else 0
            try:
                velocity, calls = record(self.model, partial(self.subject.forward, torch.tensor([sample])))
                self.subject.eps = max((call.eps for call in calls), default=0.0)
            except Exception as error:
                if isinstance(error, NoVelocity) or out_of_memory(error):
                    raise
                failure = failure or error
                continue
            changed = [name for name, state in kept_tensors(self.model).items() if kept.get(name) != state]
            if changed:
                self._refuse_memory(sample, velocity, changed)
            self._watch(calls, velocity)
            try:
                four = self._run_four(calls, sample, other, velocity)
            except Exception as error:
                if out_of_memory(error):
                    raise
                failure = failure or error
                continue
            self.independent = self.subject.same(velocity, four[FIRST : FIRST + 1])
            if self.independent:
                self.references = {other: four[OTHER], sample: four[FIRST]}
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
        except Exception:  # another library's forward raises what it likes
            raise failure from None  # the inputs do not fit the model as they are
        raise ValueError(
            f"{self.kind}: forward runs on all {self.inputs.samples} samples but not on one of them ({failure}): say "
            f"with batched= which of {self._shown()} carry the samples; where a sample is several rows of an input, "
            "wrap the model in a module that takes them as [samples, rows, ...]"
        ) from failure

    def _refuse_random(self, sample: int, velocity: Tensor) -> None:
        again = self.subject.forward(torch.tensor([sample]))
        if difference(velocity, again) > 64 * eps_of(self.model, velocity):
            raise ValueError(
                f"{self.kind}: two runs of forward on the same input differ: it draws random numbers "
                "(noise, masks, dropout by function) that ablations must share; draw them outside and pass them in"
            )

    def _refuse_memory(self, sample: int, velocity: Tensor, changed: list[str]) -> None:
        again = self.subject.forward(torch.tensor([sample]))
        if difference(velocity, again) > 64 * eps_of(self.model, velocity):
            raise ValueError(
                f"{self.kind}: its output depends on earlier calls: forward changes {', '.join(changed[:3])} and reads "
                "what the call before left there; reset or switch off this memory before the probe"
            )

    def _shown(self) -> str:
        return ", ".join(str(node) for node in self.inputs.nodes.values())

    def _watch(self, calls: list[Call], velocity: Tensor, nudge: bool = True) -> None:
        """Choose which modules of the recorded calls to watch while four samples run.

        nudge: whether the run may show the noise floor, too."""
        self.automatic = find(self.model, calls, self._feeds, self.opened)
        self.found = self.automatic
        if self.block_list is not None:
            self.found = named_blocks(self.model, calls, self.block_list, bool(self.subject.adapter.adds), self.whole)
        names = names_of(self.model)
        watched = self.found.blocks | self.automatic.blocks | self.automatic.left_out
        for group in (*self.found.groups, *self.automatic.groups):
            watched.update({names[call.module]: call.module for call in group.calls})
        # In half precision the change by one bit is too large: it would hide which results depend on the noise.
        fine = max(self.subject.eps, eps_of(self.model, velocity)) <= torch.finfo(torch.float32).eps
        nudged = set(self.found.blocks.values()) if fine and nudge else set()
        self.watcher = Watcher(calls, {module: name for name, module in watched.items()}, nudged)

    def _feeds(self, first: Call, second: Call) -> bool:
        """Whether the second call gets something else, or is not made, when the first returns zeros."""
        row, entered = torch.tensor([self.inputs.longest()]), []
        for zeroed in ((), (first.key,)):
            run = Zeroing(zeroed, (second.key,))
            run.run(self.model, (first.module, second.module), lambda: self.subject.forward(row))
            entered.append(run.entries.get(second.key, {}))
        usual, other = entered
        return usual.keys() != other.keys() or any(not torch.equal(usual[path], other[path]) for path in usual)

    def _run_four(self, calls: list[Call], sample: int, other: int, velocity: Tensor) -> Tensor:
        rows = torch.tensor([other, sample, sample, sample])
        paths = (self.inputs.state_path(velocity.shape[1:]), self.inputs.token_path(velocity.shape[1:]))
        replace = {path: self.inputs.disturbed(path, rows, DISTURBED) for path in paths if path is not None}
        run = partial(self.subject.forward, rows, replace=replace)
        self.four = self.watcher.run(self.model, run)
        if self.watcher.nudged is not None and not self.subject.same(velocity, self.four[FIRST : FIRST + 1]):
            # A block that writes into its argument has missed it, for it got a copy.
            self._watch(calls, velocity, nudge=False)
            self.four = self.watcher.run(self.model, run)
        return self.four

    def _nudged(self, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity of the first sample, and that when the state around the first block is a last bit away."""
        site = self.blocks[0].sites[0]
        as_needed = not site.adds and self.watcher.nudged == (site.module, set(site.state.values()))
        if as_needed and self.independent:
            return self.four[FIRST : FIRST + 1], self.four[AGAIN : AGAIN + 1]

        def enter(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            paths, before, spec = flat(forward(*args, **kwargs) if site.adds else (args, kwargs))
            leaves = list(before)
            places = site.state if site.adds else site.state.values()
            for i, path in enumerate(paths):
                if path in places and leaves[i] is not None:
                    if not has_values(leaves[i]):
                        raise TypeError(
                            f"{site.name}: expected a floating residual state, got {leaves[i].dtype}: give the "
                            "model inputs of its own dtype"
                        )
                    leaves[i] = nudged(leaves[i])
            if site.adds:
                return tree_unflatten(leaves, spec)
            args, kwargs = with_leaves(args, kwargs, before, leaves, spec)
            return forward(*args, **kwargs)

        with overridden([site.module], enter):
            return velocity, self.subject.forward(torch.tensor([self.first]))

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
