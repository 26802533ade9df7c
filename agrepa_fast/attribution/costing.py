"""What a probe would cost, on paper: the page docs/attribution/on-paper.md, worked out from plans alone.

`python -m agrepa_fast.attribution.costing` prints it; nothing runs, so it needs neither a device nor the memory.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..models.dit import DiT, DiTConfig
from .plan import AblationPlan, Sizes, split

FRAMES = 938  # 10 s of mel at 24000 / 256 frames a second
CLIPS, TIMES = 16, 5  # of a training run's probe: held-out clips, each at every t of the grid
CARDS = (24, 80, 141)  # GB
SHARE = 0.9  # of a card that the probe may take, the rest being the context's and the allocator's
KINDS: tuple[tuple[str, tuple[str, ...] | None], ...] = (("whole blocks", None), ("branches apart", ("attn", "ff")))
PRECISIONS = (("bfloat16", 2), ("float32", 4))

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

```python
from agrepa_fast import AblationPlan
from agrepa_fast.attribution.plan import Sizes, split

paper = Sizes(frames={frames}, width={width}, ff_ratio=4, mels=100, heads=16, element_bytes=2)
plans, at_once = split(AblationPlan.build({depth}), paper, samples={samples}, budget=int(0.9 * 24e9) - {weights})
print(at_once, [str(plan) for plan in plans], plans[0].peak_bytes(paper, at_once))
```
"""


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
    )


def _sizes(config: DiTConfig, element_bytes: int) -> Sizes:
    return Sizes(FRAMES, config.width, config.ff_ratio, config.mels, config.heads, element_bytes)


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    print(page(), end="")
