"""Representation alignment: pull chosen hidden states toward frozen teachers.

    L = sum_k lambda_k sum_teacher mean_rows(1 - cos(head_k(norm(pool(h_k))), teacher))

or, in place of 1 - cos, a distance between the relations of the rows (`similarity`). hidden {layer: [B, T, D]};
targets {teacher: [B, W] pooled or [B, T, W] per frame}. Layers and teachers are paired by name, never by position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..buffers import FixedBuffers
from ..errors import UserError
from .heads import HEADS, grouped, one_by_one
from .policy import LayerSelection, check_selection
from .rows import (
    Domains,
    ZeroGradient,
    check_targets,
    check_teachers,
    check_tensor,
    check_tensors,
    check_width,
    comparable,
    count,
    counted_frames,
    domain_weights,
    grouped_ranks,
    mean_of,
    rank_shares,
    row_mask,
    similarity_of,
    takes_global_means,
    where_counted,
)
from .similarity import cka_distance, relation_distance, standardise

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OBJECTIVES = ("cosine", "relation", "cka")
RELATIONAL = {"relation": relation_distance, "cka": cka_distance}


def _check_pool(pool: str | None) -> None:
    if pool not in ("mean", None):
        raise ValueError(f'pool: expected "mean" or None (frame by frame), got {pool!r}')


class AlignmentLoss(FixedBuffers):
    """AG-REPA's loss over the layers of a selection, one head for each layer and teacher.

    The heads live here, outside the backbone: their own parameters and state dict, nothing at inference.
    `select` changes the weights in place. Pooled heads cost next to nothing, so all of them always run. Frame-wise
    heads cost more, so only those of the selected layers (`active`) run. In one process the others get no gradient; in
    a process group their gradients are exactly zero, because DistributedDataParallel waits for every parameter.

    Args:
        width: D of the hidden states.
        teachers: {name: width of its features}.
        selection: the layers that get heads, and their weights.
        pool: "mean" over the valid frames (AG-REPA; targets [B, W]), or None, frame by frame (REPA; [B, T, W]).
        head: "mlp" (AG-REPA's), "repa", "linear", "low-rank", or, frame by frame, "conv"; see `heads`.
        objective: "cosine"; or how the rows relate, of each clip's frames (or, pooled, of the batch's clips):
            "relation" (their matrices of cosines) or "cka" (linear CKA); see `similarity`.
        standardise_targets: each channel of the targets to mean 0 and variance 1 over the clip's frames that count
            (iREPA); frame by frame only.
        every_head: frame by frame, run the heads of unselected layers too (with weight 0). It costs their forward and
            backward pass; in return `select` changes nothing that torch.compile has traced.
        process_group: the ranks over whose rows means are taken while gradients are recorded; None: all ranks. With
            a group of this rank alone (`new_group([rank])`) each rank takes its own means.
    """

    weights: Tensor
    selected: Tensor

    def __init__(
        self,
        width: int,
        teachers: Mapping[str, int],
        selection: LayerSelection,
        pool: str | None = "mean",
        head: str = "mlp",
        objective: str = "cosine",
        standardise_targets: bool = False,
        process_group: ProcessGroup | None = None,
        every_head: bool = False,
    ) -> None:
        super().__init__()
        _check_pool(pool)
        if objective not in OBJECTIVES:
            raise UserError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
        if standardise_targets and pool is not None:
            raise UserError('standardise_targets: works over time, which pool="mean" leaves none of: use pool=None')
        if head not in list(HEADS):  # a list: what cannot be hashed is only unknown
            raise UserError(f"head: expected one of {', '.join(HEADS)}, got {head!r}")
        if head == "conv" and pool is not None:
            raise UserError('head: "conv" runs over time, which pool="mean" leaves none of: use pool=None')
        check_teachers(teachers)
        check_width("width", width)
        check_selection(selection)
        self.width = width
        self.teachers = dict(teachers)
        self.layers = selection.layers
        self.pool = pool
        self.process_group = process_group
        self.every_head = every_head or pool is not None
        self.objective = objective
        self.standardise_targets = standardise_targets
        self.heads = nn.ModuleDict(
            {
                name: nn.ModuleDict({str(layer): HEADS[head](width, size) for layer in self.layers})
                for name, size in self.teachers.items()
            }
        )
        self._remember(dict(zip(selection.layers, selection.weights)))
        for name, value in self.constants().items():
            self.register_buffer(name, value)

    def select(self, selection: LayerSelection) -> None:
        """Take the weights of another selection among the layers that have heads; the others get 0."""
        check_selection(selection)
        unknown = set(selection.layers) - set(self.layers)
        if unknown:
            raise ValueError(f"selection: layer {min(unknown)} has no head, only {list(self.layers)}")
        self._remember(dict(zip(selection.layers, selection.weights)))
        for name, value in self.constants().items():
            self.get_buffer(name).copy_(value)

    def idle(self) -> Tensor:
        """0, a scalar that gives every head a gradient of exactly zero.

        With several processes, add it to the loss of a step that leaves alignment out: DistributedDataParallel waits
        for a gradient of every parameter in every step."""
        return self._idle(())

    def _idle(self, active: Sequence[int]) -> Tensor:
        """0, which gives the heads of all layers but the active ones a gradient of exactly zero."""
        parameters = [
            parameter
            for heads in self.heads.children()
            for layer, head in heads.named_children()
            if int(layer) not in active
            for parameter in head.parameters()
            if parameter.requires_grad
        ]
        return ZeroGradient.apply(*parameters) if parameters else self.weights.new_zeros(())

    def _remember(self, chosen: dict[int, float]) -> None:
        """Keep {selected layer: weight} on the host, where it decides which heads run."""
        self._chosen = chosen
        self.active = self.layers if self.every_head else tuple(chosen)

    def constants(self) -> dict[str, Tensor]:
        """The buffers: every layer's weight, and whether it is selected."""
        return {
            "weights": torch.tensor([self._chosen.get(layer, 0.0) for layer in self.layers], dtype=torch.float32),
            "selected": torch.tensor([layer in self._chosen for layer in self.layers]),
        }

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the weights and the selection; a state dict from before it held a selection selects weights above 0."""
        if isinstance(state_dict.get(prefix + "weights"), Tensor):
            state_dict.setdefault(prefix + "selected", state_dict[prefix + "weights"] > 0)
            # With assign=True the buffer would take the dtype that it finds.
            state_dict[prefix + "weights"] = state_dict[prefix + "weights"].float()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.selected.is_meta:  # nothing was loaded
            return
        rows = zip(self.layers, self.selected.tolist(), self.weights.tolist())
        chosen = {layer: weight for layer, selected, weight in rows if selected}
        if chosen:
            self._remember(chosen)
        else:
            error_msgs.append(f"{prefix}selected: no layer is selected, expected at least one of {list(self.layers)}")

    def forward(
        self,
        hidden: Mapping[int, Tensor],
        targets: Mapping[str, Tensor],
        mask: Tensor | None = None,
        domains: Domains = None,
        sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar) and metrics.

        Args:
            hidden: {layer: [B, T, D]} for every active layer (others are ignored).
            targets: {teacher: [B, W]} when pooled, else {teacher: [B, T, W]} at the hidden states' frames
                (`align_time`). No gradient reaches them.
            mask: [B, T] bool, the frames that count.
            domains: which samples count for each teacher: {teacher: [B], 0 where not}, or B names of
                teachers, one for each sample; None = all samples for all teachers.
            sample_weight: [B] factors on the samples' losses (`timestep_weight`). Means stay over the rows that
                count, not over the weights: weights whose mean is 1 leave the strength of alignment as it is.
                Not with pooled "relation" and "cka", which compare samples with each other.

        Returns:
            The loss, and detached scalars on the device: "cosine/<teacher>/<layer>", the mean raw cosine of this rank,
            without weights (nan when none of the teacher's samples is in the batch). Of the other objectives
            "relation/..." and "cka/...", 1 - the mean distance, over the sets of two rows or more.

            With several ranks, while gradients are recorded, the loss is this rank's part of the means over the rows of
            all ranks: averaged over the ranks, losses and gradients are those of one process with all rows. Every rank
            must call it (one small all-reduce). Under no_grad means are over this rank's rows.

        Raises:
            ValueError, TypeError: a missing layer or teacher, or a container, type or shape that does not fit, by name.
        """
        form = f"[batch, frames, {self.width}]"
        check_tensors("hidden", hidden, self.active, "hidden state of layer", f"{{layer: {form}}}")
        any_hidden = hidden[self.active[0]]
        for layer in self.active:
            h = hidden[layer]
            if h.dim() != 3 or h.shape[2] != self.width or h.shape != any_hidden.shape:
                raise ValueError(f"hidden[{layer}]: expected {form}, the same for all layers, got {list(h.shape)}")
            if not h.is_floating_point():
                raise ValueError(f"hidden[{layer}]: expected floating point, got {h.dtype}")
        check_targets(self.teachers, targets, any_hidden.shape[: 1 if self.pool else 2])
        check_tensor("mask", mask, any_hidden.shape[:2], torch.bool)
        check_tensor("sample_weight", sample_weight, any_hidden.shape[:1])
        if sample_weight is not None and self.pool is not None and self.objective != "cosine":
            raise ValueError(f"sample_weight: pooled {self.objective!r} compares samples with each other")
        kept = domain_weights(list(self.teachers), domains, any_hidden)
        rows = {name: row_mask(kept[name], mask, targets[name]) for name in self.teachers}
        targets = {name: targets[name].detach() for name in self.teachers}
        if self.standardise_targets:
            targets = {name: standardise(target, mask) for name, target in targets.items()}
        run = self._pooled if self.pool is not None else self._framewise
        frames = counted_frames(kept.values(), mask, any_hidden.shape[1])
        distances = run(hidden, targets, frames, rows, sample_weight)
        shares = self._shares(targets, rows) if takes_global_means(self.process_group) else None
        metrics: dict[str, Tensor] = {}
        loss = any_hidden.new_zeros((), dtype=torch.float32)
        if grouped_ranks() and self.pool is None:
            loss = loss + self._idle(self.active)
        for layer in self.active:
            weight = self.weights[self.layers.index(layer)]
            for name in self.teachers:
                distance, weighted = distances[name, layer]
                counted = rows[name] if self.objective == "cosine" else comparable(rows[name])
                metrics[f"{self.objective}/{name}/{layer}"] = similarity_of(distance, counted)
                loss = loss + weight * (weighted if shares is None else shares[name] * weighted)
        return loss, metrics

    def _shares(self, targets: Mapping[str, Tensor], rows: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """This rank's share of what the means are taken over, for each teacher."""
        if self.objective == "cosine":
            counts = {name: count(rows[name], targets[name]) for name in self.teachers}
        else:  # means are over clips or, pooled, over the ranks' batches
            counts = {name: count(comparable(rows[name]), targets[name][..., 0]) for name in self.teachers}
        return rank_shares(counts, self.process_group)

    def similarity(self, metrics: Mapping[str, Tensor]) -> Tensor:
        """A step's raw cosines in one number, for `SimilarityStop`: their mean over teachers, by the layers' weights.

        Of another objective what it has in their place. nan when no teacher has a sample in the batch."""
        names = [f"{self.objective}/{name}/{layer}" for layer in self.active for name in self.teachers]
        check_tensors("metrics", metrics, names, "metric", "as the loss returns it")
        total = self.weights.new_zeros(())
        for layer in self.active:
            weight = self.weights[self.layers.index(layer)]
            cosine = torch.stack([metrics[f"{self.objective}/{name}/{layer}"] for name in self.teachers]).nanmean()
            total = total + torch.where(weight > 0, weight * cosine, 0)
        return total

    def _norm(self, x: Tensor) -> Tensor:
        # Half-precision hidden states meet heads in float32; without autocast a Linear refuses the mix.
        return F.layer_norm(x.to(next(self.parameters()).dtype), (self.width,))

    def _framewise(
        self,
        hidden: Mapping[int, Tensor],
        targets: Mapping[str, Tensor],
        mask: Tensor | None,
        rows: Mapping[str, Tensor | None],
        sample_weight: Tensor | None,
    ) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        """{(teacher, layer): (mean distance [], the same with the samples' weights [])}, one head after the other."""
        distances = {}
        for layer in self.active:
            x = hidden[layer]
            if mask is not None:
                # Before the norm: the gradient of a padded frame that holds nan is nan, even where the loss is 0.
                x = torch.where(mask.unsqueeze(-1), x, 0)
            x = self._norm(x)
            for name in self.teachers:
                head: Any = self.heads.get_submodule(f"{name}.{layer}")
                if self.objective != "cosine":
                    by_clip = RELATIONAL[self.objective](head(x), targets[name], rows[name])
                    clips = comparable(rows[name])
                    by_clip = by_clip if clips is None else torch.where(clips, by_clip, 0)
                    mean = weighted = mean_of(by_clip, clips)
                    if sample_weight is not None:
                        weighted = mean_of(by_clip * where_counted(sample_weight, clips), clips)
                elif sample_weight is None:
                    mean = weighted = head.loss(x, targets[name], rows[name])
                else:
                    row_loss = head.loss(x, targets[name], rows[name], reduction="none")
                    mean = mean_of(row_loss, rows[name])
                    weights = where_counted(sample_weight.unsqueeze(1), rows[name])
                    weighted = mean_of(row_loss * weights, rows[name])
                distances[name, layer] = mean, weighted
        return distances

    def _pooled(
        self,
        hidden: Mapping[int, Tensor],
        targets: Mapping[str, Tensor],
        mask: Tensor | None,
        rows: Mapping[str, Tensor | None],
        sample_weight: Tensor | None,
    ) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        """The same of pooled states: all heads at once, at shapes that the batch cannot change."""
        x = self._norm(torch.stack([ops.masked_mean(hidden[layer], mask) for layer in self.active]))
        keys = [(name, layer) for name in self.teachers for layer in self.active]
        heads: list[Any] = [self.heads.get_submodule(f"{name}.{layer}") for name, layer in keys]
        distances: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        run = one_by_one if x.device.type == "cpu" else grouped
        for members, y in run(heads, x.repeat(len(self.teachers), 1, 1)):
            names = [keys[i][0] for i in members]
            target = torch.stack([targets[name] for name in names])
            # Which rows count may be said for one teacher and not for another.
            counted = [rows[name] for name in names]
            row = None
            if any(r is not None for r in counted):
                every = y.new_ones(y.shape[1], dtype=torch.bool)
                row = torch.stack([every if r is None else r for r in counted])
            if self.objective != "cosine":
                distance = RELATIONAL[self.objective](y, target, row)
                sets = comparable(row)
                means = weighted = (distance if sets is None else torch.where(sets, distance, 0)).unbind()
            else:
                loss = ops.cosine_loss(y, target, mask=row, reduction="none")
                count = y.shape[1] if row is None else row.sum(1).clamp_min(1)
                means = weighted = (loss.sum(1) / count).unbind()
                if sample_weight is not None:
                    weighted = ((loss * where_counted(sample_weight, row)).sum(1) / count).unbind()
            distances |= {keys[i]: pair for i, pair in zip(members, zip(means, weighted))}
        return distances
