"""LoRA fine-tuning of a diffusers transformer with alignment: only the LoRA layers and the heads train.

The lines that end in `# align` are all that alignment adds. For a real run load the transformer with `from_pretrained`.
"""

import torch
from diffusers import DiTTransformer2DModel
from peft import LoraConfig, get_peft_model

import agrepa_fast as ag  # align


def batches(steps):
    """Latents, their classes, and the teacher's pooled features of the image."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield {
            "latents": torch.randn(4, 4, 8, 8, generator=generator),
            "classes": torch.randint(10, (4,), generator=generator),
            "features": torch.randn(4, 24, generator=generator),
        }


def main(steps=8):
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        sample_size=8, num_layers=4, attention_head_dim=8, num_attention_heads=2, in_channels=4, num_embeds_ada_norm=10
    )
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    probe = ag.ProbePlan(start=3, every=2)  # align
    aligner = ag.Aligner(model, {"dino": 24}, k=2, head="low-rank", probe=probe).attach()  # align
    for group in aligner.param_groups():  # align
        optimizer.add_param_group(group)  # align
    torch.manual_seed(0)
    losses = []
    for step, batch in enumerate(batches(steps), start=1):
        clean = batch["latents"]
        noise, t = torch.randn_like(clean), torch.rand(len(clean))
        noisy = torch.lerp(noise, clean, t.view(-1, 1, 1, 1))
        velocity = model(noisy, timestep=1000 * t, class_labels=batch["classes"]).sample
        loss = (velocity - (clean - noise)).square().mean()
        losses.append(loss.item())
        loss = loss + aligner.loss({"dino": batch["features"]})  # align
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        aligner.step(step)  # align
    return losses


if __name__ == "__main__":
    print(main())
