"""F5-TTS's own flow matching with the features of a speech teacher, which lie beside the audio.

The lines that end in `# align` are all that alignment adds. Here the network is tiny and the clips are noise; for a
real run take F5-TTS's sizes and dataset, and the features of HuBERT at the mel's frame rate (`ag.align_time`).
"""

import torch
from f5_tts.model.backbones.dit import DiT
from f5_tts.model.cfm import CFM
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import agrepa_fast as ag  # align


def clip(frames):
    """What F5-TTS's dataset gives of a clip, and the teacher's features [frames, 12]."""
    return {"mel_spec": torch.randn(1, 10, frames), "text": "some words", "features": torch.randn(frames, 12)}


def collate(items):
    """As F5-TTS's own, which drops what it does not know."""
    mels = [item["mel_spec"].squeeze(0).T for item in items]
    batch = {"mel": pad_sequence(mels, batch_first=True), "text": [item["text"] for item in items]}
    batch["mel_lengths"] = torch.tensor([len(mel) for mel in mels])
    batch["features"] = pad_sequence([item["features"] for item in items], batch_first=True)  # align
    return batch


def main(steps=8):
    torch.manual_seed(0)
    network = DiT(dim=32, depth=4, heads=2, dim_head=16, mel_dim=10, text_num_embeds=256, text_dim=16, dropout=0.0)
    model = CFM(network, mel_spec_kwargs={"n_mel_channels": 10})
    torch.nn.init.normal_(network.proj_out.weight, std=0.1)  # a network that has trained; at its start it is zero
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    probe = ag.ProbePlan(start=3, every=2)  # align
    aligner = ag.Aligner(network, {"hubert": 12}, k=2, pool=None, probe=probe).attach()  # align
    for group in aligner.param_groups(weight_decay=0.01):  # align
        optimizer.add_param_group(group)  # align
    torch.manual_seed(0)
    loader = DataLoader([clip(20 + 3 * n) for n in range(4)] * steps, batch_size=4, collate_fn=collate)
    losses = []
    for step, batch in enumerate(loader, start=1):
        loss, _, _ = model(batch["mel"], text=batch["text"], lens=batch["mel_lengths"])
        losses.append(loss.item())
        mask = torch.arange(batch["mel"].shape[1]) < batch["mel_lengths"][:, None]  # align
        loss = loss + aligner.loss({"hubert": batch["features"]}, mask)  # align
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        aligner.step(step)  # align
    return losses


if __name__ == "__main__":
    print(main())
