"""One training step on cached teacher features: forward, flow-matching and alignment loss, backward, clip, AdamW.

Least work: three times the forward's operations (backward has two products for each). Every provider starts from the
same weights; the gate compares the first step's loss and gradient norm. "cost" compares our step with alignment, which
has heads on every layer as in a run, with our step without; there the gate compares the flow-matching loss. At paper
size one provider is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from agrepa_fast.alignment.loss import AlignmentLoss
from agrepa_fast.alignment.policy import LayerSelection
from agrepa_fast.models.cost import forward_flops
from agrepa_fast.models.dit import PRESETS, DiT, DiTConfig
from agrepa_fast.models.flow import SIGMA, flow_matching_loss, path

from ..case import Outputs, Problem, Provider, Run, Setup, compiled, dtype_of
from ..published import published, random_dit
from .foga import TOY, precision

TITLE = "Training step"
TEACHERS = {"speech": 1280, "audio": 768}  # Whisper-large-v3 and BEATs
ALIGN_WEIGHT = 0.5
BOUND = {"float32": 1e-5, "bfloat16": 3e-2}
CLIP = 1.0
# The released code always trains in float32; its row says so beside the ratio.
RELEASED_FORM = {"float32": "released form", "bfloat16": "released form, float32"}


def problems(scale: str, device: torch.device) -> list[Problem]:
    if scale == "toy":
        return [_problem("toy", TOY, 2, 16, align, "float32") for align in ("on", "off", "cost")]
    if device.type == "cpu":
        sizes = [("demo", 4, 128)] if scale == "quick" else [("demo", 6, 128), ("small", 4, 256)]
        chosen = [
            _problem(name, PRESETS[name], b, t, align, "float32") for name, b, t in sizes for align in ("on", "off")
        ]
        return chosen if scale == "quick" else [*chosen, _problem("small", PRESETS["small"], 4, 256, "cost", "float32")]
    sizes = [("paper", 16, 938), ("small", 16, 938)] if scale == "full" else [("small", 16, 938)]
    return [_problem(name, PRESETS[name], b, t, align, "bfloat16") for name, b, t in sizes for align in ("on", "off")]


def _problem(name: str, config: DiTConfig, batch: int, frames: int, align: str, dtype: str) -> Problem:
    # No dropout: every implementation draws other numbers, and the losses could not be compared.
    config = dataclasses.replace(config, dropout=0.0)
    forward = forward_flops(config, batch, frames)
    weights = config.depth * (4 + 2 * config.ff_ratio + 6) * config.width**2
    moved = 4 * 8 * weights + dtype_of(dtype).itemsize * 3 * config.depth * 12 * batch * frames * config.width
    return Problem(
        params={
            "preset": name,
            "align": align,
            "layers": config.depth,
            "width": config.width,
            "frames": frames,
            "batch": batch,
            "dtype": dtype,
        },
        dtype=dtype,
        bytes=moved,  # AdamW reads and writes weight, gradient and two moments (float32), and the streams as in FoG-A
        flops=3 * forward,
        build=functools.partial(_build_cost, config, batch, frames, dtype)
        if align == "cost"
        else functools.partial(_build, config, batch, frames, align == "on", dtype),
        alone=name == "paper",
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """One batch: mel, noise [B, T, M], t [B], cond [B, T, C]; pooled teacher features {name: [B, W]}; domains."""

    mel: Tensor
    noise: Tensor
    t: Tensor
    cond: Tensor
    targets: dict[str, Tensor]
    domains: dict[str, Tensor]

    def to(self, dtype: torch.dtype) -> Data:
        targets = {name: value.to(dtype) for name, value in self.targets.items()}
        mel, noise, t, cond = (value.to(dtype) for value in (self.mel, self.noise, self.t, self.cond))
        return Data(mel, noise, t, cond, targets, self.domains)


def _draw(config: DiTConfig, batch: int, frames: int, device: torch.device) -> Data:
    draw = functools.partial(torch.randn, device=device)
    speech = torch.arange(batch, device=device) % 2 == 0
    return Data(
        mel=draw(batch, frames, config.mels),
        noise=SIGMA * draw(batch, frames, config.mels),
        t=torch.rand(batch, device=device),
        cond=draw(batch, frames, config.cond),
        targets={name: draw(batch, width) for name, width in TEACHERS.items()},
        domains={"speech": speech, "audio": ~speech},
    )


def selected(depth: int) -> LayerSelection:
    """The paper's layers (its L1, L2 and L7 of 24), or those of them that a shallower network has."""
    return LayerSelection.uniform(sorted({min(layer, depth - 1) for layer in (0, 1, 6)}))


