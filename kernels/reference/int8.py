"""Heads of an int8 KV cache: symmetric whole numbers, and an fp32 scale for each token and head."""

import torch
from torch import Tensor

from tucka_runtime.kernels.tables.blocks import scales

LARGEST = 127
SMALLEST = 1e-30
"""The smallest range that a scale is made for: it keeps 127 / range finite, and a head of zeros zero."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) of any float type -> int8 (..., D), fp32 (...): an element is off by half a scale at most. Where a head
    is not finite, its scale is not, nor any product with it."""
    wide = x.float()
    size = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    steps = torch.where(size.isfinite(), (wide * (LARGEST / size)).round(), 1.0).to(torch.int8)
    return steps, (size / LARGEST)[..., 0]


def write(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    """Puts x (T, KV, D) into slots of a cache of either kind."""
    if cache.dtype != torch.int8:
        cache.index_copy_(0, slots, x)
        return
    steps, scale = quantize(x)
    cache.index_copy_(0, slots, steps)
    scales(cache).index_copy_(0, slots, scale)


def read(cache: Tensor, slots: Tensor) -> Tensor:
    """(N, KV, D) of slots (N,) of a cache of either kind; of an int8 one in fp32."""
    found = cache.index_select(0, slots)
    return found if cache.dtype != torch.int8 else found * scales(cache).index_select(0, slots)[..., None]
