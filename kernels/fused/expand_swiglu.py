"""Delta of the packed gate/up product, then SwiGLU, in one pass. Contract: ops.ExpandSwiglu.

Grid (tiles, blocks of columns): a program adds both deltas to its block of gate and of up, and writes their product.
In a graph it does so for several tiles, one after the other (tiles.tile_programs).
"""

import triton
import triton.language as tl
from torch import Tensor

from tucka_runtime.kernels.fused.tiles import (
    NO_DELTA,
    cdiv,
    delta_args,
    delta_block,
    delta_options,
    find_target,
    load_tile,
    next_tile,
    tile_programs,
)
from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.tables.segments import SMALL_TILE

BLOCK_N = 64
"""Columns of gate and of up per program, 4 KB of E per chunk; see expand.BLOCK_N. Unmeasured."""


def expand_swiglu(gate_up: Tensor, low_rank: LowRank | None) -> Tensor:
    """ops.ExpandSwiglu."""
    return run(gate_up, low_rank, BLOCK_N)


def run(gate_up: Tensor, low_rank: LowRank | None, block_n: int) -> Tensor:
    """`expand_swiglu` with blocks of `block_n` columns."""
    num_rows, f = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, f)
    if not num_rows:
        return out
    blocks = cdiv(f, block_n)
    args: tuple[object, ...] = (out, out, out, out, out, 0, 0, 0)  # never read
    options = NO_DELTA
    programs = cdiv(num_rows, SMALL_TILE)
    if low_rank is not None:
        if not set(low_rank.site.columns) <= {0, f, 2 * f}:
            raise ValueError(f"gate and up must be the targets, or one target together: {low_rank.site.columns}")
        args, options = delta_args(low_rank), delta_options(low_rank, block_n)
        programs = tile_programs(low_rank.plan.segments, blocks)
    _swiglu[(programs, blocks)](
        gate_up,
        out,
        *args,
        num_rows,
        f,
        gate_up.stride(0),
        HAS_DELTA=low_rank is not None,
        BLOCK_N=block_n,
        num_warps=4,
        **options,
    )
    return out


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def _swiglu(
    gate_up,
    out,
    h,
    e_ptr,
    rank,
    borders,
    tiles,
    num_tiles,
    n,
    width_h,
    num_rows,
    f,
    stride,
    ALIGN: tl.constexpr,
    E_ALIGN: tl.constexpr,
    H_ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = columns < f
    tile = tl.program_id(0)
    if HAS_DELTA:
        other = find_target(borders, f, n)
        first, end, _, adapter = load_tile(tiles, tile)
        while first < end:
            rows = first + tl.arange(0, BLOCK_M)
            inside = rows < end
            gate, up = _load(gate_up, rows, inside, columns, wanted, f, stride)
            gate += delta_block(
                h,
                e_ptr,
                rank,
                borders,
                rows,
                inside,
                adapter,
                0,
                columns,
                wanted,
                n,
                width_h,
                ALIGN,
                E_ALIGN,
                H_ALIGN,
                BLOCK_R,
            )
            up += delta_block(
                h,
                e_ptr,
                rank,
                borders,
                rows,
                inside,
                adapter,
                other,
                columns + f,
                wanted,
                n,
                width_h,
                ALIGN,
                E_ALIGN,
                H_ALIGN,
                BLOCK_R,
            )
            _store(out, gate, up, rows, inside, columns, wanted, f)
            tile, first, end, adapter = next_tile(tiles, tile, num_tiles, PADDED)
    else:
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < num_rows
        gate, up = _load(gate_up, rows, inside, columns, wanted, f, stride)
        _store(out, gate, up, rows, inside, columns, wanted, f)


@triton.jit
def _load(gate_up, rows, inside, columns, wanted, f, stride):
    mask = inside[:, None] & wanted[None, :]
    at = gate_up + rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32), tl.load(at + f, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(out, gate, up, rows, inside, columns, wanted, f):
    y = gate / (1.0 + tl.exp(-gate)) * up
    at = out + rows[:, None].to(tl.int64) * f + columns[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=inside[:, None] & wanted[None, :])
