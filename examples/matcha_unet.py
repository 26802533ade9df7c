"""The U-Net decoder of Matcha-TTS and CosyVoice, trained by flow matching with the features of a speech teacher.

The lines that end in `# align` are all that alignment adds. Here the network is tiny and the clips are noise; for a
real run take the decoder of either repository, which has this form and these names, and the mels and encoder outputs
of its dataset. The stages between the two ends run at half the mel's frame rate: mels at 100 Hz meet HuBERT's 50 Hz
there. So their layers alone are candidates; those at the ends have states of another length.
"""

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

import agrepa_fast as ag  # align


class Resnet(nn.Module):
    """[B, C, T] -> [B, width, T]; mask [B, 1, T], time [B, width]."""

    def __init__(self, channels, width):
        super().__init__()
        self.first, self.second = nn.Conv1d(channels, width, 3, padding=1), nn.Conv1d(width, width, 3, padding=1)
        self.time, self.straight = nn.Linear(width, width), nn.Conv1d(channels, width, 1)

    def forward(self, x, mask, time):
        inner = nn.functional.mish(self.first(x * mask) + self.time(time)[..., None])
        return self.second(inner * mask) * mask + self.straight(x * mask)


class Decoder(nn.Module):
    """Velocity of mels [B, 10, T] at times [B]; mask [B, 1, T], mu [B, 10, T] from the text encoder. T is even."""

    def __init__(self, width=32):
        super().__init__()

        def stage(channels, *resample):
            blocks = [BasicTransformerBlock(width, 2, 16, activation_fn="gelu")]
            return nn.ModuleList([Resnet(channels, width), nn.ModuleList(blocks), *resample])

        same, again = (nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
        half, double = nn.Conv1d(width, width, 3, 2, 1), nn.ConvTranspose1d(width, width, 4, 2, 1)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.down_blocks = nn.ModuleList([stage(20, half), stage(width, same)])
        self.mid_blocks = nn.ModuleList([stage(width), stage(width)])
        self.up_blocks = nn.ModuleList([stage(2 * width, double), stage(2 * width, again)])
        self.final = nn.Conv1d(width, 10, 1)

    def forward(self, x, mask, mu, t):
        time, x = self.time(t[:, None]), torch.cat([x, mu], dim=1)
        masks, kept = [mask, mask[..., ::2]], []

        def run(resnet, blocks, x, mask):
            x = resnet(x, mask, time).mT
            for block in blocks:
                x = block(hidden_states=x, attention_mask=(mask - 1) * 1e4, timestep=time)
            return x.mT

        for (resnet, blocks, resample), mask in zip(self.down_blocks, masks):
            x = run(resnet, blocks, x, mask)
            kept.append(x)
            x = resample(x * mask)
        for resnet, blocks in self.mid_blocks:
            x = run(resnet, blocks, x, masks[-1])
        for (resnet, blocks, resample), mask in zip(self.up_blocks, reversed(masks)):
            x = run(resnet, blocks, torch.cat([x, kept.pop()], dim=1), mask)
            x = resample(x * mask)
        return self.final(x) * masks[0]


def batches(steps):
    """Mels, their masks, the text encoder's output, and the teacher's features at half the frame rate."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        lengths = torch.randint(16, 25, (4, 1, 1), generator=generator)
        yield {
            "mel": torch.randn(4, 10, 24, generator=generator),
            "mask": (torch.arange(24) < lengths).float(),
            "mu": torch.randn(4, 10, 24, generator=generator),
            "features": torch.randn(4, 12, 12, generator=generator),
        }


def main(steps=8):
    torch.manual_seed(0)
    decoder = Decoder()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3)
    probe = ag.ProbePlan(start=3, every=2)  # align
    stages = [f"{part}_blocks.{n}.1" for part in ("down", "mid", "up") for n in (0, 1)]  # align
    options = {"block_list": stages, "layers": [1, 2, 3, 4], "width": 32, "pool": None, "probe": probe}  # align
    aligner = ag.Aligner(decoder, {"hubert": 12}, k=2, **options).attach()  # align
    for group in aligner.param_groups(weight_decay=0.01):  # align
        optimizer.add_param_group(group)  # align
    torch.manual_seed(0)
    losses = []
    for step, batch in enumerate(batches(steps), start=1):
        mel, mask = batch["mel"], batch["mask"]
        noise, t = torch.randn_like(mel), torch.rand(len(mel))
        velocity = decoder(torch.lerp(noise, mel, t[:, None, None]), mask, batch["mu"], t)
        loss = ((velocity - (mel - noise)).square() * mask).sum() / (10 * mask.sum())
        losses.append(loss.item())
        loss = loss + aligner.loss({"hubert": batch["features"]}, mask[:, 0, ::2] > 0)  # align
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        aligner.step(step)  # align
    return losses


if __name__ == "__main__":
    print(main())
