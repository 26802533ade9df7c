"""The residual stream in plain PyTorch, in any floating dtype up to float64.

    x' = x + stream_scale * gate * branch        h = (norm(x') * weight + bias) * (1 + scale) + shift

x, branch [R, T, D]; gate, shift, scale [B, D] or [B, T, D]; weight, bias [D]; sequence r uses modulation row
sample_index[r] (or r itself). Sequences of `join` come after those of x, without a branch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _rows(modulation: Tensor, sample_index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, D] -> [R, 1, D], one modulation row per sequence; [B, T, D] -> [R, T, D]."""
    # Not modulation[sample_index], which takes -1 for the last row.
    rows = modulation if sample_index is None else modulation.index_select(0, sample_index)
    return rows.to(dtype) if rows.dim() == 3 else rows.to(dtype).unsqueeze(1)


def _add_product(base: Tensor, rows: Tensor, value: Tensor) -> Tensor:
    """base + rows * value, rows [R, 1, D] or [R, T, D]; base or rows may be broadcast over time.

    addcmul is one pass less, but its gradient one more for each factor: it multiplies by its argument `value`, which is
    1, in a pass over the whole tensor. So it is taken where no gradient is."""
    if torch.is_grad_enabled() and (base.requires_grad or rows.requires_grad or value.requires_grad):
        return base + rows * value
    return torch.addcmul(base, rows, value)


def _add_branch(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    stream_scale: Tensor | None,
    sample_index: Tensor | None,
    join: Tensor | None = None,
) -> Tensor:
    """x + stream_scale * gate * branch in float32 or wider; sequences past the branch's end pass through."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    active = branch.shape[0]
    if active < x.shape[0] or join is not None:
        index = None if sample_index is None else sample_index[:active]
        rows = gate[:active] if sample_index is None else gate
        streams = None if stream_scale is None else stream_scale[:active]
        passing = [x[active:].to(dtype), *([] if join is None else [join.to(dtype)])]
        return torch.cat([_add_branch(x[:active], branch, rows, streams, index), *passing])
    # Nothing is sliced here: the gradient of a slice is one more pass over the stream.
    x, branch, rows = x.to(dtype), branch.to(dtype), _rows(gate, sample_index, dtype)
    if stream_scale is None:
        return _add_product(x, rows, branch)
    s = stream_scale.to(dtype)[:, None, None]
    # A stream that sits the branch out must see neither it nor its gate: 0 * inf would be nan.
    out = s == 0
    return x + s * torch.where(out, 0.0, rows) * torch.where(out, 0.0, branch)


def _norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sample_index: Tensor | None,
    eps: float,
    norm: str,
) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    width = (x.shape[-1],)
    x, weight, bias = x.to(dtype), *(None if value is None else value.to(dtype) for value in (weight, bias))
    if norm == "layer":
        normed = F.layer_norm(x, width, weight, bias, eps)
    else:
        normed = F.rms_norm(x, width, weight, eps)
        normed = normed if bias is None else normed + bias
    return _add_product(_rows(shift, sample_index, dtype), _rows(scale, sample_index, dtype).add(1.0), normed)


def gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    stream_scale: Tensor | None = None,
    sample_index: Tensor | None = None,
    join: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """`x' = x + stream_scale * gate * branch`, `h = norm(x') (1 + scale) + shift`; both in x's dtype."""
    x_new = _add_branch(x, branch, gate, stream_scale, sample_index, join).to(x.dtype)
    return x_new, _norm_modulate(x_new, shift, scale, weight, bias, sample_index, eps, norm).to(x.dtype)


def layer_norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    sample_index: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
) -> Tensor:
    """`norm(x) (1 + scale) + shift`: the opening end of the chain."""
    return _norm_modulate(x, shift, scale, weight, bias, sample_index, eps, norm).to(x.dtype)


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    *,
    stream_scale: Tensor | None = None,
    sample_index: Tensor | None = None,
    join: Tensor | None = None,
) -> Tensor:
    """`x + stream_scale * gate * branch`: the closing end of the chain."""
    return _add_branch(x, branch, gate, stream_scale, sample_index, join).to(x.dtype)
