"""The fused ops for PyTorch. Each checks its arguments, and its docstring gives the formula."""

from .cosine import cosine_loss
from .pooling import masked_mean, velocity_delta
from .projection_cosine import projection_cosine_loss
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