def loss_ours(model: DiT, alignment: AlignmentLoss | None, data: Data) -> tuple[Tensor, Tensor]:
    """The training loss as the trainer computes it, and the flow-matching loss in it."""
    x_t, wanted = path(data.mel, data.noise, data.t)
    layers = () if alignment is None else alignment.active
    velocity, hidden = model(x_t, data.t, data.cond, hidden_layers=layers)
    flow = flow_matching_loss(velocity, wanted).mean()
    if alignment is None:
        return flow, flow
    aligned, _ = alignment(hidden, data.targets, None, data.domains)
    return flow + ALIGN_WEIGHT * aligned, flow


def total_ours(model: DiT, alignment: AlignmentLoss | None, data: Data) -> Tensor:
    """The training loss alone."""
    return loss_ours(model, alignment, data)[0]


def loss_published(network: Callable[..., Any], alignment: AlignmentLoss | None, data: Data) -> Tensor:
    """The same loss in a direct form: heads one by one, a domain's samples picked by boolean indexing."""
    t = data.t[:, None, None]
    x_t = (1 - t) * data.noise + t * data.mel
    layers: Sequence[int] = () if alignment is None else alignment.layers
    velocity, hidden = network(x_t, data.t, data.cond, hidden_layers=layers)
    loss = F.mse_loss(velocity, data.mel - data.noise)
    if alignment is None:
        return loss
    for weight, layer in zip(alignment.weights[0], alignment.layers):
        for name in TEACHERS:
            kept = data.domains[name]
            if not kept.any():
                continue
            head: Any = alignment.heads.get_submodule(f"{name}.{layer}")
            pooled = hidden[layer][kept].mean(1)
            projected = head.output(F.gelu(head.hidden(F.layer_norm(pooled, (pooled.shape[-1],)))))
            cosine = F.cosine_similarity(projected, data.targets[name][kept], dim=-1)
            loss = loss + ALIGN_WEIGHT * weight * (1 - cosine).mean()
    return loss


