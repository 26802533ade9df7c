"""The fused ops, torch-facing. Each checks its arguments and says in its docstring what it computes."""

from .cosine import cosine_loss, projection_cosine_loss
from .pooling import masked_mean, velocity_delta
from .residual import gated_residual, gated_residual_norm, layer_norm_modulate

__all__ = [
    "cosine_loss",
    "gated_residual",
    "gated_residual_norm",
    "layer_norm_modulate",
    "masked_mean",
    "projection_cosine_loss",
    "velocity_delta",
]
