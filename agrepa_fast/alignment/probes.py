"""Score the layers of the network that a trainer trains, on inputs of its training steps or on given ones."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..attribution.foreign.hidden import HiddenStates
from ..attribution.foreign.intercept import CallCapture
from ..attribution.runner import attribute_layers
from ..attribution.scores import LayerScores
from ..errors import NotFiniteError
from .choice import ProbePlan, scores_of_all_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MOST_POSTPONED = 20  # probes in a row; as train.max_skipped of our trainer


class Probe:
    """`attribute_layers` of the network of `states`, as a plan says.

    Attributes:
        capture: keeps the inputs of the network's last call while it is installed.
        postponed: how many probes in a row were not finite.
    """

    def __init__(self, states: HiddenStates, plan: ProbePlan, process_group: ProcessGroup | None = None) -> None:
        self.states, self.plan, self.process_group = states, plan, process_group
        self.capture = CallCapture(states.model)
        self.postponed = 0

    def __call__(
        self,
        blocks: Sequence[int],
        inputs: Any = None,
        domains: Sequence[str] | None = None,
        clips: Sequence[int] | None = None,
    ) -> LayerScores:
        """The scores of these blocks; with several ranks on the samples of all. Every rank must call it.

        Args:
            inputs, domains, clips: see `Aligner.step`.

        Raises:
            NotFiniteError: a velocity or a score is not finite. Other errors: see `attribute_layers`.
        """
        scores: LayerScores | Exception
        try:
            scores = self._of_this_rank(blocks, inputs, domains, clips)
        except Exception as error:  # the other ranks must not wait for this one's scores
            scores = error
        return scores_of_all_ranks(scores, self.process_group)

    def when_finite(
        self, step: int, blocks: Sequence[int], inputs: Any, domains: Sequence[str] | None, clips: Sequence[int] | None
    ) -> LayerScores | None:
        """The scores; or None with a warning where one is not finite, as in one bad batch: try again one step later.

        Raises:
            NotFiniteError: so many times in a row that the network itself must have diverged. Others: see `__call__`.
        """
        try:
            scores = self(blocks, inputs, domains, clips)
        except NotFiniteError as error:
            self.postponed += 1
            if self.postponed > MOST_POSTPONED:
                raise NotFiniteError(
                    f"step {step}: no probe was finite in {self.postponed} steps: {error}: check the batches, lower "
                    "the learning rate"
                ) from error
            if self.postponed == 1:
                warnings.warn(f"step {step}: the probe is postponed to the next step: {error}", stacklevel=3)
            return None
        self.postponed = 0
        return scores

    def _of_this_rank(
        self, blocks: Sequence[int], inputs: Any, domains: Sequence[str] | None, clips: Sequence[int] | None
    ) -> LayerScores:
        plan = self.plan
        context: Any = contextlib.nullcontext()
        if callable(inputs):
            inputs = inputs(plan.t_grid)
        elif inputs is None:
            inputs, autocast = self.capture.inputs(plan.samples)
            domains, clips = domains and domains[: plan.samples], clips and clips[: plan.samples]
            if autocast is not None:
                context = torch.autocast(next(self.states.model.parameters()).device.type, autocast)
        try:
            with context:
                scores = attribute_layers(
                    self.states.model,
                    inputs,
                    blocks=blocks,
                    domains=domains,
                    clips=clips,
                    block_list=self.states.block_list,
                    **plan.options,
                )
        except ValueError as error:  # nan hides how the blocks are connected
            if any(isinstance(x, Tensor) and bool(x.isnan().any()) for x in tree_leaves(inputs)):
                raise NotFiniteError(f"the network's inputs hold nan ({error})") from error
            raise
        for layer, name in zip(scores.layers, scores.names):
            if name not in (str(layer), self.states.names[layer]):
                raise ValueError(
                    f"layer {layer} of the probe is {name}, of the hidden states {self.states.names[layer]}: give "
                    "block_list= in the order in which the forward runs the lists"
                )
        return scores
