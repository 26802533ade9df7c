"""A loop of one's own with accelerate, with alignment: `accelerate launch examples/accelerate_loop.py`.

The lines that end in `# align` are all that alignment adds. The heads are saved and loaded by `save_state` and
`load_state`; with several processes their gradients are averaged as the network's are.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

import agrepa_fast as ag  # align


class Network(nn.Module):
    """A small transformer that predicts the velocity of mels [B, T, 10] at times [B]."""

    def __init__(self, width=32, depth=4):
        super().__init__()
        self.hidden_size = width
        self.enter, self.time, self.leave = nn.Linear(10, width), nn.Linear(1, width), nn.Linear(width, 10)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True) for _ in range(depth)
        )

    def forward(self, x, t):
        x = self.enter(x) + self.time(t[:, None, None])
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)


def flow_loss(network, mel):
    """Flow matching on the straight path from noise to the mel."""
    noise, t = torch.randn_like(mel), torch.rand(len(mel))
    return (network(torch.lerp(noise, mel, t[:, None, None]), t) - (mel - noise)).square().mean()


def clips(count):
    """Mels, and the features of a teacher beside them."""
    generator = torch.Generator().manual_seed(1)
    mels, features = torch.randn(count, 16, 10, generator=generator), torch.randn(count, 12, generator=generator)
    return [{"mel": mel, "features": feature} for mel, feature in zip(mels, features)]


def main(steps=8, folder=None, resume=None):
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    probe = ag.ProbePlan(start=2, every=2)  # align
    aligner = ag.Aligner(network, {"hubert": 12}, k=2, probe=probe)  # align
    for group in aligner.param_groups(weight_decay=0.01):  # align
        optimizer.add_param_group(group)  # align
    accelerator.register_for_checkpointing(aligner)  # align
    network, optimizer, loader = accelerator.prepare(network, optimizer, DataLoader(clips(4 * steps), batch_size=4))
    aligner.attach()  # align
    torch.manual_seed(0)
    done = 0
    if resume is not None:
        accelerator.load_state(resume)
        done = 6
        loader = accelerator.skip_first_batches(loader, done)
    losses = []
    for step, batch in enumerate(loader, start=done + 1):
        loss = flow_loss(network, batch["mel"])
        losses.append(loss.item())
        loss = loss + aligner.loss({"hubert": batch["features"]})  # align
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        aligner.step(step)  # align
        if step == 6 and folder is not None:
            accelerator.save_state(folder)
    return losses


if __name__ == "__main__":
    print(main())
