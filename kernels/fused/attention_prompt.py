"""Attention of the sequences of several rows: grid (tiles, KV heads, blocks of a tile)."""

import triton
import triton.language as tl
from torch import Tensor

from tucka_runtime.kernels.fused.attend import attend, scales_of, shared_args
from tucka_runtime.kernels.fused.launch import launch
from tucka_runtime.kernels.tables.blocks import TILE, AttentionMetadata
from tucka_runtime.kernels.tables.segments import power_of_2


def prompt_blocks(d: int, size: int) -> tuple[int, int]:
    """(rows times query heads, keys) per step of a prompt for heads of d elements of `size` bytes.

    128 are two warpgroups' wgmma. Larger heads take smaller blocks to stay within 227 KB of shared memory, and fp32,
    which no tensor core multiplies exactly, to stay within registers. Unmeasured.
    """
    if size == 4:
        return (32, 32) if d <= 64 else (16, 16)
    return (128, 64) if d <= 128 else (64, 32)


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None,
    block_m: int,
    block_n: int,
    most_registers: int | None = None,
) -> None:
    """The sequences of several rows, `metadata.tiles`. A tile of a sequence of no rows fills up a graph's table. With
    128 registers a thread at most, two programs are resident on an SM."""
    if not metadata.tiles.shape[0]:
        return
    args, options = shared_args(q, k_cache, v_cache, out, metadata, scale, window)
    group = power_of_2(q.shape[1] // k_cache.shape[1])
    block_m = max(block_m, group)
    rows = min(TILE, block_m // group)
    launch(
        _prefill,
        (metadata.tiles.shape[0], k_cache.shape[1], TILE // rows),
        *args,
        metadata.tiles,
        **options,
        ROWS=rows,
        BLOCK_M=rows * group,
        BLOCK_N=block_n,
        TILE=TILE,
        num_warps=8 if rows * group >= 128 else 4,
        num_stages=2,
        maxnreg=most_registers,
    )


@triton.jit
def _prefill(
    q,
    k_cache,
    v_cache,
    out,
    start,
    lengths,
    blocks,
    first_block,
    q_row,
    q_head,
    k_slot,
    k_head,
    v_slot,
    v_head,
    out_row,
    out_head,
    scale,
    window,
    tiles,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    seq = tl.load(tiles + tl.program_id(0) * 2)
    first = tl.load(tiles + tl.program_id(0) * 2 + 1) + tl.program_id(2) * ROWS
    head = tl.program_id(1)
    row = tl.load(start + seq)
    count = tl.load(start + seq + 1) - row
    if first >= count:
        return
    length = tl.load(lengths + seq)
    m = tl.arange(0, BLOCK_M)
    own, member = first + m // BLOCK_G, m % BLOCK_G
    i = tl.arange(0, BLOCK_D)
    mask = ((own < count) & (member < GROUP))[:, None] & (i < D)[None, :]
    heads = (head * GROUP + member)[:, None]
    rows = (row + own)[:, None].to(tl.int64)
    x = tl.load(q + rows * q_row + heads * q_head + i[None, :], mask=mask, other=0.0)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(length - count + first - window + 1, 0)
    acc, _, total = attend(
        x,
        k_cache + head * k_head,
        v_cache + head * v_head,
        blocks + tl.load(first_block + seq),
        length - count + own,
        begin,
        tl.minimum(length, length - count + first + ROWS),
        scale,
        window,
        k_slot,
        v_slot,
        scales_of(k_cache, head, k_head),
        scales_of(v_cache, head, v_head),
        D,
        BLOCK_D,
        BLOCK_SIZE,
        WINDOWED,
        BLOCK_M,
        BLOCK_N,
    )
    y = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + rows * out_row + heads * out_head + i[None, :], y.to(out.dtype.element_ty), mask=mask)
