"""Which layers drive the predicted velocity: FoG-A by batched layer ablation."""
