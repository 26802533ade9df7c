"""How much of the output is lost when k blocks are skipped while sampling, by the rule that chose them?

Two models sample with all their blocks, then without k of them: a `DiT` of this package and a flow-matching transformer
of diffusers (Wan). The rules are FoG-A's scores (the lowest first), ShortGPT's block influence (1 - cosine between a
block's input and output, the lowest first), shallowest first, and random. The table has the relative change of the
samples, ||without - with|| / ||with||; 0 is no change.

    python examples/skip_layers.py                                  # tiny random weights: shows how, says nothing
    python examples/skip_layers.py --run runs/demo --skip 1 2 3     # a run of `agrepa train`
    python examples/skip_layers.py --json skipped.json              # the numbers and the command, too

The change of the samples says how far they move, not how they sound. Skipped blocks were not trained to be missing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.hooks import HookRegistry, apply_layer_skip
from torch import Tensor, nn

import agrepa_fast as ag
from agrepa_fast.models.flow import FLOW_MATCHING, SIGMA, Process, sample

RULES = ("foga", "block-influence", "shallowest", "random")


class OurModel:
    """A `DiT`: block l is branches 2l and 2l + 1."""

    name = "DiT"

    def __init__(
        self, model: ag.DiT, noise: Tensor, cond: Tensor | None, points: int, process: Process = FLOW_MATCHING
    ) -> None:
        self.model, self.noise, self.cond, self.points = model.eval(), noise, cond, points
        self.process = process
        self.depth = model.depth

    def scores(self) -> ag.LayerScores:
        """Of states on the way from noise to the model's own samples, at three times."""
        return ag.attribute_layers(
            self.model, ag.probe_inputs(self.sample(()), self.cond, None, (0.2, 0.5, 0.8), process=self.process)
        )

    @torch.no_grad()
    def influence(self) -> Tensor:
        inputs = ag.probe_inputs(self.sample(()), self.cond, None, (0.5,), process=self.process)
        _, hidden = self.model(**inputs, hidden_layers=range(self.depth))
        before = self.model.open(inputs["x_t"], inputs["t"], inputs.get("cond"))[0]
        states = [before, *(hidden[layer] for layer in range(self.depth))]
        return torch.stack([block_influence(a, b) for a, b in itertools.pairwise(states)])

    @torch.no_grad()
    def sample(self, skipped: Sequence[int]) -> Tensor:
        model = copy.deepcopy(self.model)
        for layer in skipped:  # a branch whose last projection is zero adds nothing
            for last in (model.branches[2 * layer].out, model.branches[2 * layer + 1].down):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        return sample(model, self.noise, self.cond, points=self.points, process=self.process)


class Wan:
    """A `WanTransformer3DModel`, sampled with its own kind of scheduler; blocks are skipped by diffusers' hooks."""

    name = "WanTransformer3DModel"

    def __init__(self, model: WanTransformer3DModel, noise: Tensor, text: Tensor, steps: int) -> None:
        self.model, self.noise, self.text, self.steps = model.eval(), noise, text, steps
        self.depth = len(model.blocks)

    def inputs(self) -> dict[str, Tensor]:
        """States on the way from noise to the model's own samples, at three times."""
        end, sigmas = self.sample(()), torch.tensor([0.8, 0.5, 0.2])
        states = [sigma * self.noise + (1 - sigma) * end for sigma in sigmas]
        steps = (1000 * sigmas).repeat_interleave(len(end))
        return {
            "hidden_states": torch.cat(states),
            "timestep": steps,
            "encoder_hidden_states": self.text.repeat(len(sigmas), 1, 1),
        }

    def scores(self) -> ag.LayerScores:
        return ag.attribute_layers(self.model, self.inputs())

    @torch.no_grad()
    def influence(self) -> Tensor:
        found: list[Tensor] = []
        inputs = self.inputs()
        hooks = [
            block.register_forward_hook(lambda _, args, out: found.append(block_influence(args[0], out)))
            for block in self.model.blocks
        ]
        self.model(**inputs)
        for hook in hooks:
            hook.remove()
        return torch.stack(found)

    @contextmanager
    def without(self, skipped: Sequence[int]) -> Iterator[None]:
        names = [f"blocks.{layer}" for layer in skipped]
        for config in ag.export.layer_skip(names, self.model) if names else ():
            apply_layer_skip(self.model, config)
        try:
            yield
        finally:
            for layer in skipped:
                HookRegistry.check_if_exists_or_initialize(self.model.blocks[layer]).remove_hook("layer_skip_hook")

    @torch.no_grad()
    def sample(self, skipped: Sequence[int]) -> Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(self.steps)
        state = self.noise
        with self.without(skipped):
            for step in scheduler.timesteps:
                velocity = self.model(state, step.expand(len(state)), self.text).sample
                state = scheduler.step(velocity, step, state).prev_sample
        return state


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """ShortGPT (arXiv 2403.03853): 1 - the mean cosine between a block's input and output, frame by frame."""
    return 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1).mean()


