"""Representation alignment: pull chosen hidden states toward frozen teachers.

    L = sum_teacher sum_k lambda_k mean_rows(1 - cos(head_k(norm(pool(h_k))), teacher))

or, in place of 1 - cos, a distance between the relations of the rows (`similarity`). Each teacher has its own heads
and its own weights lambda_k; these may depend on a sample's flow time (`weights`). hidden {layer: [B, T, D]};
targets {teacher: [B, W] pooled or [B, T, W] per frame}. Layers and teachers are paired by name, never by position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..errors import UserError
from .heads import HEADS, grouped, one_by_one
from .rows import (
    Domains,
    ZeroGradient,
    check_targets,
    check_teachers,
    check_tensor,
    check_tensors,
    check_times,
    check_width,
    comparable,
    count,
    counted_frames,
    domain_weights,
    grouped_ranks,
    means_of,
    rank_shares,
    row_mask,
    similarity_of,
    stacked,
    takes_global_means,
)
from .selection import Selection, by_teacher
from .similarity import OBJECTIVES, related, standardise
from .weights import LayerWeights, upgrade

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _check_pool(pool: str | None) -> None:
    if pool not in ("mean", None):
        raise ValueError(f'pool: expected "mean" or None (frame by frame), got {pool!r}')


class AlignmentLoss(nn.Module):
    """AG-REPA's loss over the layers of a selection, one head for each teacher and layer.

    The heads live here, outside the backbone: their own parameters and state dict, nothing at inference.
    `select` changes the weights in place. Pooled heads cost next to nothing, so all of them always run. Frame-wise
    heads cost more, so only those of the selected layers (`active_heads`) run, unless weights change with flow time
    (or `every_head`). In one process the others get no gradient; in a process group their gradients are exactly zero,
    because DistributedDataParallel waits for every parameter.

    Args:
        width: D of the hidden states.
        teachers: {name: width of its features}.
        selection: the layers that get heads, and their weights: a `LayerSelection` for all teachers, or
            {teacher: LayerSelection}. With weighting "by-time" the weights depend on each sample's flow time.
        pool: "mean" over the valid frames (AG-REPA; targets [B, W]), or None, frame by frame (REPA; [B, T, W]).
        head: "mlp" (AG-REPA's), "repa", "linear", "low-rank", or, frame by frame, "conv"; see `heads`.
        objective: "cosine"; or how the rows relate, of each clip's frames (or, pooled, of the batch's clips):
            "relation" (their matrices of cosines) or "cka" (linear CKA); see `similarity`.
        standardise_targets: each channel of the targets to mean 0 and variance 1 over the clip's frames that count
            (iREPA); frame by frame only.
        process_group: the ranks over whose rows means are taken while gradients are recorded; None: all ranks. With
            a group of this rank alone (`new_group([rank])`) each rank takes its own means.
        every_head: frame by frame, run the heads of unselected layers too (with weight 0). It costs their forward and
            backward pass; in return `select` changes nothing that torch.compile has traced.

    Raises:
        UserError, ValueError, TypeError: an argument that does not fit, by name.
    """

    def __init__(
        self,
        width: int,
        teachers: Mapping[str, int],
        selection: Selection,
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
        selections = by_teacher(selection, teachers)
        if len({len(own.t_grid) for own in selections.values()}) > 1:
            raise UserError(
                "selection: expected scores at as many times for each teacher, or weights that are constant"
            )
        self.width = width
        self.teachers = dict(teachers)
        self.layers = tuple(sorted({layer for own in selections.values() for layer in own.layers}))
        self.pool = pool
        self.process_group = process_group
        self.objective = objective
        self.standardise_targets = standardise_targets
        self.heads = nn.ModuleDict(
            {
                name: nn.ModuleDict({str(layer): HEADS[head](width, size) for layer in selections[name].layers})
                for name, size in self.teachers.items()
            }
        )
        self.layer_weights = nn.ModuleDict({name: LayerWeights(own) for name, own in selections.items()})
        self.by_time = any(own.t_grid for own in selections.values())
        self.every_head = every_head or pool is not None or self.by_time
        if self.by_time and self._compares_samples:
            raise UserError(
                f"selection: pooled {objective!r} compares samples with each other, which have weights of "
                'their own with weighting "by-time"'
            )

    @property
    def _compares_samples(self) -> bool:
        """Whether a row of the loss is the batch, so that a sample has no loss of its own."""
        return self.pool is not None and self.objective != "cosine"

    @property
    def weights(self) -> Tensor:
        """[teachers, layers] float32, a copy; 0 where a layer has no head for the teacher. By flow time, means."""
        rows = []
        for name in self.teachers:
            own = self._weights_of(name)
            row = own.weights.new_zeros(len(self.layers))
            row[[self.layers.index(layer) for layer in own.layers]] = own.weights
            rows.append(row)
        return torch.stack(rows)

    @property
    def active_heads(self) -> tuple[tuple[str, int], ...]:
        """(teacher, layer) of the heads that run."""
        pairs = []
        for name in self.teachers:
            own = self._weights_of(name)
            pairs += [(name, layer) for layer in (own.layers if self.every_head else own.chosen)]
        return tuple(pairs)

    @property
    def active(self) -> tuple[int, ...]:
        """The layers whose hidden states the loss needs."""
        return tuple(sorted({layer for _, layer in self.active_heads}))

    def _weights_of(self, name: str) -> LayerWeights:
        return self.layer_weights.get_submodule(name)  # type: ignore[return-value]

    def select(self, selection: Selection) -> None:
        """Take the weights of another selection among the layers that have heads; the others get 0.

        Raises:
            ValueError: a layer without a head, a teacher that is unknown or left out, or weights by flow time in a
                loss that was built without.
        """
        selections = by_teacher(selection, self.teachers)
        for name, own in selections.items():  # all or none
            self._weights_of(name).check(own)
        for name, own in selections.items():
            self._weights_of(name).select(own)

    def idle(self) -> Tensor:
        """0, a scalar that gives every head a gradient of exactly zero.

        With several processes, add it to the loss of a step that leaves alignment out: DistributedDataParallel waits
        for a gradient of every parameter in every step."""
        return self._idle(())

    def _idle(self, active: Sequence[tuple[str, int]]) -> Tensor:
        """0, which gives all heads but the active ones a gradient of exactly zero."""
        parameters = [
            parameter
            for name, heads in self.heads.named_children()
            for layer, head in heads.named_children()
            if (name, int(layer)) not in active
            for parameter in head.parameters()
            if parameter.requires_grad
        ]
        return ZeroGradient.apply(*parameters) if parameters else next(self.parameters()).new_zeros(())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Load also a state dict that an earlier version wrote."""
        state = upgrade(state_dict, self.teachers, prefix)
        state_dict.clear()
        state_dict.update(state)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(
        self,
        hidden: Mapping[int, Tensor],
        targets: Mapping[str, Tensor],
        mask: Tensor | None = None,
        domains: Domains = None,
        sample_weight: Tensor | None = None,
        t: Tensor | None = None,
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
            t: [B] the samples' flow times. Needed where the weights depend on them, and without effect elsewhere.

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
        active = self.active
        check_tensors("hidden", hidden, active, "hidden state of layer", f"{{layer: {form}}}")
        any_hidden = hidden[active[0]]
        for layer in active:
            h = hidden[layer]
            if h.dim() != 3 or h.shape[2] != self.width or h.shape != any_hidden.shape or 0 in h.shape:
                of = "empty" if 0 in h.shape else str(list(h.shape))
                raise ValueError(f"hidden[{layer}]: expected {form}, the same for all layers, got {of}")
            if not h.is_floating_point():
                raise ValueError(f"hidden[{layer}]: expected floating point, got {h.dtype}")
        check_targets(self.teachers, targets, any_hidden.shape[: 1 if self.pool else 2])
        check_tensor("mask", mask, any_hidden.shape[:2], torch.bool)
        check_tensor("sample_weight", sample_weight, any_hidden.shape[:1])
        if sample_weight is not None and self._compares_samples:
            raise ValueError(f"sample_weight: pooled {self.objective!r} compares samples with each other")
        check_tensor("t", t, any_hidden.shape[:1])
        if self.by_time and (t is None or not t.is_floating_point()):
            raise ValueError(f"t: expected floating point [{any_hidden.shape[0]}], as the weights depend on it")
        if self.by_time and t is not None:
            check_times(t)
        kept = domain_weights(list(self.teachers), domains, any_hidden)
        rows = {name: row_mask(kept[name], mask, targets[name]) for name in self.teachers}
        targets = {name: targets[name].detach() for name in self.teachers}
        if self.standardise_targets:
            targets = {name: standardise(target, mask) for name, target in targets.items()}
        factors = self._factors(sample_weight, t)
        run = self._pooled if self.pool is not None else self._framewise
        frames = counted_frames(kept.values(), mask, any_hidden.shape[1])
        distances = dict(run(hidden, targets, frames, rows, factors))
        shares = self._shares(targets, rows) if takes_global_means(self.process_group) else None
        metrics: dict[str, Tensor] = {}
        loss = any_hidden.new_zeros((), dtype=torch.float32)
        if grouped_ranks() and self.pool is None:
            loss = loss + self._idle(self.active_heads)
        for layer, name in ((layer, name) for layer in active for name in self.teachers if (name, layer) in distances):
            distance, weighted = distances[name, layer]
            counted = rows[name] if self.objective == "cosine" else comparable(rows[name])
            metrics[f"{self.objective}/{name}/{layer}"] = similarity_of(distance, counted)
            if shares is not None:
                weighted = shares[name] * weighted
            if not self.by_time:
                own = self._weights_of(name)
                weighted = own.weights[own.layers.index(layer)] * weighted
            loss = loss + weighted
        return loss, metrics

    def _factors(self, sample_weight: Tensor | None, t: Tensor | None) -> dict[tuple[str, int], Tensor | None]:
        """{(teacher, layer): [B] factors on the samples' losses}: sample_weight and, by flow time, the weights."""
        if not self.by_time or t is None:
            return dict.fromkeys(self.active_heads, sample_weight)
        factors: dict[tuple[str, int], Tensor | None] = {}
        for name in self.teachers:
            own = self._weights_of(name)
            weights = own.at(t) if sample_weight is None else own.at(t) * sample_weight
            factors |= {(name, layer): weight for layer, weight in zip(own.layers, weights.unbind())}
        return factors

    def _shares(self, targets: Mapping[str, Tensor], rows: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """This rank's share of what the means are taken over, for each teacher."""
        if self.objective == "cosine":
            counts = {name: count(rows[name], targets[name]) for name in self.teachers}
        else:  # means are over clips or, pooled, over the ranks' batches
            counts = {name: count(comparable(rows[name]), targets[name][..., 0]) for name in self.teachers}
        return rank_shares(counts, self.process_group, self._must_agree())

    def _must_agree(self) -> list[Tensor]:
        """The values that all ranks must share: the weights, and which heads run."""
        like = next(iter(self.layer_weights.buffers()))
        values = []
        if not self.every_head:
            active = self.active_heads
            runs = [(name, layer) in active for name in self.teachers for layer in self._weights_of(name).layers]
            # As whole numbers, 20 heads each: float32 holds them, and the device gets them without a copy.
            chunks = [sum(2**i for i, on in enumerate(runs[n : n + 20]) if on) for n in range(0, len(runs), 20)]
            values = [like.new_full((1,), chunk, dtype=torch.float32) for chunk in chunks]
        return [*values, *(buffer.float() for buffer in self.layer_weights.buffers())]

    def similarity(self, metrics: Mapping[str, Tensor]) -> Tensor:
        """A step's raw cosines in one number, for `SimilarityStop`: the mean over layers by their weights, then over
        the teachers that have a sample in the batch; nan when none has. Of another objective what it has in place of
        cosines."""
        names = [f"{self.objective}/{name}/{layer}" for name, layer in self.active_heads]
        check_tensors("metrics", metrics, names, "metric", "as the loss returns it")
        means = []
        for name in self.teachers:
            own = self._weights_of(name)
            total = own.weights.new_zeros(())
            for weight, layer in zip(own.weights.unbind(), own.layers):
                if f"{self.objective}/{name}/{layer}" in names:
                    cosine = metrics[f"{self.objective}/{name}/{layer}"]
                    total = total + torch.where(weight > 0, weight * cosine, 0)
            means.append(total / own.weights.sum())
        return torch.stack(means).nanmean()

    def _norm(self, x: Tensor) -> Tensor:
        # Half-precision hidden states meet heads in float32; without autocast a Linear refuses the mix.
        return F.layer_norm(x.to(next(self.parameters()).dtype), (self.width,))

    def _head(self, name: str, layer: int) -> Any:
        return self.heads.get_submodule(f"{name}.{layer}")

    def _framewise(
        self,
        hidden: Mapping[int, Tensor],
        targets: Mapping[str, Tensor],
        mask: Tensor | None,
        rows: Mapping[str, Tensor | None],
        factors: Mapping[tuple[str, int], Tensor | None],
    ) -> Iterator[tuple[tuple[str, int], tuple[Tensor, Tensor]]]:
        """((teacher, layer), (mean distance [], the same with the samples' factors [])), one head after the other."""
        keys = self.active_heads
        for layer in self.active:
            x = hidden[layer]
            if mask is not None:
                # Before the norm: the gradient of a padded frame that holds nan is nan, even where the loss is 0.
                x = torch.where(mask.unsqueeze(-1), x, 0)
            x = self._norm(x)
            for name in [name for name, other in keys if other == layer]:
                head, target, row, factor = self._head(name, layer), targets[name], rows[name], factors[name, layer]
                if self.objective != "cosine":
                    distances = related(self.objective, head(x), target, row)
                    yield (name, layer), means_of(distances, comparable(row), factor)
                elif factor is None:  # fused: the rows' losses are not kept
                    mean = head.loss(x, target, row)
                    yield (name, layer), (mean, mean)
                else:
                    losses = head.loss(x, target, row, reduction="none")
                    yield (name, layer), means_of(losses, row, factor.unsqueeze(1))

    def _pooled(
        self,
        hidden: Mapping[int, Tensor],
        targets: Mapping[str, Tensor],
        mask: Tensor | None,
        rows: Mapping[str, Tensor | None],
        factors: Mapping[tuple[str, int], Tensor | None],
    ) -> Iterator[tuple[tuple[str, int], tuple[Tensor, Tensor]]]:
        """The same of pooled states: all heads at once, at shapes that the batch cannot change."""
        keys, active = self.active_heads, self.active
        x = self._norm(torch.stack([ops.masked_mean(hidden[layer], mask) for layer in active]))
        of_teachers = []
        for name in self.teachers:
            layers = self._weights_of(name).layers
            of_teachers.append(x if layers == active else torch.stack([x[active.index(layer)] for layer in layers]))
        run = one_by_one if x.device.type == "cpu" else grouped
        for members, y in run([self._head(*key) for key in keys], torch.cat(of_teachers)):
            names = [keys[i][0] for i in members]
            target = torch.stack([targets[name] for name in names])
            row = stacked([rows[name] for name in names], y.new_ones(y.shape[1], dtype=torch.bool))
            if self.objective != "cosine":
                means = weighted = related(self.objective, y, target, row)
            else:
                losses = ops.cosine_loss(y, target, mask=row, reduction="none")
                factor = stacked([factors[keys[i]] for i in members], None)
                means, weighted = means_of(losses, row, factor, dim=1)
            yield from zip([keys[i] for i in members], zip(means.unbind(), weighted.unbind()))
