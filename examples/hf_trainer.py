"""transformers' `Trainer` on a flow-matching network, with alignment.

The lines that end in `# align` are all that alignment adds: the heads join the trainer's optimizer and checkpoints, its
log shows their cosines, and layers are scored and chosen on time.
"""

import tempfile

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

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


class FlowTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = flow_loss(model, inputs["mel"])
        self.losses.append(loss.item())
        loss = loss + self.aligner.loss({"hubert": inputs["features"]})  # align
        return (loss, {}) if return_outputs else loss


def main(steps=8, folder=None, resume=None):
    torch.manual_seed(0)
    network = Network()
    arguments = TrainingArguments(
        folder or tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        weight_decay=0.01,
        remove_unused_columns=False,
        save_steps=6,
        logging_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = FlowTrainer(network, arguments, train_dataset=clips(40))
    trainer.losses = []
    probe = ag.ProbePlan(start=2, every=2)  # align
    trainer.aligner = ag.Aligner(network, {"hubert": 12}, k=2, probe=probe)  # align
    ag.integrations.hf.align(trainer, trainer.aligner)  # align
    torch.manual_seed(0)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.losses


if __name__ == "__main__":
    print(main())
