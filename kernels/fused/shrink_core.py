"""Shrink: x to each row's own adapter's rank, and through its core: h = (x Uᵀ) M. Contract: ops.ShrinkCore.

Grid (tiles, chunk blocks, splits of d_in). A program multiplies a tile of rows with 16 or 64 rank rows over its span of
d_in and stores the product in fp32; a second launch adds up the spans in their order and multiplies with the core. No
float atomics: repeats agree bit for bit. That the last program of a tile did it instead, in one launch, was tried on an
H100: programs that stay for it keep the base's product, which runs beside, from its SMs, and a step took 1 to 3%
longer.

Chunks of rank rows are numbered rank first, target second: chunk c is target c mod n, ranks 16·(c div n) and up. So the
targets of a small rank lie in one block, x is read once for them, and blocks above an adapter's rank end at once.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tucka_runtime.kernels.fused.launch import launch
from tucka_runtime.kernels.fused.tiles import CHUNK, cdiv, dot, load_tile
from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.tables.segments import SMALL_BATCH, DeltaSite, SitePlan, power_of_2


@dataclass(frozen=True)
class Config:
    """How the product is cut."""

    block_k: int
    """Columns of x per step."""
    span: int
    """Columns of x per program; sums of spans are added in order."""
    chunks: int
    """Chunks of 16 rank rows per program."""
    warps: int
    stages: int


AHEAD = tl.constexpr(4)
"""Spans whose sums are read at once: more take the sum of a tile over 72 registers a thread."""


@lru_cache(4096)
def config(num_rows: int, d_in: int) -> Config:
    """Chooses by shape alone, and for decoding one for all: a row's sum does not depend on who else is in the batch."""
    if num_rows <= SMALL_BATCH:
        # On an H100 spans of 512 make a step of 64 rows of 32 adapters 1% longer, those of 2048 one of 4 to 32 rows.
        return Config(block_k=256, span=1024, chunks=1, warps=4, stages=3)
    # Prompts: 64 rank rows share one read of x; spans shrink while tiles are too few for 132 SMs. Unmeasured.
    span = 512 if num_rows <= 1024 else 1024 if num_rows <= 4096 else max(CHUNK, power_of_2(d_in))
    return Config(block_k=64, span=span, chunks=4, warps=4, stages=3)


def shrink_core(x: Tensor, site: DeltaSite, cores: Tensor | None, plan: SitePlan) -> LowRank:
    """ops.ShrinkCore."""
    return run(x, site, cores, plan, config(x.shape[0], x.shape[1]))


def run(x: Tensor, site: DeltaSite, cores: Tensor | None, plan: SitePlan, how: Config) -> LowRank:
    """`shrink_core` in a given configuration, for tests and the bench."""
    num_rows, d_in = x.shape
    if x.dtype != site.dtype or d_in != site.d_in:
        raise ValueError(f"x is {x.dtype} of width {d_in}, the factors are {site.dtype} of width {site.d_in}")
    n, rank, segments = len(site.columns) - 1, plan.max_rank, plan.segments
    h = x.new_empty(num_rows, n, rank)
    num_tiles = segments.tiles.shape[0]
    if not num_tiles:
        return LowRank(h, site, plan)
    rank_chunks, splits = cdiv(rank, CHUNK), cdiv(d_in, how.span)
    part = x.new_empty(splits, num_rows, n, rank_chunks * CHUNK, dtype=torch.float32)
    launch(
        _shrink,
        (num_tiles, cdiv(n * rank_chunks, how.chunks), splits),
        x,
        site.u_ptr,
        part,
        site.rank,
        segments.tiles,
        num_rows,
        n,
        rank_chunks * CHUNK,
        d_in,
        x.stride(0),
        SPAN=how.span,
        CHUNKS=how.chunks,
        BLOCK_M=segments.tile_rows,
        BLOCK_K=how.block_k,
        ALIGN=math.gcd(16, d_in * x.element_size()),
        num_warps=how.warps,
        num_stages=how.stages,
    )
    # Never read where there is none: no rank is as small as 0.
    made: tuple[object, ...] = (x, 0, 0, 0, 0) if cores is None else (cores, *cores.stride()[:3], cores.shape[-1])
    launch(
        _finish,
        (num_tiles, n, rank_chunks),
        part,
        h,
        *made,
        site.rank,
        segments.tiles,
        segments.row_cores,
        num_rows,
        n,
        rank,
        rank_chunks * CHUNK,
        splits,
        BLOCK_M=segments.tile_rows,
        num_warps=4,
    )
    return LowRank(h, site, plan)


