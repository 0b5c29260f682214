"""Expand: the delta back to the output, y_j += h_j E_j for every target j of a site. Contract: ops.Expand.

Grid (tiles, blocks of columns, targets); programs of base tiles end at once. `expand_residual.add` is the same product
with a residual.
"""

from itertools import pairwise

import triton
import triton.language as tl
from torch import Tensor

from tucka_runtime.kernels.fused.launch import launch
from tucka_runtime.kernels.fused.tiles import (
    add_further,
    cdiv,
    delta_args,
    delta_options,
    find_borders,
    load_e,
    load_h,
    load_rank,
    load_tile,
    multiply,
    scaled,
)
from tucka_runtime.kernels.ops import LowRank

BLOCK_N = 64
"""Columns per program: 2 KB of E per chunk and 64 programs for d 4096, so that few tiles fill the SMs too. On an
H100 sums and SwiGLUs of 32, 64 and 128 columns, or of 1 to 8 warps, make steps that differ by 1% at most. 128 is not
shipped: on sm_90 a peer's expand of that width computes NaN (a code generation fault)."""


def expand(y: Tensor, low_rank: LowRank) -> Tensor:
    """ops.Expand."""
    return run(y, low_rank, BLOCK_N)


def run(y: Tensor, low_rank: LowRank, block_n: int) -> Tensor:
    """`expand` with blocks of `block_n` columns."""
    columns = low_rank.site.columns
    widest = max(b - a for a, b in pairwise(columns))
    grid = (low_rank.plan.segments.tiles.shape[0], cdiv(widest, block_n), len(columns) - 1)
    if grid[0]:
        launch(
            _expand,
            grid,
            y,
            *delta_args(low_rank),
            y.stride(0),
            BLOCK_N=block_n,
            num_warps=4,
            **delta_options(low_rank, block_n),
        )
    return y


@triton.jit(do_not_specialize=["num_tiles"])
def _expand(
    y,
    h,
    e_ptr,
    affine_ptr,
    rank,
    borders,
    tiles,
    num_tiles,
    n,
    width_h,
    y_stride,
    ALIGN: tl.constexpr,
    E_ALIGN: tl.constexpr,
    H_ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    FURTHER: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first, end, _, adapter = load_tile(tiles, tl.program_id(0))
    target = tl.program_id(2)
    begin, width = find_borders(borders, target, ALIGN)
    own = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if (adapter < 0) | (first >= end) | (tl.program_id(1) * BLOCK_N >= width):
        return
    r, address = load_rank(e_ptr, rank, adapter, target, n)
    if r == 0:
        return
    a = load_h(h, first, end, adapter, target, 0, n, width_h, H_ALIGN, BLOCK_M, BLOCK_R)
    rows = first + tl.arange(0, BLOCK_M)
    at = y + rows[:, None].to(tl.int64) * y_stride + begin + own[None, :]
    wanted = own < width
    mask = (rows < end)[:, None] & wanted[None, :]
    acc = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if AFFINE:
        acc = scaled(acc, affine_ptr, adapter, target, n, own, width, wanted)
    b = load_e(address, h, r, 0, own, width, wanted, E_ALIGN, BLOCK_R)
    acc += multiply(a, b, r, 0, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    if FURTHER:
        acc = add_further(
            acc, h, address, first, end, adapter, target, r, own, width, wanted, n, width_h, E_ALIGN, H_ALIGN, BLOCK_M,
            BLOCK_R,
        )  # fmt: skip
    tl.store(at, acc.to(y.dtype.element_ty), mask=mask)