def _build(config: DiTConfig, batch: int, frames: int, align: bool, dtype: str, device: torch.device) -> Setup:
    origin = random_dit(config, device)
    data = _draw(config, batch, frames, device)

    def heads() -> AlignmentLoss | None:
        if not align:
            return None
        torch.manual_seed(1)
        with device:
            return AlignmentLoss(config.width, TEACHERS, selected(config.depth))

    def ours(wrap: Callable[[Any], Any] | None = None) -> Run:
        with device:
            model = DiT(config)
        model.load_state_dict(origin.state_dict())
        loss = total_ours if wrap is None else wrap(total_ours)
        return _step(model, heads(), data, loss, dtype, device)

    def straight(keep_weights: bool, wrap: str | None = None, cast: bool = False) -> Run:
        network = published(origin, keep_weights)
        alignment, batch = heads(), data
        if cast:
            network.to(dtype_of(dtype))
            alignment = None if alignment is None else alignment.to(dtype_of(dtype))
            batch = dataclasses.replace(data.to(dtype_of(dtype)), t=data.t)
        loss: Callable[..., Tensor] = loss_published
        if wrap == "model":
            network = compiled(network)  # type: ignore[assignment]
        elif wrap == "blocks":
            block = compiled(type(network.blocks[0]).forward)
            call = lambda module, x, embedded: block(module, x, embedded)  # noqa: E731
            loss = lambda net, alignment, batch: loss_published(  # noqa: E731
                functools.partial(net, run_block=call), alignment, batch
            )
        return _step(network, alignment, batch, loss, "float32" if keep_weights or cast else dtype, device)

    def reference() -> Outputs:
        network = published(origin, keep_weights=False).double()
        alignment = heads()
        if alignment is not None:
            alignment = alignment.double()
        # Blocks are computed again in backward; in float64 their activations would fill a card at paper size.
        recomputed = functools.partial(network, run_block=functools.partial(checkpoint, use_reentrant=False))

        def loss(_: nn.Module, alignment: AlignmentLoss | None, batch: Data) -> Tensor:
            return loss_published(recomputed, alignment, batch)

        return _step(network, alignment, data.to(torch.float64), loss, "float32", device)()

    providers = [
        Provider("ours", "ours", ours),
        Provider(RELEASED_FORM[dtype], "published", lambda: straight(True)),
        Provider("SDPA form", "rival", lambda: straight(False)),
        Provider("SDPA form, compiled blocks", "rival", lambda: straight(False, "blocks")),
    ]
    if dtype != "float32":
        # Weights and moments are in the short dtype too: it moves fewer bytes than ours, and trains differently.
        providers.append(Provider(f"SDPA form, {dtype} model", "rival", lambda: straight(False, cast=True)))
    if device.type == "cuda":
        # Compiling the whole network takes longest and comes last: when the time is over, no more is built.
        providers.append(Provider("SDPA form, compiled", "rival", lambda: straight(False, "model")))
        if dtype != "float32":
            name = f"SDPA form, compiled, {dtype} model"
            providers.append(Provider(name, "rival", lambda: straight(False, "model", cast=True)))
        providers.append(Provider("ours, compiled", "engine", lambda: ours(compiled)))
    return Setup(tuple(providers), reference, {"loss": BOUND[dtype], "grad_norm": 10 * BOUND[dtype]})


def _build_cost(config: DiTConfig, batch: int, frames: int, dtype: str, device: torch.device) -> Setup:
    origin = random_dit(config, device)
    data = _draw(config, batch, frames, device)

    def step(align: bool) -> Run:
        with device:
            model = DiT(config)
        model.load_state_dict(origin.state_dict())
        alignment = None
        if align:
            alignment = AlignmentLoss(config.width, TEACHERS, LayerSelection.uniform(range(config.depth))).to(device)
            alignment.select(selected(config.depth))
        seen: list[Tensor] = []

        def loss(*arguments: Any) -> Tensor:
            total, flow = loss_ours(*arguments)
            seen[:] = [flow.detach()]
            return total

        run = _step(model, alignment, data, loss, dtype, device, fused=True)

        def with_flow_loss() -> Outputs:
            run()
            return (seen[0],)

        return with_flow_loss

    def reference() -> Outputs:
        network = published(origin, keep_weights=False).double()
        return (loss_published(network, None, data.to(torch.float64)).detach(),)

    providers = (
        Provider("alignment, cached features", "ours", lambda: step(True)),
        Provider("no alignment", "rival", lambda: step(False)),
    )
    return Setup(providers, reference, {"flow_loss": BOUND[dtype]})


def _step(
    model: nn.Module,
    alignment: AlignmentLoss | None,
    data: Data,
    loss_of: Callable[..., Tensor],
    dtype: str,
    device: torch.device,
    fused: bool | None = None,
) -> Run:
    """A call that takes one optimizer step, and returns the loss before it and the gradient norm.

    fused: AdamW in one pass, as the trainer has it; None is torch's choice, as in the released code.
    """
    model.train()
    parameters = [*model.parameters(), *(() if alignment is None else alignment.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.1, fused=fused)

    def run() -> Outputs:
        with precision(dtype, device):
            loss = loss_of(model, alignment, data)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return loss.detach(), norm

    return run
