"""A Lightning module of a flow-matching network, with alignment.

The lines that end in `# align` are all that alignment adds: the heads join the module's optimizer and the trainer's
checkpoints, its log shows their cosines, and layers are scored and chosen on time.
"""

import lightning
import torch
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


class Flow(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = Network()
        self.losses = []

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.01)

    def training_step(self, batch, number):
        loss = flow_loss(self.network, batch["mel"])
        self.losses.append(loss.item())
        loss = loss + self.aligner.loss({"hubert": batch["features"]})  # align
        return loss


def main(steps=8, folder=None, resume=None):
    torch.manual_seed(0)
    module = Flow()
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=6, save_top_k=-1)
    callbacks = [] if folder is None else [checkpoints]
    probe = ag.ProbePlan(start=2, every=2)  # align
    module.aligner = ag.Aligner(module.network, {"hubert": 12}, k=2, probe=probe)  # align
    callbacks.append(ag.integrations.lightning.AlignerCallback(module.aligner, weight_decay=0.01))  # align
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        enable_checkpointing=folder is not None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    trainer.fit(module, DataLoader(clips(12), batch_size=4), ckpt_path=resume)
    return module.losses


if __name__ == "__main__":
    print(main())
