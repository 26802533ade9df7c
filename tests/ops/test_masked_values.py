"""What a mask leaves out must not matter, whatever it holds: not in a result, and not in a gradient."""

from __future__ import annotations

import pytest
import torch

from agrepa_fast import (
    AlignmentLoss,
    DiT,
    DiTConfig,
    InterfaceLoss,
    LayerSelection,
    TokenConditioner,
    align_time,
    attribute_layers,
    ops,
)
from agrepa_fast.alignment.similarity import cka_distance, relation_distance, standardise
from agrepa_fast.attribution.gradients import first_order_scores
from agrepa_fast.models.flow import flow_matching_loss

RUBBISH = [float("nan"), float("inf"), -float("inf"), 1e38, -7.0]
B, T, D, W = 3, 6, 8, 5
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
ROWS = torch.tensor([True, False, True])
KEPT = ROWS[:, None] & MASK


def spoil(value: torch.Tensor, kept: torch.Tensor, rubbish: float) -> torch.Tensor:
    """`value` with `rubbish` where `kept`, which covers its first dimensions, is False."""
    kept = kept.reshape(kept.shape + (1,) * (value.dim() - kept.dim()))
    return torch.where(kept, value, torch.tensor(rubbish).to(value.dtype))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def alignment(objective: str, pool: str | None, head: str):
    torch.manual_seed(0)
    loss = AlignmentLoss(D, {"a": W, "b": W}, LayerSelection.uniform((0, 1)), pool, head, objective)
    weighted = objective == "cosine" or pool is None
    rows = (B,) if pool else (B, T)

    def run(rubbish):
        # Sample 1 is not of teacher "a", and nothing of "b" counts but sample 0.
        domains = {"a": ROWS, "b": torch.tensor([True, False, False])}
        hidden = {layer: spoil(randn(B, T, D, seed=layer), KEPT, rubbish).requires_grad_() for layer in (0, 1)}
        kept = {name: domain if pool else domain[:, None] & MASK for name, domain in domains.items()}
        targets = {name: spoil(randn(*rows, W, seed=5), kept[name], rubbish) for name in domains}
        weight = spoil(torch.rand(B, generator=torch.Generator().manual_seed(1)), ROWS, rubbish) if weighted else None
        value, metrics = loss(hidden, targets, MASK, domains, weight)
        value.backward()
        gradients = [p.grad.clone() for p in loss.parameters()]
        loss.zero_grad()
        return value, *metrics.values(), *gradients, *(torch.where(KEPT[..., None], h.grad, 0) for h in hidden.values())

    return run


