"""The residual stream of a DiT as one op: close one branch, open the next.

    x' = x + stream_scale * gate * branch        h = norm(x') * (1 + scale) + shift

A DiT is a chain of it. Modulation is indexed by sample and never expanded, so that the streams of a layer
ablation share it; `stream_scale` switches a branch off for a stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import residual as reference


def _check(
    x: Tensor,
    branch: Tensor | None,
    modulation: dict[str, Tensor],
    stream_scale: Tensor | None,
    sample_index: Tensor | None,
    norm: str,
) -> None:
    """Shapes and dtypes of a residual-stream call; ValueError/TypeError with names and shapes."""
    if x.dim() != 3 or 0 in x.shape:
        raise ValueError(f"x: expected a non-empty [sequences, time, width], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    if norm not in ("layer", "rms"):
        raise ValueError(f'norm: expected "layer" or "rms", got {norm!r}')
    sequences, frames, width = x.shape
    if branch is not None and (branch.dim() != 3 or branch.shape[1:] != x.shape[1:] or branch.shape[0] > sequences):
        raise ValueError(
            f"branch: expected [at most {sequences}, {frames}, {width}] beside x {list(x.shape)}, "
            f"got {list(branch.shape)}"
        )
    beside = {"branch": branch, **modulation, "stream_scale": stream_scale, "sample_index": sample_index}
    for name, tensor in beside.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected on x's device {x.device}, got {tensor.device}")
    first = next(iter(modulation.values()))
    for name, value in modulation.items():
        if value.dim() != 2 or value.shape[1] != width or value.shape[0] != first.shape[0]:
            raise ValueError(f"{name}: expected [{first.shape[0]}, {width}], got {list(value.shape)}")
    if sample_index is None:
        if first.shape[0] != sequences:
            raise ValueError(
                f"modulation has {first.shape[0]} rows for {sequences} sequences: "
                "give sample_index, the modulation row of each sequence"
            )
    elif sample_index.shape != (sequences,) or sample_index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"sample_index: expected int64 [{sequences}], got {sample_index.dtype} {list(sample_index.shape)}"
        )
    if stream_scale is not None and stream_scale.shape != (sequences,):
        raise ValueError(f"stream_scale: expected [{sequences}], got {list(stream_scale.shape)}")


def gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    stream_scale: Tensor | None = None,
    sample_index: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and open the next branch.

    `x' = x + stream_scale * gate * branch`, `h = norm(x') (1 + scale) + shift` (adaLN of DiT,
    arXiv 2212.09748; the per-stream scale is FoG-A's gate m_k, arXiv 2603.01006).

    Args:
        x: residual stream [R, T, D], floating.
        branch: [R' <= R, T, D]; the sequences past R' take no branch (their scale is 0).
        gate, shift, scale: [B, D], any floating dtype.
        stream_scale: [R] or None for 1; where it is 0 the branch is not read.
        sample_index: int64 [R], the modulation row of each sequence; None when R == B.
        eps: added to the variance ("layer") or mean square ("rms").
        norm: "layer" or "rms", without affine parameters.

    Returns:
        x' and h, both [R, T, D] in x's dtype; statistics in float32 (float64 for float64 input).

    Raises:
        ValueError, TypeError: on a shape, dtype or device that does not fit, naming it.
    """
    _check(x, branch, {"gate": gate, "shift": shift, "scale": scale}, stream_scale, sample_index, norm)
    return reference.gated_residual_norm(
        x,
        branch,
        gate,
        shift,
        scale,
        stream_scale=stream_scale,
        sample_index=sample_index,
        eps=eps,
        norm=norm,
    )


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    sample_index: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
) -> Tensor:
    """`norm(x) (1 + scale) + shift`: opens the chain. Arguments as `gated_residual_norm`; returns [R, T, D]."""
    _check(x, None, {"shift": shift, "scale": scale}, None, sample_index, norm)
    return reference.layer_norm_modulate(x, shift, scale, sample_index=sample_index, eps=eps, norm=norm)


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    *,
    stream_scale: Tensor | None = None,
    sample_index: Tensor | None = None,
) -> Tensor:
    """`x + stream_scale * gate * branch`: closes the chain. Arguments as `gated_residual_norm`; returns [R, T, D]."""
    _check(x, branch, {"gate": gate}, stream_scale, sample_index, "layer")
    return reference.gated_residual(x, branch, gate, stream_scale=stream_scale, sample_index=sample_index)
