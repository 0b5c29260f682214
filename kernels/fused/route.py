"""Route: which expert group a segment takes and with which weights. Contract: ops.Select, RouteIds, RouteHidden.

The mean is summed up in parts of PART tokens, in order: a long prompt's parts by as many programs, then one program per
segment adds them up in order and chooses. The logits of a part are linear in it, so both routes share the second step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tucka_runtime.kernels.fused.launch import launch
from tucka_runtime.kernels.fused.tiles import COLUMNS, COUNT, EXPERTS, GROUPS, IDS, TABLE, cdiv
from tucka_runtime.kernels.tables.routes import RoutePlan
from tucka_runtime.kernels.tables.segments import power_of_2

PART = 256
"""Tokens per part, so 8192 of them are 32 programs; a decoding segment has one part. Unmeasured."""
ROWS = 16
"""Table rows or hidden states that a program has in flight. Unmeasured."""


def select(logits: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """ops.Select."""
    one = torch.ones(logits.shape[0], dtype=torch.int64, device=logits.device)
    return _choose(logits[:, None], one, t)


def route_ids(plan: RoutePlan) -> None:
    """ops.RouteIds: one launch for all segments, two where one of them has more than PART tokens."""
    limits, count = plan.limits, plan.records.shape[0]
    parts = max(1, cdiv(limits.tokens, PART))
    k, t = power_of_2(limits.k), power_of_2(limits.t)
    sums = plan.weights.new_empty((count, parts, k * t) if parts > 1 else (1,))
    own = (plan.records, sums, plan.groups, plan.weights, plan.weights.stride(0), parts)
    launch(_bag, (count, parts), *own, BLOCK_K=k, BLOCK_T=t, ROWS=ROWS, PART=PART, ONE=parts == 1, num_warps=1)
    if parts > 1:
        launch(_pick_bag, (count,), *own, BLOCK_K=k, BLOCK_T=t, num_warps=1)


def route_hidden(x: Tensor, centroids: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """ops.RouteHidden."""
    (count, d), kt = x.shape, centroids.shape[0]
    parts = cdiv(count, PART)
    means = x.new_empty(parts, d, dtype=torch.float32)
    launch(
        _column_sums, (parts, cdiv(d, 64)), x, means, count, d, x.stride(0), BLOCK=64, ROWS=ROWS, PART=PART, num_warps=2
    )
    sums = means.new_empty(1, 1, kt)
    launch(_project, (kt,), means, centroids, sums, parts, d, BLOCK=min(1024, power_of_2(d)), num_warps=4)
    return _choose(sums, torch.full((1,), count, dtype=torch.int64, device=x.device), t)


def _choose(sums: Tensor, counts: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """The choices for sums (S, parts, k·t) over counts (S,) int64 tokens."""
    segments, parts, kt = sums.shape
    groups = torch.empty(segments, dtype=torch.int64, device=sums.device)
    weights = sums.new_empty(segments, t)
    blocks = {"BLOCK_K": power_of_2(kt // t), "BLOCK_T": power_of_2(t)}
    launch(
        _pick,
        (segments,),
        sums.contiguous(),
        groups,
        weights,
        parts,
        counts,
        counts.stride(0),
        kt // t,
        t,
        **blocks,
        num_warps=1,
    )
    return groups, weights


@triton.jit(do_not_specialize=["parts"])
def _bag(
    records, sums, groups, weights, stride, parts,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """The sum of one part of a segment's table rows, 0 where it has no such part; the only part chooses at once.
    Sums (S, parts, BLOCK_K · BLOCK_T). A segment without ids has a route."""
    s, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    record = records + s * COLUMNS
    count = tl.load(record + COUNT)
    if count == 0:
        return
    ids = tl.load(record + IDS).to(tl.pointer_type(tl.int64))
    table = tl.load(record + TABLE).to(tl.pointer_type(tl.float32))
    k, t = tl.load(record + GROUPS), tl.load(record + EXPERTS)
    i = tl.arange(0, BLOCK_K * BLOCK_T)
    g, e = i // BLOCK_T, i % BLOCK_T
    real = (g < k) & (e < t)
    acc = tl.zeros((ROWS, BLOCK_K * BLOCK_T), tl.float32)
    for begin in range(part * PART, tl.minimum(part * PART + PART, count), ROWS):
        token = begin + tl.arange(0, ROWS)
        row = tl.load(ids + token, mask=token < count, other=0)
        mask = (token < count)[:, None] & real[None, :]
        acc += tl.load(table + row[:, None] * k * t + (g * t + e)[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, 0)
    if ONE:
        z = tl.reshape(total, (BLOCK_K, BLOCK_T))
        mask = tl.reshape(real, (BLOCK_K, BLOCK_T))
        decide(z, mask, count, groups + s, weights + s * stride, t, k, BLOCK_K, BLOCK_T)
    else:
        tl.store(sums + (s * parts + part) * BLOCK_K * BLOCK_T + i, total)


@triton.jit(do_not_specialize=["parts"])
def _pick_bag(records, sums, groups, weights, stride, parts, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr):
    """The choice from a segment's parts, added up in order."""
    s = tl.program_id(0).to(tl.int64)
    record = records + s * COLUMNS
    count = tl.load(record + COUNT)
    if count == 0:
        return
    k, t = tl.load(record + GROUPS), tl.load(record + EXPERTS)
    g, e = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_T)
    z = tl.zeros((BLOCK_K, BLOCK_T), tl.float32)
    for part in range(0, parts):
        z += tl.load(sums + (s * parts + part) * BLOCK_K * BLOCK_T + g[:, None] * BLOCK_T + e[None, :])
    real = (g < k)[:, None] & (e < t)[None, :]
    decide(z, real, count, groups + s, weights + s * stride, t, k, BLOCK_K, BLOCK_T)


