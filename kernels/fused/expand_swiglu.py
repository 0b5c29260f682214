"""Delta of the packed gate/up product, then SwiGLU, in one pass. Reference: reference/expand_swiglu.py.

Grid (tiles, blocks of columns): a program adds both deltas to its block of gate and of up, and writes their product.
In a graph it does so for several tiles, one after the other (blocks.tile_programs).
"""

import triton
import triton.language as tl
from torch import Tensor

from tucka_runtime.kernels.fused.blocks import (
    CHUNK,
    alignment,
    cdiv,
    delta_block,
    find_target,
    load_tile,
    next_tile,
    rank_block,
    tile_programs,
)
from tucka_runtime.kernels.tables.segments import SMALL_TILE, DeltaSite, SitePlan

BLOCK_N = 64
"""Columns of gate and of up per program, 4 KB of E per chunk; see expand.BLOCK_N. Unmeasured."""


def expand_swiglu(gate_up: Tensor, h: Tensor | None, site: DeltaSite | None, plan: SitePlan | None) -> Tensor:
    """gate_up (T, 2·F) -> silu(gate) · up (T, F)."""
    return run(gate_up, h, site, plan, BLOCK_N)


def run(gate_up: Tensor, h: Tensor | None, site: DeltaSite | None, plan: SitePlan | None, block_n: int) -> Tensor:
    """`expand_swiglu` with blocks of `block_n` columns."""
    num_rows, f = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, f)
    if not num_rows:
        return out
    if h is None or site is None or plan is None:
        _swiglu[(cdiv(num_rows, SMALL_TILE), cdiv(f, block_n))](
            gate_up,
            out,
            out,
            out,
            out,
            out,
            out,
            0,
            0,
            0,
            num_rows,
            f,
            gate_up.stride(0),
            ALIGN=1,
            BLOCK_R=CHUNK,
            HAS_DELTA=False,
            PADDED=False,
            BLOCK_M=SMALL_TILE,
            BLOCK_N=block_n,
            num_warps=4,
        )
        return out
    if not set(site.columns) <= {0, f, 2 * f}:
        raise ValueError(f"gate and up must be the targets, or one target together: {site.columns}")
    blocks = cdiv(f, block_n)
    _swiglu[(tile_programs(plan.segments, blocks), blocks)](
        gate_up,
        out,
        h,
        site.e_ptr,
        site.rank,
        site.borders,
        plan.segments.tiles,
        plan.segments.tiles.shape[0],
        len(site.columns) - 1,
        plan.max_rank,
        num_rows,
        f,
        gate_up.stride(0),
        ALIGN=alignment(site.columns),
        BLOCK_R=rank_block(plan.max_rank),
        HAS_DELTA=True,
        PADDED=plan.segments.padded,
        BLOCK_M=plan.segments.tile_rows,
        BLOCK_N=block_n,
        num_warps=4,
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
                h, e_ptr, rank, borders, rows, inside, adapter, 0, columns, wanted, n, width_h, ALIGN, BLOCK_R
            )
            up += delta_block(
                h, e_ptr, rank, borders, rows, inside, adapter, other, columns + f, wanted, n, width_h, ALIGN, BLOCK_R
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
