"""Shrink: x to each row's own adapter's rank, and through its core: h = (x Uᵀ) M. Contract: ops.ShrinkCore.

Grid (tiles, chunk blocks, splits of d_in). A program multiplies a tile of rows with 16 or 64 rank rows over its span of
d_in and stores the product in fp32; the last program of a tile and target (one launch), or a second launch, adds up the
spans in their order and multiplies with the core. No float atomics: repeats agree bit for bit.

Chunks of rank rows are numbered rank first, target second: chunk c is target c mod n, ranks 16·(c div n) and up. So the
targets of a small rank lie in one block, x is read once for them, and blocks above an adapter's rank end at once.

Cores come made (`core.core`), or as the slices that they are linear in (`core.slices`) and are combined here.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tucka_runtime.kernels.fused.launch import launch
from tucka_runtime.kernels.fused.tiles import CHUNK, arrive, cdiv, counters, dot, load_tile
from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.tables.routes import Slices
from tucka_runtime.kernels.tables.segments import SMALL_BATCH, DeltaSite, SitePlan, power_of_2


@dataclass(frozen=True)
class Config:
    """How the product is cut. No constant here has been chosen by a device yet: the bench is what shall."""

    block_k: int
    """Columns of x per step."""
    span: int
    """Columns of x per program; sums of spans are added in order."""
    chunks: int
    """Chunks of 16 rank rows per program."""
    one_launch: bool
    """The last program of a tile and target finishes it; needs chunks = 1."""
    warps: int
    stages: int


AHEAD = tl.constexpr(4)
"""Spans whose sums are read at once: more take the sum of a tile over 72 registers a thread."""


@lru_cache(4096)
def config(num_rows: int, d_in: int, rank: int, combine: bool = False) -> Config:
    """Chooses by shape alone, and for decoding by d_in alone: a row's sum does not depend on who else is in the
    batch. `combine`: cores are combined on the fly, which takes registers, so that steps are shorter."""
    if num_rows <= SMALL_BATCH:
        # 512 columns: 16 KB of U a program, so 32 adapters of r 16 at q and v of d 4096 make 512 programs, four per SM.
        # Over r 32 the sums of a tile are too long a tail for one program (128 KB at r 128), hence the second launch.
        return Config(block_k=128 if combine else 256, span=512, chunks=1, one_launch=rank <= 32, warps=4, stages=3)
    # Prompts: 64 rank rows share one read of x; spans shrink while tiles are too few for 132 SMs.
    span = 512 if num_rows <= 1024 else 1024 if num_rows <= 4096 else max(CHUNK, power_of_2(d_in))
    return Config(block_k=64, span=span, chunks=4, one_launch=False, warps=4, stages=3)


def shrink_core(x: Tensor, site: DeltaSite, cores: Tensor | None, plan: SitePlan) -> LowRank:
    """ops.ShrinkCore."""
    return run(x, site, cores, plan)


def run(
    x: Tensor, site: DeltaSite, cores: Tensor | Slices | None, plan: SitePlan, how: Config | None = None
) -> LowRank:
    """`shrink_core` in a given configuration, and with cores that are combined on the fly, for the bench."""
    combine = isinstance(cores, Slices)
    how = how or config(x.shape[0], x.shape[1], plan.max_rank, combine)
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
    made: tuple[object, ...] = (x, x, 0, 0, 0, 0)  # never read: no rank is as small as 0
    if isinstance(cores, Slices):
        made = (cores.address, cores.weight, *cores.address.stride(), cores.weight.shape[2], 0)
    elif cores is not None:
        made = (cores, x, *cores.stride()[:3], cores.shape[-1])
    shared = (
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
    )
    blocks = cdiv(n * rank_chunks, how.chunks)
    launch(
        _shrink,
        (num_tiles, blocks, splits),
        x,
        site.u_ptr,
        counters("shrink_core", num_tiles * n, x.device),
        *shared,
        d_in,
        x.stride(0),
        SPAN=how.span,
        CHUNKS=how.chunks,
        BLOCK_M=segments.tile_rows,
        BLOCK_K=how.block_k,
        ALIGN=math.gcd(16, d_in * x.element_size()),
        ONE_LAUNCH=how.one_launch,
        COMBINE=combine,
        num_warps=how.warps,
        num_stages=how.stages,
    )
    if not how.one_launch:
        launch(_finish, (num_tiles, n, rank_chunks), *shared, BLOCK_M=segments.tile_rows, COMBINE=combine, num_warps=4)
    return LowRank(h, site, plan)


@triton.jit(do_not_specialize=["num_rows", "splits"])
def _shrink(
    x,
    u_ptr,
    counter,
    part,
    h,
    cores,
    core_weights,
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
    d_in,
    x_stride,
    SPAN: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
    ONE_LAUNCH: tl.constexpr,
    COMBINE: tl.constexpr,
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
    if ONE_LAUNCH:
        own = tl.program_id(1) % n
        r = tl.load(rank + adapter * n + own)
        if arrive(counter + tile * n + own, (r + 15) // 16 * splits):
            # Read once more: what is kept until here takes registers that the product needs.
            first, end, core, adapter = load_tile(tiles, tile)
            rows = first + tl.arange(0, BLOCK_M)
            r = tl.load(rank + adapter * n + own)
            for out in range(0, r, 16):
                _mix(
                    part, h, cores, core_weights, core_s, core_n, core_r, core_size, core, row_cores, rows, end, own, r,
                    out, num_rows, n, width_h, width_part, splits, BLOCK_M, COMBINE,
                )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "splits"])
def _finish(
    part,
    h,
    cores,
    core_weights,
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
    COMBINE: tl.constexpr,
):
    """The second launch: grid (tiles, targets, chunks of h)."""
    first, end, core, adapter = load_tile(tiles, tl.program_id(0))
    if (core < 0) | (first >= end):
        return
    target, out = tl.program_id(1), tl.program_id(2) * 16
    r = tl.load(rank + adapter * n + target)
    if out < r:
        rows = first + tl.arange(0, BLOCK_M)
        _mix(
            part, h, cores, core_weights, core_s, core_n, core_r, core_size, core, row_cores, rows, end, target, r, out,
            num_rows, n, width_h, width_part, splits, BLOCK_M, COMBINE,
        )  # fmt: skip


@triton.jit
def _mix(
    part,
    h,
    cores,
    core_weights,
    core_s,
    core_n,
    core_r,
    core_size,
    core,
    row_cores,
    rows,
    end,
    target,
    r,
    out,
    num_rows,
    n,
    width_h,
    width_part,
    splits,
    BLOCK_M: tl.constexpr,
    COMBINE: tl.constexpr,
):
    """h[rows, target, out : out + 16] from the sums over the spans, through each row's core where the rank has one.

    `core` is the first row's; where a tile's rows have several, all are multiplied with each, and a row takes its own:
    what another's core makes of it, be it NaN, is not kept.
    """
    column = out + tl.arange(0, 16)
    inside = rows < end
    if COMBINE:
        # An adapter's rows have all a core or none.
        has_core = tl.load(cores + core.to(tl.int64) * core_s + target * core_n) != 0
    else:
        has_core = r <= core_size
    if has_core:
        own = tl.load(row_cores + rows, mask=inside, other=-1)
        acc = tl.zeros((BLOCK_M, 16), tl.float32)
        for c in range(0, r, 16):
            i = c + tl.arange(0, 16)
            total = _sum_spans(part, rows, inside, target, i, num_rows, n, width_part, splits, BLOCK_M)
            total = total.to(h.dtype.element_ty)
            mixed, now, begin = acc, core, tl.min(rows)
            while begin < end:
                m = _load_core(
                    cores, core_weights, now, core_s, core_n, core_r, core_size, h, target, r, c, out, COMBINE
                )
                mixed = tl.where((own == now)[:, None], dot(total, m, acc), mixed)
                begin = tl.min(tl.where(inside & (rows > begin) & (own != now), rows, end))
                now = tl.max(tl.where(rows == begin, own, -1))
            acc = mixed
    else:
        acc = _sum_spans(part, rows, inside, target, column, num_rows, n, width_part, splits, BLOCK_M)
    at = h + (rows[:, None].to(tl.int64) * n + target) * width_h + column[None, :]
    tl.store(at, acc.to(h.dtype.element_ty), mask=inside[:, None] & (column < width_h)[None, :])


@triton.jit
def _load_core(
    cores, core_weights, core, core_s, core_n, core_r, core_size, like, target, r, c, out, COMBINE: tl.constexpr
):  # fmt: skip
    """(16, 16) of a core from row c and column `out` on, in the type of `like`, zeros beyond the rank.

    Made, it lies in cores at its number and target, its rows core_r apart. To be combined, it is core_r slices of
    (r, r) at the address that stands there, their weights core_r times as far on in core_weights.
    """
    at_core = core.to(tl.int64) * core_s + target * core_n
    i, column = c + tl.arange(0, 16), out + tl.arange(0, 16)
    real = (i < r)[:, None] & (column < r)[None, :]
    if COMBINE:
        slices = tl.load(cores + at_core).to(tl.pointer_type(tl.float32))
        m = tl.zeros((16, 16), tl.float32)
        for j in range(core_r):
            weight = tl.load(core_weights + at_core * core_r + j)
            height = tl.where(weight == 0, 0, r)  # where there is no slice any more nothing is read
            at = slices + (j * r + i[:, None]) * r + column[None, :]
            m += weight * tl.load(at, mask=real & (i < height)[:, None], other=0.0)
        m = m.to(like.dtype.element_ty)
    else:
        # Read as wide as cores lie, and chosen from: a mask of r would split the reads into single elements.
        within = (i < core_size)[:, None] & (column < core_size)[None, :]
        m = tl.load(cores + at_core + i[:, None] * core_r + column[None, :], mask=within, other=0.0)
        m = tl.where(real, m, 0.0)
    return m


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
            total += tl.load(at, mask=there[:, None], other=0.0, cache_modifier=".cg")
    return total
