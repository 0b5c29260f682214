"""Delta of a block's last product, residual, and the next block's norm. Contract: ops.ExpandResidual.

Without adapters one launch. With them two: a norm needs whole rows, but E is best read by many programs, grid (tiles,
blocks of columns); in a graph a program does several tiles, one after the other (tiles.tile_grid). That the last
program of a tile normalised the tile's rows, in one launch, was tried on an H100: with 32 adapters at 64 rows it took
10 us longer each time than a second launch, and with one row as long.
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
    cdiv,
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
    total = add(y, low_rank, residual, BLOCK_N)
    return norm(total, weight, bias, eps), total


def add(y: Tensor, low_rank: LowRank, residual: Tensor, block_n: int) -> Tensor:
    """residual + y + delta (T, d), in blocks of `block_n` columns, each within one target."""
    columns = low_rank.site.columns
    if any(c % block_n for c in columns[1:-1]):
        raise ValueError(f"the borders of the targets, {columns}, must be multiples of {block_n}")
    total = torch.empty_like(residual)
    if low_rank.plan.segments.tiles.shape[0]:
        launch(
            _add,
            tile_grid(low_rank.plan.segments, cdiv(y.shape[1], block_n)),
            y,
            residual,
            total,
            *delta_args(low_rank),
            y.shape[1],
            y.stride(0),
            residual.stride(0),
            BLOCK_N=block_n,
            num_warps=4,
            **delta_options(low_rank, block_n),
        )
    return total


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
    tile, first_next, end_next, adapter_next = next_tile(tiles, tile, num_tiles, PADDED)
    while first < end:
        # The tile is asked for two turns ahead, what lies at its adapter one: each is there when it is needed.
        tile, first_then, end_then, adapter_then = next_tile(tiles, tile, num_tiles, PADDED)
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
        first, end, adapter, r, address = first_next, end_next, adapter_next, r_next, address_next
        first_next, end_next, adapter_next = first_then, end_then, adapter_then