@triton.jit(do_not_specialize=["count"])
def _column_sums(x, sums, count, d, stride, BLOCK: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr):
    part = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(part * PART, tl.minimum(part * PART + PART, count), ROWS):
        token = begin + tl.arange(0, ROWS)
        mask = (token < count)[:, None] & (i < d)[None, :]
        acc += tl.load(x + token[:, None].to(tl.int64) * stride + i[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + part.to(tl.int64) * d + i, tl.sum(acc, 0), mask=i < d)


@triton.jit(do_not_specialize=["parts"])
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


@triton.jit(do_not_specialize=["parts"])
def _pick(sums, groups, weights, parts, counts, stride, k, t, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    choose(
        sums + s * parts * k * t,
        groups + s,
        weights + s * t,
        parts,
        tl.load(counts + s * stride),
        k,
        t,
        BLOCK_K,
        BLOCK_T,
    )


@triton.jit
def choose(sums, group, weights, parts, count, k, t, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr):
    """`decide` for the sum of parts (parts, k·t), in order."""
    g, e = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_T)
    real = (g < k)[:, None] & (e < t)[None, :]
    at = g[:, None] * t + e[None, :]
    z = tl.zeros((BLOCK_K, BLOCK_T), tl.float32)
    for part in range(0, parts):
        z += tl.load(sums + part * k * t + at, mask=real, other=0.0)
    decide(z, real, count, group, weights, t, k, BLOCK_K, BLOCK_T)


@triton.jit
def decide(z, real, count, group, weights, width, k, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr):
    """The mean's logits (k, t), each row over its L2 norm, sigmoid; the lowest group with the best score wins.

    z (BLOCK_K, BLOCK_T) are the sums over `count` tokens, 0 where not `real`. Writes `width` weights, 0 beyond t.
    """
    g, e = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_T)
    z = z / count.to(tl.float32)
    norm = tl.sqrt(tl.sum(z * z, 1))
    z = z / tl.maximum(norm, 1.17549435e-38)[:, None]
    score = tl.where(real, 1.0 / (1.0 + tl.exp(-z)), -1.0)
    best = tl.max(score, 1)
    top = tl.max(best, 0)
    winner = tl.min(tl.where((best == top) & (g < k), g, BLOCK_K), 0)
    tl.store(group, winner.to(tl.int64))
    own = tl.sum(tl.where((g[:, None] == winner) & real, score, 0.0), 0)
    tl.store(weights + e, own, mask=e < width)
