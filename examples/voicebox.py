"""voicebox-pytorch's flow matching with the features of a speech teacher, frame by frame.

The lines that end in `# align` are all that alignment adds. Here the network is tiny and the clips are noise; for a
real run take Voicebox's sizes, mels and phonemes, and the features of HuBERT at the mel's frame rate (`ag.align_time`).
The network puts its register tokens before the frames: they have no features, and the mask leaves them out. It returns
a loss where it is given a target, so the probe calls it with inputs of its own, without one.
"""

import torch
from torch.nn.functional import pad
from voicebox_pytorch import ConditionalFlowMatcherWrapper, VoiceBox

import agrepa_fast as ag  # align


def batches(steps):
    """Mels, a phoneme for each frame, and the teacher's features at the frames."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield {
            "mel": torch.randn(4, 20, 10, generator=generator),
            "phonemes": torch.randint(30, (4, 20), generator=generator),
            "features": torch.randn(4, 20, 12, generator=generator),
        }


def main(steps=8):
    torch.manual_seed(0)
    sizes = {"dim_in": 10, "dim": 32, "depth": 4, "dim_head": 16, "heads": 2, "num_register_tokens": 3}
    network = VoiceBox(**sizes, num_cond_tokens=30, dim_cond_emb=16)
    model = ConditionalFlowMatcherWrapper(network, cond_drop_prob=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    plan = ag.ProbePlan(start=3, every=2)  # align
    aligner = ag.Aligner(network, {"hubert": 12}, k=2, width=32, pool=None, probe=plan).attach()  # align
    for group in aligner.param_groups(weight_decay=0.01):  # align
        optimizer.add_param_group(group)  # align
    torch.manual_seed(0)
    losses = []
    for step, batch in enumerate(batches(steps), start=1):
        mel, phonemes = batch["mel"], batch["phonemes"]
        loss = model(mel, phoneme_ids=phonemes)
        losses.append(loss.item())
        features, mask = pad(batch["features"], (0, 0, 3, 0)), pad(torch.ones(4, 20), (3, 0)).bool()  # align
        loss = loss + aligner.loss({"hubert": features}, mask)  # align
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        noise = torch.randn(mel.shape, generator=torch.Generator().manual_seed(step))  # align
        probed = {"x": (noise + mel) / 2, "times": torch.full((4,), 0.5), "cond_drop_prob": 0.0}  # align
        aligner.step(step, {**probed, "cond": mel, "cond_token_ids": phonemes})  # align
    return losses


if __name__ == "__main__":
    print(main())
