"""Choice of the next token: Gumbel-max with a counter-based random number per (seed, position, token)."""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash with good avalanche, in int64 with the upper half masked off."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & MASK
    return x ^ (x >> 15)


def uniform(seed: Tensor, position: Tensor, columns: int) -> Tensor:
    """(B, columns) fp32 in (0, 1), a pure function of (seed, position, column): no state, no batch dependence.

    seed (B,) int64, position (B,) int64: the index of the token being chosen within its sequence.
    """
    row = _mix((seed & MASK) ^ _mix(((seed >> 32) & MASK) ^ _mix(position & MASK)))
    column = _mix(torch.arange(columns, dtype=torch.int64, device=seed.device))
    # 23 bits and a half are exact in fp32; with 24 the largest would round up to 1, whose Gumbel noise is infinite.
    bits = _mix(row[:, None] ^ column[None, :]) >> 9
    return (bits.float() + 0.5) * 2.0**-23


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """ops.FilterLogits, by sorting."""
    values, order = torch.sort(logits, dim=-1, descending=True)
    kth = values.gather(1, (top_k.clamp(max=logits.shape[1]) - 1)[:, None])
    values = values.masked_fill(values < kth, float("-inf"))
    p = torch.softmax(values, dim=-1)
    before = torch.cumsum(p, dim=-1) - p
    out = ((before >= top_p[:, None]) & (top_p < 1)[:, None]) | (p < min_p[:, None] * p[:, :1])
    out[:, 0] = False
    values = values.masked_fill(out, float("-inf"))
    return torch.empty_like(logits).scatter_(1, order, values)


def finite_rows(logits: Tensor) -> Tensor:
    """ops.FiniteRows: a sum is finite only if all that it is of are."""
    return logits.sum(dim=-1).isfinite()


def sample(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """ops.Sample. Noise for a whole vocabulary is dear, and rows that take none are most."""
    hot = temperature > 0
    if not hot.any():
        return logits.argmax(dim=-1)
    scaled = logits / torch.where(hot, temperature, 1.0)[:, None]
    noise = -torch.log(-torch.log(uniform(seed, position, logits.shape[1])))
    return torch.where(hot[:, None], scaled + noise, scaled).argmax(dim=-1)