@triton.jit(do_not_specialize=["num_rows"])
def _shrink(
    x,
    u_ptr,
    part,
    rank,
    tiles,
    num_rows,
    n,
    width_part,
    d_in,
    x_stride,
    SPAN: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(2)
    first, end, core, adapter = load_tile(tiles, tile)
    if (core < 0) | (first >= end):
        return
    lane = tl.arange(0, CHUNKS * 16)
    chunk = tl.program_id(1) * CHUNKS + lane // 16
    target = chunk % n
    i = chunk // n * 16 + lane % 16
    live = i < tl.load(rank + adapter * n + target)
    # Asked for with the rank, not after it.
    address = tl.load(u_ptr + adapter * n + target)
    if tl.max(live.to(tl.int32), 0) == 0:
        return
    u = address.to(tl.pointer_type(x.dtype.element_ty)) + i.to(tl.int64) * d_in
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < end
    x_row = x + rows.to(tl.int64) * x_stride
    acc = tl.zeros((BLOCK_M, CHUNKS * 16), tl.float32)
    for k in range(split * SPAN, tl.minimum(split * SPAN + SPAN, d_in), BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        real = column < d_in
        a = tl.load(x_row[:, None] + column[None, :], mask=inside[:, None] & real[None, :], other=0.0)
        # Compilers lose the alignment of a row's start on the way to two dimensions: without the hint, 2-byte loads.
        u_at = tl.multiple_of(u[None, :] + column[:, None], (ALIGN, 1))
        b = tl.load(u_at, mask=real[:, None] & live[None, :], other=0.0)
        acc = dot(a, b, acc)
    row = (split * num_rows + rows).to(tl.int64)
    at = part + (row[:, None] * n + target[None, :]) * width_part + i[None, :]
    # Whole chunks, with zeros beyond the rank: whoever adds them up reads them 16 bytes at a time.
    mask = inside[:, None] if CHUNKS == 1 else inside[:, None] & (i < width_part)[None, :]
    tl.store(at, acc, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "splits"])
def _finish(
    part,
    h,
    cores,
    core_s,
    core_n,
    core_r,
    core_size,
    rank,
    tiles,
    row_cores,
    num_rows,
    n,
    width_h,
    width_part,
    splits,
    BLOCK_M: tl.constexpr,
):
    """h[rows, target, out : out + 16] from the sums over the spans, through each row's core where the rank has one.

    A tile's core is the first row's; where its rows have several, all are multiplied with each, and a row takes its
    own: what another's core makes of it, be it NaN, is not kept.
    """
    first, end, core, adapter = load_tile(tiles, tl.program_id(0))
    target, out = tl.program_id(1), tl.program_id(2) * 16
    if (core < 0) | (first >= end):
        return
    r = tl.load(rank + adapter * n + target)
    if out >= r:
        return
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < end
    column = out + tl.arange(0, 16)
    if r <= core_size:
        own = tl.load(row_cores + rows, mask=inside, other=-1)
        acc = tl.zeros((BLOCK_M, 16), tl.float32)
        for c in range(0, r, 16):
            i = c + tl.arange(0, 16)
            total = _sum_spans(part, rows, inside, target, i, num_rows, n, width_part, splits, BLOCK_M)
            total = total.to(h.dtype.element_ty)
            mixed, now, begin = acc, core, tl.min(rows)
            while begin < end:
                m = _load_core(cores, now, core_s, core_n, core_r, core_size, target, r, c, out)
                mixed = tl.where((own == now)[:, None], dot(total, m, acc), mixed)
                begin = tl.min(tl.where(inside & (rows > begin) & (own != now), rows, end))
                now = tl.max(tl.where(rows == begin, own, -1))
            acc = mixed
    else:
        acc = _sum_spans(part, rows, inside, target, column, num_rows, n, width_part, splits, BLOCK_M)
    at = h + (rows[:, None].to(tl.int64) * n + target) * width_h + column[None, :]
    tl.store(at, acc.to(h.dtype.element_ty), mask=inside[:, None] & (column < width_h)[None, :])


@triton.jit
def _load_core(cores, core, core_s, core_n, core_r, core_size, target, r, c, out):
    """(16, 16) of a core from row c and column `out` on, zeros beyond the rank. It lies at its number and target, its
    rows core_r apart."""
    i, column = c + tl.arange(0, 16), out + tl.arange(0, 16)
    core_at = cores + core.to(tl.int64) * core_s + target * core_n + i[:, None] * core_r + column[None, :]
    # Read as wide as cores lie, and chosen from: a mask of r would split the reads into single elements.
    within = (i < core_size)[:, None] & (column < core_size)[None, :]
    m = tl.load(core_at, mask=within, other=0.0)
    return tl.where((i < r)[:, None] & (column < r)[None, :], m, 0.0)


@triton.jit
def _sum_spans(part, rows, inside, target, i, num_rows, n, width_part, splits, BLOCK_M: tl.constexpr):
    """A chunk's columns, zeros beyond the rank. Spans are added in their order, and read several at a time: one by one,
    each would wait for the one before."""
    total = tl.zeros((BLOCK_M, 16), tl.float32)
    for begin in tl.range(0, splits, AHEAD, num_stages=1):
        for k in tl.static_range(AHEAD):
            split = begin + k
            row = (split * num_rows + rows).to(tl.int64)
            at = part + (row[:, None] * n + target) * width_part + i[None, :]
            there = tl.where(split < splits, inside, False)
            total += tl.load(at, mask=there[:, None], other=0.0)
    return total
