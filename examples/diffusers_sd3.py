"""REPA for a diffusers SD3: rectified flow on latents, with a vision teacher's patch tokens.

The lines that end in `# align` are all that alignment adds. For a real run load the transformer with `from_pretrained`,
and encode images and prompts; the features are DINOv2's patch tokens on the latents' patch grid.
"""

import torch
from diffusers import SD3Transformer2DModel

import agrepa_fast as ag  # align


def batches(steps):
    """Latents, prompt embeddings, and the teacher's features of the image: a token for each of the 16 patches."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield {
            "latents": torch.randn(4, 4, 8, 8, generator=generator),
            "prompt": torch.randn(4, 5, 12, generator=generator),
            "pooled": torch.randn(4, 10, generator=generator),
            "features": torch.randn(4, 16, 24, generator=generator),
        }


def main(steps=8):
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )
    model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    probe = ag.ProbePlan(start=3, every=2)  # align
    options = {"k": 2, "pool": None, "state": "hidden_states", "probe": probe}  # align
    aligner = ag.Aligner(model, {"dino": 24}, **options).attach()  # align
    for group in aligner.param_groups(weight_decay=0.01):  # align
        optimizer.add_param_group(group)  # align
    torch.manual_seed(0)
    losses = []
    for step, batch in enumerate(batches(steps), start=1):
        clean = batch["latents"]
        noise, sigma = torch.randn_like(clean), torch.rand(len(clean)).view(-1, 1, 1, 1)
        noisy = (1 - sigma) * clean + sigma * noise
        velocity = model(
            hidden_states=noisy,
            encoder_hidden_states=batch["prompt"],
            pooled_projections=batch["pooled"],
            timestep=1000 * sigma.flatten(),
        ).sample
        loss = (velocity - (noise - clean)).square().mean()
        losses.append(loss.item())
        loss = loss + aligner.loss({"dino": batch["features"]})  # align
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        aligner.step(step)  # align
    return losses


if __name__ == "__main__":
    print(main())
