"""Delta of the packed gate/up product, then SwiGLU, in one pass. Contract: ops.ExpandSwiglu.

Grid (tiles, blocks of columns): a program adds both deltas to its block of gate and of up, and writes their product.
In a graph it does so for several tiles, one after the other (tiles.tile_grid).
"""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from tucka_runtime.kernels.fused.launch import Grid, launch
from tucka_runtime.kernels.fused.tiles import (
    NO_DELTA,
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
from tucka_runtime.kernels.tables.segments import SMALL_TILE

BLOCK_N = 64
"""Columns of gate and of up per program, 4 KB of E per chunk; see expand.BLOCK_N."""


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
    args: tuple[object, ...] = (out, out, out, out, out, out, 0, 0, 0)  # never read
    options = NO_DELTA
    grid: Grid | Callable[[int], Grid] = (cdiv(num_rows, SMALL_TILE), blocks)
    if low_rank is not None:
        if not set(low_rank.site.columns) <= {0, f, 2 * f}:
            raise ValueError(f"gate and up must be the targets, or one target together: {low_rank.site.columns}")
        args, options = delta_args(low_rank), delta_options(low_rank, block_n)
        grid = tile_grid(low_rank.plan.segments, blocks)
    launch(
        _swiglu,
        grid,
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
    affine_ptr,
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
    FURTHER: tl.constexpr,
    AFFINE: tl.constexpr,
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
        begin_gate, width_gate = find_borders(borders, 0, ALIGN)
        begin_up, width_up = find_borders(borders, other, ALIGN)
        own_gate, own_up = columns - begin_gate, columns + (f - begin_up)
        first, end, _, adapter = load_tile(tiles, tile)
        r_gate, at_gate = load_rank(e_ptr, rank, adapter, 0, n)
        r_up, at_up = load_rank(e_ptr, rank, adapter, other, n)
        tile, first_next, end_next, adapter_next = next_tile(tiles, tile, num_tiles, PADDED)
        while first < end:
            # The tile is asked for two turns ahead, what lies at its adapter one: each is there when it is needed.
            tile, first_then, end_then, adapter_then = next_tile(tiles, tile, num_tiles, PADDED)
            r_gate_next, at_gate_next = load_rank(e_ptr, rank, adapter_next, 0, n)
            r_up_next, at_up_next = load_rank(e_ptr, rank, adapter_next, other, n)
            h_gate = load_h(h, first, end, adapter, 0, 0, n, width_h, H_ALIGN, BLOCK_M, BLOCK_R)
            h_up = load_h(h, first, end, adapter, other, 0, n, width_h, H_ALIGN, BLOCK_M, BLOCK_R)
            rows = first + tl.arange(0, BLOCK_M)
            inside = rows < end
            gate_y, up_y = _load(gate_up, rows, inside, columns, wanted, f, stride)
            e_gate = load_e(at_gate, h, r_gate, 0, own_gate, width_gate, wanted, E_ALIGN, BLOCK_R)
            e_up = load_e(at_up, h, r_up, 0, own_up, width_up, wanted, E_ALIGN, BLOCK_R)
            zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            gate = multiply(h_gate, e_gate, r_gate, 0, zeros)
            up = multiply(h_up, e_up, r_up, 0, zeros)
            if FURTHER:
                gate = add_further(
                    gate, h, at_gate, first, end, adapter, 0, r_gate, own_gate, width_gate, wanted, n, width_h, E_ALIGN,
                    H_ALIGN, BLOCK_M, BLOCK_R,
                )  # fmt: skip
                up = add_further(
                    up, h, at_up, first, end, adapter, other, r_up, own_up, width_up, wanted, n, width_h, E_ALIGN,
                    H_ALIGN, BLOCK_M, BLOCK_R,
                )  # fmt: skip
            if AFFINE:
                gate += scaled(gate_y.to(tl.float32), affine_ptr, adapter, 0, n, own_gate, width_gate, wanted)
                up += scaled(up_y.to(tl.float32), affine_ptr, adapter, other, n, own_up, width_up, wanted)
            else:
                gate += gate_y.to(tl.float32)
                up += up_y.to(tl.float32)
            _store(out, gate, up, rows, inside, columns, wanted, f)
            first, end, adapter = first_next, end_next, adapter_next
            r_gate, at_gate, r_up, at_up = r_gate_next, at_gate_next, r_up_next, at_up_next
            first_next, end_next, adapter_next = first_then, end_then, adapter_then
    else:
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < num_rows
        gate, up = _load(gate_up, rows, inside, columns, wanted, f, stride)
        _store(out, gate.to(tl.float32), up.to(tl.float32), rows, inside, columns, wanted, f)


@triton.jit
def _load(gate_up, rows, inside, columns, wanted, f, stride):
    mask = inside[:, None] & wanted[None, :]
    at = gate_up + rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + f, mask=mask, other=0.0)


@triton.jit
def _store(out, gate, up, rows, inside, columns, wanted, f):
    y = gate / (1.0 + tl.exp(-gate)) * up
    at = out + rows[:, None].to(tl.int64) * f + columns[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=inside[:, None] & wanted[None, :])
