"""Delta of a block's last product, residual, and the next block's norm. Contract: ops.ExpandResidual.

Without adapters one launch. With them a norm needs whole rows, but E is best read by many programs, grid (tiles, blocks
of columns); in a graph a program does several tiles, one after the other (tiles.tile_grid). Decoding, the last
program of a tile normalises the tile's rows: one launch still. Where tiles are so full that this takes longer than a
launch, it is a second one; so it is in prompts, and there norm's own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tucka_runtime.kernels.fused.expand import BLOCK_N
from tucka_runtime.kernels.fused.launch import launch
from tucka_runtime.kernels.fused.norm import add_norm, norm
from tucka_runtime.kernels.fused.tiles import (
    add_further,
    arrive,
    cdiv,
    counters,
    delta_args,
    delta_options,
    find_borders,
    find_target,
    load_e,
    load_h,
    load_rank,
    load_tile,
    multiply,
    next_tile,
    scaled,
    tile_grid,
)
from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.tables.segments import SMALL_TILE, Segments, adapter_runs, power_of_2

TAIL_BYTES = 24 * 1024
"""The bytes of a tile's rows that one program normalises while another launch would start. It reads them twice, the
norm's weights as often as there are rows, and writes: four times as many bytes, at some 64 a clock. Unmeasured."""


def one_launch(segments: Segments, row_bytes: int) -> bool:
    """Whether the last program of a tile normalises the tile's rows, or a second launch.

    The fullest tile that the host knows of decides. A CUDA graph holds what was chosen for the batch it was captured
    with, which is right for any other: a decoding row's bits are the same either way, so they do not depend on the
    choice.
    """
    first = segments.spans[0][0] if segments.spans else segments.num_rows
    fullest = max([first, *(end - begin for begin, end, _ in adapter_runs(segments.spans))])
    return min(fullest, segments.tile_rows) * row_bytes <= TAIL_BYTES


