"""Rotary position embedding, half-split layout."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, H, D); cos, sin (T, 1, D/2) in x's type. Pairs are (x_i, x_{i + D/2}). In fp32, rounded once."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
