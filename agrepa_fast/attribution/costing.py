"""Estimate what a probe costs, from its plan alone: the page docs/attribution/on-paper.md.

`python -m agrepa_fast.attribution.costing` prints the page. It runs no network and needs no device.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..models.cost import branch_flops
from ..models.dit import DiT, DiTConfig
from .plan import AblationPlan, Sizes, split

FRAMES = 938  # 10 s of mel at 24000 / 256 frames a second
CLIPS, TIMES = 16, 5  # a training run's probe: so many held-out clips, each at every t of the grid
CARDS = (24, 80, 141)  # GB
SHARE = 0.9  # of a card's memory that the probe may use; the CUDA context and the allocator need the rest
KINDS: tuple[tuple[str, tuple[str, ...] | None], ...] = (("whole blocks", None), ("branches apart", ("attn", "ff")))
PRECISIONS = (("bfloat16", 2), ("float32", 4))

# For the estimate of the time: samples in a pass, and the assumed rates of an H200, in operations or bytes a second.
BATCH = 4
LIMIT = 798e12  # large matrix products in bfloat16
MATRICES, ATTENTION, MEMORY = 615e12, 360e12, 3.1e12
BETTER_ATTENTION, COPY = 500e12, 4.3e12

PAGE = """\
# The paper's network, on paper

<!-- Written by `python -m agrepa_fast.attribution.costing > docs/attribution/on-paper.md`. -->

A plan costs nothing to make, so a probe can be worked out before one has the card. The network of AG-REPA
({depth} blocks of {width}, {parameters:.1f} M parameters), {frames} frames (10 s), {clips} clips at {times} values of
t, which is {samples} samples. All of this is predicted by `AblationPlan` and `split`; nothing here was measured.

| ablation | streams | block evaluations a sample | of a loop | TFLOP a sample |
|---|---:|---:|---:|---:|
{plans}

Operations are those of the matrices and of attention. The first pass also runs the control of the noise floor: one
sample once through the network.

Nine tenths of a card, less the weights, are the budget; `split` says how many samples fit at once, and how many passes
all {samples} then take. Fused kernels need less than this peak, which reckons with plain PyTorch between the branches.

| card | precision | ablation | samples at once | layers dealt over | passes | predicted peak | PFLOP in all |
|---|---|---|---:|---:|---:|---:|---:|
{cards}

## The time: an estimate

No GPU has run this. At the rates below, which are assumptions, the {evaluations} block evaluations of {batch} samples
in one pass (whole blocks, bfloat16) would take {total:.0f} ms: {share:.0%} of {limit:.0f} TFLOP/s, the rate of large
matrix products that is assumed for an H200. Launches cost nothing here, as in one CUDA graph; embeddings, the output
Linear and the control of the noise floor are left out.

| part | work | assumed rate | time |
|---|---:|---:|---:|
{parts}

What would bring it above 65 %, each step on top of those before it:

| change | time | of {limit:.0f} TFLOP/s |
|---|---:|---:|
{steps}

Which kernel attention runs is left to PyTorch: a call of `scaled_dot_product_attention` takes the first of its backends
that can run it. `torch.nn.attention.sdpa_kernel(backends, set_priority=True)` around a probe puts another first, such
as cuDNN's; a mask for padded frames rules out flash attention. Which one is fastest on a card is not yet measured.

## From Python

```python
from agrepa_fast import AblationPlan
from agrepa_fast.attribution.plan import Sizes, split

paper = Sizes(frames={frames}, width={width}, ff_ratio=4, mels=100, heads=16, element_bytes=2)
plans, at_once = split(AblationPlan.build({depth}), paper, samples={samples}, budget=int(0.9 * 24e9) - {weights})
print(at_once, [str(plan) for plan in plans], plans[0].peak_bytes(paper, at_once))
```
"""


def times(
    config: DiTConfig,
    matrices: float = MATRICES,
    attention: float = ATTENTION,
    gelu: float = MEMORY,
    residual: float = MEMORY,
) -> dict[str, float]:
    """Seconds that each part of a pass over BATCH samples takes at these rates. An infinite rate leaves a part out."""
    rates = {"matrices": matrices, "attention": attention, "GELU": gelu, "residual stream": residual}
    return {name: work / rates[name] for name, work in _work(config).items()}


def _work(config: DiTConfig) -> dict[str, float]:
    """Operations of the Linears and of attention's two products, and bytes that GELU and residual stream move."""
    evaluations = AblationPlan.build(config.depth).block_evaluations * BATCH
    block = sum(branch_flops(config.width, config.ff_ratio, FRAMES))
    attention = 4 * FRAMES**2 * config.width
    row = 2 * config.width * FRAMES  # bytes of a bfloat16 tensor of the stream
    work = {
        "matrices": block - attention,
        "attention": attention,
        "GELU": 2 * config.ff_ratio * row,  # read and written
        "residual stream": 2 * 4 * row,  # twice: x and the branch are read, x' and h written
    }
    return {name: each * evaluations for name, each in work.items()}