def expand_residual(
    y: Tensor,
    low_rank: LowRank | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """ops.ExpandResidual."""
    if low_rank is None:
        return add_norm(y, residual, weight, bias, eps)
    segments = low_rank.plan.segments
    if segments.tile_rows > SMALL_TILE:
        # A full tile is half a megabyte at d 4096: never done before another launch. Unmeasured.
        total = add(y, low_rank, residual, BLOCK_N)
        return norm(total, weight, bias, eps), total
    one = one_launch(segments, y.shape[1] * residual.element_size())
    return run(y, low_rank, residual, weight, bias, eps, one, BLOCK_N)


def add(y: Tensor, low_rank: LowRank, residual: Tensor, block_n: int) -> Tensor:
    """residual + y + delta (T, d), in blocks of `block_n` columns, each within one target."""
    total = torch.empty_like(residual)
    unused = {"D": 1, "BLOCK": 1, "STEP": 1, "ROW_STAGES": 1, "STEP_STAGES": 1, "CENTRE": False}
    _launch(y, low_rank, residual, total, block_n, (total, total, total, total, 0.0), ONE_LAUNCH=False, **unused)
    return total


def run(
    y: Tensor,
    low_rank: LowRank,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    one: bool,
    block_n: int,
) -> tuple[Tensor, Tensor]:
    """`expand_residual` of a batch with adapters in one launch or in two, for tests and the bench."""
    width, tiles = y.shape[1], low_rank.plan.segments.tiles
    size = width * residual.element_size()
    # What is read ahead goes through L1 where it cannot go in 16 bytes. There a sector of 32 bytes with the end of one
    # tile's rows and the start of the next's could be found as it was before the next's sum was in it.
    ahead = size % 32 == 0
    how: dict[str, int] = {
        "D": width,
        "BLOCK": power_of_2(width),
        "STEP": min(1024, power_of_2(width)),
        # 16 KB on their way into shared memory: more would take programs from the sum, whose registers let an SM have
        # ten. Unmeasured.
        "ROW_STAGES": 1 if not ahead else 3 if size <= 8192 else 2,
        "STEP_STAGES": 4 if ahead else 1,
        "CENTRE": bias is not None,
    }
    out = torch.empty_like(residual)
    tail = (out, weight, weight if bias is None else bias, eps)
    if one:
        total = torch.empty_like(residual)
        counter = counters("expand_residual", tiles.shape[0], y.device)
        _launch(y, low_rank, residual, total, block_n, (counter, *tail), ONE_LAUNCH=True, **how)
        return out, total
    total = add(y, low_rank, residual, block_n)
    if tiles.shape[0]:
        rows = low_rank.plan.segments.tile_rows
        launch(_finish, (tiles.shape[0], rows), total, *tail, tiles, BLOCK_M=rows, num_warps=4, **how)
    return out, total


def _launch(
    y: Tensor,
    low_rank: LowRank,
    residual: Tensor,
    total: Tensor,
    block_n: int,
    tail: tuple[Tensor | float, ...],
    **how: int,
) -> None:
    columns = low_rank.site.columns
    if any(c % block_n for c in columns[1:-1]):
        raise ValueError(f"the borders of the targets, {columns}, must be multiples of {block_n}")
    blocks = cdiv(y.shape[1], block_n)
    if low_rank.plan.segments.tiles.shape[0]:
        launch(
            _add,
            tile_grid(low_rank.plan.segments, blocks),
            y,
            residual,
            total,
            *delta_args(low_rank),
            *tail,
            y.shape[1],
            y.stride(0),
            residual.stride(0),
            BLOCK_N=block_n,
            num_warps=4,
            **delta_options(low_rank, block_n),
            **how,
        )


@triton.jit(do_not_specialize=["num_tiles"])
def _add(
    y,
    residual,
    total,
    h,
    e_ptr,
    affine_ptr,
    rank,
    borders,
    tiles,
    num_tiles,
    n,
    width_h,
    counter,
    out,
    weight,
    bias,
    eps,
    width,
    y_stride,
    residual_stride,
    ALIGN: tl.constexpr,
    E_ALIGN: tl.constexpr,
    H_ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FURTHER: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ROW_STAGES: tl.constexpr,
    STEP_STAGES: tl.constexpr,
    CENTRE: tl.constexpr,
    ONE_LAUNCH: tl.constexpr,
):
    tile = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    wanted = columns < width
    target = find_target(borders, column, n)
    begin, own_width = find_borders(borders, target, ALIGN)
    own = columns - begin
    first, end, _, adapter = load_tile(tiles, tile)
    r, address = load_rank(e_ptr, rank, adapter, target, n)
    after, first_next, end_next, adapter_next = next_tile(tiles, tile, num_tiles, PADDED)
    while first < end:
        # The tile is asked for two turns ahead, what lies at its adapter one: each is there when it is needed.
        then, first_then, end_then, adapter_then = next_tile(tiles, after, num_tiles, PADDED)
        r_next, address_next = load_rank(e_ptr, rank, adapter_next, target, n)
        a = load_h(h, first, end, adapter, target, 0, n, width_h, H_ALIGN, BLOCK_M, BLOCK_R)
        rows = first + tl.arange(0, BLOCK_M)
        mask = (rows < end)[:, None] & wanted[None, :]
        row = rows[:, None].to(tl.int64)
        own_y = tl.load(y + row * y_stride + columns[None, :], mask=mask, other=0.0)
        before = tl.load(residual + row * residual_stride + columns[None, :], mask=mask, other=0.0)
        b = load_e(address, h, r, 0, own, own_width, wanted, E_ALIGN, BLOCK_R)
        acc = multiply(a, b, r, 0, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if FURTHER:
            acc = add_further(
                acc, h, address, first, end, adapter, target, r, own, own_width, wanted, n, width_h, E_ALIGN, H_ALIGN,
                BLOCK_M, BLOCK_R,
            )  # fmt: skip
        if AFFINE:
            acc += scaled(own_y.to(tl.float32), affine_ptr, adapter, target, n, own, own_width, wanted)
        else:
            acc += own_y.to(tl.float32)
        acc += before.to(tl.float32)
        tl.store(total + row * width + columns[None, :], acc.to(total.dtype.element_ty), mask=mask)
        if ONE_LAUNCH:
            last = arrive(counter + tile, tl.num_programs(1))
            if last:
                _normalise(
                    total, out, weight, bias, eps, first, end, BLOCK_M, D, BLOCK, STEP, ROW_STAGES, STEP_STAGES, CENTRE
                )
        tile, first, end, adapter, r, address = after, first_next, end_next, adapter_next, r_next, address_next
        after, first_next, end_next, adapter_next = then, first_then, end_then, adapter_then


@triton.jit
def _finish(
    total,
    out,
    weight,
    bias,
    eps,
    tiles,
    BLOCK_M: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ROW_STAGES: tl.constexpr,
    STEP_STAGES: tl.constexpr,
    CENTRE: tl.constexpr,
):
    """The second launch: grid (tiles, rows of a tile)."""
    first, end, _, _ = load_tile(tiles, tl.program_id(0))
    row = first + tl.program_id(1)
    if row < end:
        _normalise(
            total, out, weight, bias, eps, row, row + 1, BLOCK_M, D, BLOCK, STEP, ROW_STAGES, STEP_STAGES, CENTRE
        )


@triton.jit
def _normalise(
    total,
    out,
    weight,
    bias,
    eps,
    begin,
    end,
    BLOCK_M: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ROW_STAGES: tl.constexpr,
    STEP_STAGES: tl.constexpr,
    CENTRE: tl.constexpr,
):
    """Rows begin to end, at most BLOCK_M of them: read whole for their sums, then again, STEP columns at a time. To
    hold them in between would take registers, and so programs, from the sum."""
    rows = begin + tl.arange(0, BLOCK_M)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    scale = tl.zeros((BLOCK_M,), tl.float32)
    i = tl.arange(0, BLOCK)
    for k in tl.range(0, end - begin, num_stages=ROW_STAGES):
        row = begin + k
        v = tl.load(total + row.to(tl.int64) * D + i, mask=i < D, other=0.0, cache_modifier=".cg").to(tl.float32)
        if CENTRE:
            m = tl.sum(v, 0) / D
            mean = tl.where(rows == row, m, mean)
            v = tl.where(i < D, v - m, 0.0)
        scale = tl.where(rows == row, tl.rsqrt(tl.sum(v * v, 0) / D + eps), scale)
    steps: tl.constexpr = (D + STEP - 1) // STEP
    for k in tl.range(0, (end - begin) * steps, num_stages=STEP_STAGES):
        row = begin + k // steps
        column = k % steps * STEP + tl.arange(0, STEP)
        place = row.to(tl.int64) * D + column
        v = tl.load(total + place, mask=column < D, other=0.0, cache_modifier=".cg").to(tl.float32)
        if CENTRE:
            v -= tl.sum(tl.where(rows == row, mean, 0.0), 0)
        v *= tl.sum(tl.where(rows == row, scale, 0.0), 0)
        v *= tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        if CENTRE:
            v += tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
        tl.store(out + place, v.to(out.dtype.element_ty), mask=column < D)
