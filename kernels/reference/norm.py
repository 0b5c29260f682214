"""Normalisation of the residual stream."""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., d) / rms(x) times weight (d,), in fp32 and rounded once."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """ops.Norm."""
    return rms_norm(x, weight, eps) if bias is None else layer_norm(x, weight.shape, weight, bias, eps)