def _estimate(config: DiTConfig) -> dict[str, object]:
    """The paragraph of the page that gives the estimated time."""
    work, now = _work(config), times(config)
    operations = work["matrices"] + work["attention"]
    rates = (MATRICES, ATTENTION, MEMORY, MEMORY)
    parts = []
    for (name, amount), rate in zip(work.items(), rates, strict=True):
        unit, of = ("TFLOP", 1e12) if name in ("matrices", "attention") else ("GB", 1e9)
        speed = f"{rate / 1e12:.0f} TFLOP/s" if unit == "TFLOP" else f"{rate / 1e12:.1f} TB/s"
        parts.append(_row(name, f"{amount / of:.1f} {unit}", speed, f"{now[name] * 1e3:.0f} ms"))
    changes: dict[str, dict[str, float]] = {
        "as it is": {},
        "GELU inside the matrix product before it": {"gelu": math.inf},
        f"attention at {BETTER_ATTENTION / 1e12:.0f} TFLOP/s": {"attention": BETTER_ATTENTION},
        f"residual stream at {COPY / 1e12:.1f} TB/s, a copy's rate": {"residual": COPY},
    }
    steps: list[str] = []
    taken: dict[str, float] = {}
    for name, change in changes.items():
        taken |= change
        seconds = sum(times(config, **taken).values())
        steps.append(_row(name, f"{seconds * 1e3:.0f} ms", f"{operations / seconds / LIMIT:.0%}"))
    total = sum(now.values())
    return {
        "evaluations": f"{AblationPlan.build(config.depth).block_evaluations:g}",
        "batch": BATCH,
        "total": total * 1e3,
        "share": operations / total / LIMIT,
        "limit": LIMIT / 1e12,
        "parts": "\n".join(parts),
        "steps": "\n".join(steps),
    }


def page() -> str:
    """The text of docs/attribution/on-paper.md."""
    config = DiTConfig.preset("paper")
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in DiT(config).parameters())
    samples = CLIPS * TIMES
    plans, cards = [], []
    for kind, branches in KINDS:
        plan = AblationPlan.build(config.depth, branches=branches)
        operations = plan.flops(_sizes(config, 2), samples) / samples
        of_plan = (kind, plan.streams, f"{plan.block_evaluations:g}", f"{plan.loop_block_evaluations:g}")
        plans.append(_row(*of_plan, f"{operations / 1e12:.1f}"))
    for card in CARDS:
        for precision, element_bytes in PRECISIONS:
            for kind, branches in KINDS:
                sizes = _sizes(config, element_bytes)
                budget = int(SHARE * 1e9 * card) - parameters * element_bytes
                plan = AblationPlan.build(config.depth, branches=branches)
                parts, at_once = split(plan, sizes, samples, budget)
                batches = -(-samples // at_once)
                peak = max(part.peak_bytes(sizes, at_once) for part in parts)
                operations = sum(
                    replace(part, control=part.control and start == 0).flops(sizes, min(at_once, samples - start))
                    for part in parts
                    for start in range(0, samples, at_once)
                )
                row = (f"{card} GB", precision, kind, at_once, len(parts), batches * len(parts))
                cards.append(_row(*row, f"{peak / 1e9:.1f} GB", f"{operations / 1e15:.2f}"))
    return PAGE.format(
        depth=config.depth,
        width=config.width,
        parameters=parameters / 1e6,
        weights=2 * parameters,
        frames=FRAMES,
        clips=CLIPS,
        times=TIMES,
        samples=samples,
        plans="\n".join(plans),
        cards="\n".join(cards),
        **_estimate(config),
    )


def _sizes(config: DiTConfig, element_bytes: int) -> Sizes:
    return Sizes(FRAMES, config.width, config.ff_ratio, config.mels, config.heads, element_bytes)


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    print(page(), end="")
