"""`AlignmentStep`: the alignment loss of one training step. It takes hidden states and knows no network."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .loss import AlignmentLoss
from .rows import Domains, check_kind
from .schedule import SimilarityStop
from .self_targets import SelfTargets

Targets = Mapping[str, Tensor | Callable[[], Tensor]]
States = Mapping[int, Tensor]  # {layer: [B, T, D]}


class AlignmentStep:
    """The loss, the targets that come from the network itself, and the stop by similarity.

    A training step that is compiled or recorded as one function holds `evaluate`, which changes nothing here, and
    `strength`, whose value changes in place; after the backward pass `observe`. `topology` says when the function has
    to be made anew.

    Attributes:
        loss_fn: the `AlignmentLoss` with the heads. self_targets: the `SelfTargets`. stop: a `SimilarityStop`, or None.
        strength: what the loss is multiplied by, a scalar on the device. on: whether it is above 0.
    """

    def __init__(self, loss_fn: AlignmentLoss, self_targets: SelfTargets, stop: SimilarityStop | None) -> None:
        self.loss_fn, self.self_targets, self.stop = loss_fn, self_targets, stop
        self.strength = torch.zeros((), device=next(loss_fn.parameters()).device)
        self.on = False

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose hidden states the loss takes, as aligned ones or as targets."""
        return tuple(sorted({*self.loss_fn.active, *self.self_targets.wanted(averaged=False)}))

    @property
    def averaged_layers(self) -> tuple[int, ...]:
        """The layers of the model's moving average whose hidden states are targets (`SelfFlow`)."""
        return self.self_targets.wanted(averaged=True)

    @property
    def topology(self) -> Hashable:
        """Which heads run, and toward which layers. When this changes, a step is compiled or recorded anew."""
        targets = self.self_targets.layers
        return self.on and tuple((name, layer, targets.get(name)) for name, layer in self.loss_fn.active_heads)

    def align(self, strength: float) -> None:
        """Multiply the loss by `strength` from now on; at 0 run no head."""
        device = next(self.loss_fn.parameters()).device
        if self.strength.device != device:
            self.strength = self.strength.to(device)
        self.strength.fill_(strength)
        self.on = strength > 0

    def evaluate(
        self,
        hidden: States,
        targets: Targets | None = None,
        mask: Tensor | None = None,
        domains: Domains = None,
        sample_weight: Tensor | None = None,
        t: Tensor | None = None,
        *,
        averaged: States | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The alignment loss without any factor, and the cosines; also for held-out batches.

        Args:
            hidden: the hidden states of `layers`. averaged: those of `averaged_layers`, of the model's average.
            targets: {teacher: features [B, W] or [B, T, W]}, or functions without arguments that return them (a live
                teacher, features read from a file), called without gradient. Leave out `LayerSync` and `SelfFlow`,
                whose targets are hidden states.
            mask, domains, sample_weight, t: see `AlignmentLoss.forward`, also for what is returned.
        """
        check_kind("targets", targets, Mapping | None, "{teacher: features}")
        with torch.no_grad():
            features = {name: target() if callable(target) else target for name, target in (targets or {}).items()}
        pool = self.loss_fn.pool
        features |= self.self_targets.of(hidden, averaged=False, pool=pool, mask=mask)
        features |= self.self_targets.of(averaged or {}, averaged=True, pool=pool, mask=mask)
        return self.loss_fn(hidden, features, mask, domains, sample_weight, t)

    def observe(self, metrics: Mapping[str, Tensor]) -> None:
        """Note the cosines of an aligned step, which decide whether alignment goes on (`stop_similarity`)."""
        if self.stop is not None:
            self.stop(self.loss_fn.similarity(metrics))

    def gradient_cosines(
        self,
        loss: Tensor,
        hidden: States,
        targets: Targets | None = None,
        mask: Tensor | None = None,
        domains: Domains = None,
        t: Tensor | None = None,
        *,
        averaged: States | None = None,
    ) -> dict[str, Tensor]:
        """Whether `loss` and alignment pull a hidden state the same way: the cosine of their gradients at each layer.

        Parameters' gradients stay as they are.

        Args:
            loss: a scalar on the graph of `hidden`, the flow loss say. Other arguments as those of `evaluate`.

        Returns:
            {"gradient_cosine/<layer>": scalar}, nan for a layer on which no aligned target depends.
        """
        aligned, _ = self.evaluate(hidden, targets, mask, domains, t=t, averaged=averaged)
        layers = self.loss_fn.active
        states = [hidden[layer] for layer in layers]
        pairs = [torch.autograd.grad(one, states, retain_graph=True) for one in (loss, aligned)]
        cosines = {}
        for layer, one, two in zip(layers, *pairs):
            one, two = one.flatten().float(), two.flatten().float()
            cosines[f"gradient_cosine/{layer}"] = torch.dot(one, two) / (one.norm() * two.norm())
        return cosines

    def param_groups(self, weight_decay: float = 0.0, **options: Any) -> list[dict[str, Any]]:
        """Optimizer groups: the heads' matrices with `weight_decay`, their biases without; `options`: lr, say."""
        parameters = list(self.loss_fn.parameters())
        matrices = [p for p in parameters if p.dim() > 1]
        vectors = [p for p in parameters if p.dim() <= 1]
        groups = [(matrices, weight_decay), (vectors, 0.0)]
        return [{"params": params, "weight_decay": decay, **options} for params, decay in groups if params]

    def freeze_idle(self) -> None:
        """Let only the heads that run now ask for gradients. A wrapper that waits for gradients is then built anew."""
        self.require_gradients(self.loss_fn.active_heads if self.on else ())

    def require_gradients(self, running: Iterable[tuple[str, int]]) -> None:
        """Let only the heads of these (teacher, layer) ask for gradients, in one process and in several."""
        running = set(running)
        for name, heads in self.loss_fn.heads.named_children():
            for layer, head in heads.named_children():
                head.requires_grad_((name, int(layer)) in running)

    def state_dict(self) -> dict[str, Any]:
        """The heads with their weights, and the stop. Tensors."""
        return {"loss": self.loss_fn.state_dict(), "stop": None if self.stop is None else self.stop.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of the same teachers and heads.

        Raises:
            ValueError: it belongs to others; names the first entry that does not fit."""
        own = self.loss_fn.state_dict()
        for name in (*own, *state["loss"]):
            mine, other = own.get(name), state["loss"].get(name)
            if mine is None or other is None or mine.shape != other.shape:
                shapes = " and ".join("none" if value is None else str(list(value.shape)) for value in (mine, other))
                raise ValueError(f"state: loss.{name}: here and there {shapes}: other layers, teachers or heads")
        if (self.stop is None) != (state["stop"] is None):
            raise ValueError("state: stop: only one of the two has stop_similarity")
        self.loss_fn.load_state_dict(state["loss"])
        if self.stop is not None:
            self.stop.load_state_dict(state["stop"])
