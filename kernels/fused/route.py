"""Route: which expert group a segment takes and with which weights. Reference: reference/route.py.

The mean is summed up in parts of PART tokens, in order: a long prompt's parts by as many programs, then one program per
segment adds them up in order and chooses. The logits of a part are linear in it, so both routes share the second step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 256
"""Tokens per part, so 8192 of them are 32 programs; a decoding segment has one part. Unmeasured."""
ROWS = 16
"""Table rows or hidden states that a program has in flight. Unmeasured."""


def select(logits: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Group () int64 and weights (t,) fp32 from router logits (k·t,) fp32: see the reference."""
    return _choose(logits.view(1, -1), 1, t)


def route_ids(ids: Tensor, table: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Route of a segment from its token ids alone. ids (n,) int64; table (vocab, k·t) fp32."""
    count, kt = ids.shape[0], table.shape[1]
    parts = triton.cdiv(count, PART)
    sums = table.new_empty(parts, kt)
    _bag[(parts,)](ids, table, sums, count, kt, BLOCK=triton.next_power_of_2(kt), ROWS=ROWS, PART=PART, num_warps=1)
    return _choose(sums, count, t)


def route_hidden(x: Tensor, centroids: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Route of a segment from its router inputs. x (n, d); centroids (k·t, d) fp32."""
    (count, d), kt = x.shape, centroids.shape[0]
    parts = triton.cdiv(count, PART)
    means = x.new_empty(parts, d, dtype=torch.float32)
    _column_sums[(parts, triton.cdiv(d, 64))](
        x, means, count, d, x.stride(0), BLOCK=64, ROWS=ROWS, PART=PART, num_warps=2
    )
    sums = means.new_empty(1, kt)
    _project[(kt,)](means, centroids, sums, parts, d, BLOCK=min(1024, triton.next_power_of_2(d)), num_warps=4)
    return _choose(sums, count, t)


def _choose(sums: Tensor, count: int, t: int) -> tuple[Tensor, Tensor]:
    """The choice for sums (parts, k·t) over `count` tokens."""
    parts, kt = sums.shape
    group = torch.empty((), dtype=torch.int64, device=sums.device)
    weights = sums.new_empty(t)
    blocks = {"BLOCK_K": triton.next_power_of_2(kt // t), "BLOCK_T": triton.next_power_of_2(t)}
    _pick[(1,)](sums, group, weights, parts, count, kt // t, t, **blocks, num_warps=1)
    return group, weights


@triton.jit
def _bag(ids, table, sums, count, kt, BLOCK: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr):
    part = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(part * PART, tl.minimum(part * PART + PART, count), ROWS):
        token = begin + tl.arange(0, ROWS)
        row = tl.load(ids + token, mask=token < count, other=0)
        mask = (token < count)[:, None] & (i < kt)[None, :]
        acc += tl.load(table + row[:, None] * kt + i[None, :], mask=mask, other=0.0)
    tl.store(sums + part * kt + i, tl.sum(acc, 0), mask=i < kt)


@triton.jit
def _column_sums(x, sums, count, d, stride, BLOCK: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr):
    part = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(part * PART, tl.minimum(part * PART + PART, count), ROWS):
        token = begin + tl.arange(0, ROWS)
        mask = (token < count)[:, None] & (i < d)[None, :]
        acc += tl.load(x + token[:, None].to(tl.int64) * stride + i[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + part.to(tl.int64) * d + i, tl.sum(acc, 0), mask=i < d)


@triton.jit
def _project(sums, centroids, out, parts, d, BLOCK: tl.constexpr):
    """One centroid's product with the sum over all parts."""
    row = tl.program_id(0).to(tl.int64)
    acc = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, d, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for part in range(0, parts):
            total += tl.load(sums + part * d + i, mask=i < d, other=0.0)
        acc += total * tl.load(centroids + row * d + i, mask=i < d, other=0.0)
    tl.store(out + row, tl.sum(acc, 0))


@triton.jit
def _pick(sums, group, weights, parts, count, k, t, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr):
    choose(sums, group, weights, parts, count, k, t, BLOCK_K, BLOCK_T)


@triton.jit
def choose(sums, group, weights, parts, count, k, t, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr):
    """The mean's logits (k, t), each row over its L2 norm, sigmoid; the lowest group with the best score wins."""
    g, e = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_T)
    real = (g < k)[:, None] & (e < t)[None, :]
    at = g[:, None] * t + e[None, :]
    z = tl.zeros((BLOCK_K, BLOCK_T), tl.float32)
    for part in range(0, parts):
        z += tl.load(sums + part * k * t + at, mask=real, other=0.0)
    z = z / count.to(tl.float32)
    norm = tl.sqrt(tl.sum(z * z, 1))
    z = z / tl.maximum(norm, 1.17549435e-38)[:, None]
    score = tl.where(real, 1.0 / (1.0 + tl.exp(-z)), -1.0)
    best = tl.max(score, 1)
    top = tl.max(best, 0)
    winner = tl.min(tl.where((best == top) & (g < k), g, BLOCK_K), 0)
    tl.store(group, winner.to(tl.int64))
    own = tl.sum(tl.where(g[:, None] == winner, score, 0.0), 0)
    tl.store(weights + e, own, mask=e < t)
