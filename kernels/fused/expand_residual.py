"""Delta of a block's last product, residual, and the next block's norm. Reference: reference/expand_residual.py.

Without adapters one launch. With them two: a norm needs a whole row and E is best read by many programs, so the sum
(grid: tiles, blocks of columns) is stored once more and read again by the norm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tucka_runtime.kernels.fused.blocks import alignment, delta_block, find_target, load_tile, rank_block
from tucka_runtime.kernels.fused.expand import BLOCK_N
from tucka_runtime.kernels.fused.norm import add_norm, norm
from tucka_runtime.kernels.segments import DeltaSite, SitePlan


def expand_residual(
    y: Tensor,
    h: Tensor | None,
    site: DeltaSite | None,
    plan: SitePlan | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """residual += y + delta; returns (norm(residual), residual), all (T, d).

    RMSNorm with `weight`, or LayerNorm where there is a `bias`.
    """
    if h is None or site is None or plan is None:
        return add_norm(y, residual, weight, bias, eps)
    total = add(y, h, site, plan, residual, BLOCK_N)
    return norm(total, weight, bias, eps), total


def add(y: Tensor, h: Tensor, site: DeltaSite, plan: SitePlan, residual: Tensor, block_n: int) -> Tensor:
    """residual + y + delta (T, d), in blocks of `block_n` columns, each within one target."""
    total = torch.empty_like(residual)
    if any(c % block_n for c in site.columns[1:-1]):
        raise ValueError(f"the borders of the targets, {site.columns}, must be multiples of {block_n}")
    segments = plan.segments
    grid = (segments.tiles.shape[0], triton.cdiv(y.shape[1], block_n))
    if grid[0]:
        _add[grid](
            y,
            residual,
            total,
            h,
            site.e_ptr,
            site.rank,
            site.borders,
            segments.tiles,
            len(site.columns) - 1,
            plan.max_rank,
            y.shape[1],
            y.stride(0),
            residual.stride(0),
            total.stride(0),
            ALIGN=alignment(site.columns),
            BLOCK_R=rank_block(plan.max_rank),
            BLOCK_M=segments.tile_rows,
            BLOCK_N=block_n,
            num_warps=4,
        )
    return total


@triton.jit
def _add(
    y,
    residual,
    total,
    h,
    e_ptr,
    rank,
    borders,
    tiles,
    n,
    width_h,
    width,
    y_stride,
    residual_stride,
    total_stride,
    ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first, end, _, adapter = load_tile(tiles, tl.program_id(0))
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < end
    column = tl.program_id(1) * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    wanted = columns < width
    target = find_target(borders, column, n)
    acc = delta_block(
        h, e_ptr, rank, borders, rows, inside, adapter, target, columns, wanted, n, width_h, ALIGN, BLOCK_R
    )
    mask = inside[:, None] & wanted[None, :]
    row = rows[:, None].to(tl.int64)
    acc += tl.load(y + row * y_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    acc += tl.load(residual + row * residual_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(total + row * total_stride + columns[None, :], acc.to(total.dtype.element_ty), mask=mask)