def chosen(rule: str, k: int, depth: int, scores: ag.LayerScores, influence: Tensor, seed: int = 0) -> list[int]:
    """The k layers that a rule skips."""
    if rule == "foga":
        return scores.mean.argsort(stable=True)[:k].tolist()
    if rule == "block-influence":
        return influence.argsort(stable=True)[:k].tolist()
    return list(range(k)) if rule == "shallowest" else random.Random(seed).sample(range(depth), k)


def compare(model: OurModel | Wan, skip: Sequence[int], seeds: int = 4) -> dict[tuple[str, int], float]:
    """{(rule, k): relative change of the samples}; "random" is the mean over `seeds` draws."""
    torch.manual_seed(0)  # of the noise in the probes' inputs
    whole, scores, influence = model.sample(()), model.scores(), model.influence()
    results = {}
    for k in skip:
        for rule in RULES:
            draws = range(seeds if rule == "random" else 1)
            layers = [chosen(rule, k, model.depth, scores, influence, seed) for seed in draws]
            changes = [(model.sample(part) - whole).norm() / whole.norm() for part in layers]
            results[rule, k] = torch.stack(changes).mean().item()
    return results


def table(name: str, results: dict[tuple[str, int], float]) -> str:
    ks = sorted({k for _, k in results})
    lines = [f"{name:<24}" + "".join(f"{f'skip {k}':>10}" for k in ks)]
    return "\n".join(lines + [f"  {rule:<22}" + "".join(f"{results[rule, k]:10.4f}" for k in ks) for rule in RULES])


def stored(arguments: Sequence[str], models: Sequence[OurModel | Wan], results: Sequence[dict]) -> str:
    """The results as JSON, with the command that gave them: {model: {"blocks": L, "change": {rule: {k: change}}}}."""
    facts = {
        model.name: {
            "blocks": model.depth,
            "change": {rule: {k: each[rule, k] for one, k in each if one == rule} for rule in RULES},
        }
        for model, each in zip(models, results)
    }
    command = shlex.join(["python", "examples/skip_layers.py", *arguments])
    versions = {"agrepa-fast": ag.__version__, "torch": torch.__version__}
    return json.dumps({"command": command, "versions": versions, "models": facts}, indent=1) + "\n"


def tiny_dit() -> OurModel:
    torch.manual_seed(0)
    model = ag.DiT(ag.DiTConfig(depth=6, width=32, heads=2, mels=8, cond=4, max_frames=16))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return OurModel(model, SIGMA * torch.randn(4, 12, 8), torch.randn(4, 12, 4), points=9)


def trained_dit(run: str) -> OurModel:
    """The EMA weights of a run of `agrepa train`, saying a few words from eight noises."""
    from agrepa_fast.training.inference import load_backbone, text_batch

    backbone, checkpoint = load_backbone(run, torch.device("cpu"))
    batch = text_batch(checkpoint.config, "one two three", "speech", seconds=0.8)
    with torch.no_grad():
        cond, _ = backbone.condition(batch)
    flow = checkpoint.config.flow
    noise = flow.process.noise_std * torch.randn(8, *batch.mel.shape[1:], generator=torch.Generator().manual_seed(0))
    return OurModel(backbone.network, noise, cond.expand(8, -1, -1), points=flow.points, process=flow.process)


def tiny_wan() -> Wan:
    torch.manual_seed(0)
    sizes = {"num_layers": 6, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "freq_dim": 16}
    model = WanTransformer3DModel(**sizes, in_channels=3, out_channels=3, text_dim=8, rope_max_seq_len=8)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Wan(model, torch.randn(2, 3, 1, 4, 4), torch.randn(2, 5, 8), steps=8)


def main(arguments: Sequence[str] | None = None) -> list[dict[tuple[str, int], float]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--skip", type=int, nargs="+", default=[1, 2, 3], help="numbers of blocks to skip")
    parser.add_argument("--run", help="a run or checkpoint of `agrepa train` in place of the tiny models")
    parser.add_argument("--json", type=Path, help="a file to write: the numbers, and the command that gave them")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    models = [trained_dit(options.run)] if options.run else [tiny_dit(), tiny_wan()]
    results = []
    for model in models:
        results.append(compare(model, options.skip))
        print(table(model.name, results[-1]))
    if options.json:
        options.json.write_text(stored(arguments, models, results), encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