def of_network(kind: str):
    torch.manual_seed(0)
    model = DiT(DiTConfig(2, D, 2, W, 3, 2, 0.0, 16)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    def run(rubbish):
        x, cond = (spoil(randn(B, T, size, seed=size), MASK, rubbish).requires_grad_() for size in (W, 3))
        t = torch.tensor([0.2, 0.5, 0.9])
        if kind == "attribute":
            scores = attribute_layers(model, {"x_t": x.detach(), "t": t, "cond": cond.detach(), "mask": MASK})
            return scores.by_sample, scores.noise_by_sample
        if kind == "first order":
            inputs = {"x_t": x.detach(), "t": t, "cond": cond.detach(), "mask": MASK}
            return (first_order_scores(model, inputs).scores.by_sample,)
        velocity, hidden = model(x, t, cond, MASK, hidden_layers=[0, 1])
        target = spoil(randn(B, T, W, seed=9), MASK, rubbish)
        loss = flow_matching_loss(velocity, target, MASK)
        loss.sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        states = [torch.where(MASK[..., None], state, 0) for state in (velocity, *hidden.values(), x.grad, cond.grad)]
        return loss, *gradients, *states

    return run


def of_loss(function, **options):
    """A cosine loss of rows [B, T, W], some left out by the mask, some by a weight of 0."""

    def run(rubbish):
        y = spoil(randn(B, T, W), MASK, rubbish).requires_grad_()
        target = spoil(randn(B, T, W, seed=1), MASK, rubbish)
        weight = spoil(torch.rand(B, T, generator=torch.Generator().manual_seed(2)), MASK, rubbish)
        arguments = {"mask": MASK, "sample_weight": weight, **options}
        if function is ops.cosine_loss:
            loss, parameters = function(y, target, **arguments), ()
        else:
            parameters = (randn(W, W, seed=3).requires_grad_(), randn(W, seed=4).requires_grad_())
            loss = function(y, *parameters, target, **arguments)
        loss.sum().backward()
        return loss, torch.where(MASK[..., None], y.grad, 0), *(p.grad for p in parameters)

    return run


def of_int8_targets(rubbish):
    y = randn(B, T, W).requires_grad_()
    target = torch.randint(-127, 128, (B, T, W), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    scale = spoil(torch.rand(B, T, generator=torch.Generator().manual_seed(2)), MASK, rubbish)
    loss = ops.cosine_loss(y, target, mask=MASK, target_scale=scale)
    loss.backward()
    return loss, y.grad


def of_pooling(rubbish):
    x = spoil(randn(B, T, D), MASK, rubbish).requires_grad_()
    streams = spoil(randn(B, T, 2 * D, seed=1), MASK, rubbish).unflatten(2, (2, D)).movedim(2, 0).requires_grad_()
    mean, (change, energy) = ops.masked_mean(x, MASK), ops.velocity_delta(streams, MASK)
    (mean.sum() + change.sum() + energy.sum()).backward()
    return mean, change, energy, *(torch.where(MASK[..., None], value, 0) for value in (x.grad, streams.grad))


def of_distances(rubbish):
    y, target = spoil(randn(B, T, D), MASK, rubbish).requires_grad_(), spoil(randn(B, T, W, seed=1), MASK, rubbish)
    results = [relation_distance(y, target, MASK), cka_distance(y, target, MASK), standardise(target, MASK)]
    sum(result.sum() for result in results).backward()
    return *results, y.grad


def of_tokens(rubbish):
    torch.manual_seed(0)
    conditioner = TokenConditioner({"text": 11, "sound": 7}, 4, secondary=3)
    lengths = torch.tensor([5, 2, 0])
    tokens = torch.randint(0, 3, (B, 5, 2), generator=torch.Generator().manual_seed(1))
    outside = torch.arange(5) >= lengths[:, None]
    tokens[outside] = {float("inf"): 10**9, 1e38: 255}.get(rubbish, -1)
    embedded = conditioner(tokens, lengths, torch.tensor([0, 1, 1]), torch.arange(T) < torch.tensor([[6], [4], [3]]))
    embedded.square().sum().backward()
    return embedded, *(p.grad for p in conditioner.parameters())


def of_interface(rubbish):
    torch.manual_seed(0)
    loss = InterfaceLoss(D, {"a": W}, {"a": 0.5})
    embedding = spoil(randn(B, T, D), KEPT, rubbish).requires_grad_()
    targets = {"a": spoil(randn(B, W, seed=1), ROWS, rubbish)}
    value, metrics = loss(embedding, targets, MASK, {"a": torch.ones(B, dtype=torch.bool)}, ROWS)
    value.backward()
    return (
        value,
        *metrics.values(),
        *(p.grad for p in loss.parameters()),
        torch.where(KEPT[..., None], embedding.grad, 0),
    )


def of_resampling(rubbish):
    teacher = spoil(randn(B, T, W), MASK, rubbish).requires_grad_()
    aligned, valid = align_time(teacher, teacher_rate=50, student_rate=75, frames=9, teacher_mask=MASK)
    aligned.square().sum().backward()
    return aligned, valid, torch.where(MASK[..., None], teacher.grad, 0)


CASES = {
    "cosine_loss": of_loss(ops.cosine_loss),
    "cosine_loss rows": of_loss(ops.cosine_loss, reduction="none"),
    "cosine_loss int8": of_int8_targets,
    "projection_cosine_loss": of_loss(ops.projection_cosine_loss),
    "projection_cosine_loss rows": of_loss(ops.projection_cosine_loss, reduction="none", chunk=4),
    "pooling": of_pooling,
    "distances": of_distances,
    "tokens": of_tokens,
    "BiT-C": of_interface,
    "align_time": of_resampling,
    "DiT": of_network("train"),
    "attribute_layers": of_network("attribute"),
    "first_order_scores": of_network("first order"),
    **{
        f"AlignmentLoss {objective} {pool} {head}": alignment(objective, pool, head)
        for objective in ("cosine", "relation", "cka")
        for pool, head in (("mean", "mlp"), (None, "repa"), (None, "linear"))
    },
}


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_masked_does_not_matter(name, mode, monkeypatch):
    monkeypatch.setattr(ops.dispatch, "MODE", mode)
    run = CASES[name]
    clean = run(0.25)
    assert any(value.any() for value in clean)
    for rubbish in RUBBISH:
        for expected, value in zip(clean, run(rubbish), strict=True):
            assert torch.equal(value.nan_to_num(-1.0), expected.nan_to_num(-1.0)), (name, rubbish)
            assert value.isfinite().equal(expected.isfinite())


def test_a_weight_that_counts_still_counts():
    """nan where it counts is the caller's own, and must be seen."""
    y, target = randn(B, W), randn(B, W, seed=1)
    assert ops.cosine_loss(y, target, sample_weight=torch.tensor([1.0, float("nan"), 1.0])).isnan()
