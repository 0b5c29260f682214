"""Causal attention over KV blocks with grouped queries and an optional sliding window. Contract: ops.Attention.

All query heads of one KV head are one block's rows, so that keys and values are read once for them. Softmax in fp32,
online, in base 2.

Decode, grid (programs, KV heads): contexts are cut into splits of SPLIT keys, counted off on the device from the
lengths; a program takes splits p, p + P, …, so that the grid is fixed whatever the lengths are, and balanced. The last
split of a sequence to end merges all of them in order. Where splits lie depends on the sequence alone, so its output
does not depend on the batch. Prefill, grid (tiles, KV heads, blocks of a tile).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tucka_runtime.kernels.fused.launch import launch
from tucka_runtime.kernels.fused.tiles import arrive, cdiv, counters, dot
from tucka_runtime.kernels.tables.blocks import TILE, AttentionMetadata
from tucka_runtime.kernels.tables.segments import power_of_2

SPLIT = 512
"""Keys per split: at D 128 in bf16 256 KB to read, several times what a program's start costs; 64 contexts of 1k with 8
KV heads make 1024 splits, eight per SM. Unmeasured."""


def prompt_blocks(d: int, size: int) -> tuple[int, int]:
    """(rows times query heads, keys) per step of a prompt for heads of d elements of `size` bytes.

    128 are two warpgroups' wgmma. Larger heads take smaller blocks to stay within 227 KB of shared memory, and fp32,
    which no tensor core multiplies exactly, to stay within registers. Unmeasured.
    """
    if size == 4:
        return (32, 32) if d <= 64 else (16, 16)
    return (128, 64) if d <= 128 else (64, 32)


def decode_block(d: int, size: int) -> int:
    """Keys per step of a decode: 16 KB each of keys and values at D 128 in bf16. Unmeasured."""
    return 64 if d * size <= 256 else 32 if d * size <= 512 else 16


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata, scale: float, window: int | None = None
) -> Tensor:
    """ops.Attention."""
    out = torch.empty_like(q)
    d, size = q.shape[2], q.element_size()
    decode(q, k_cache, v_cache, out, metadata, scale, window, SPLIT, decode_block(d, size))
    prefill(q, k_cache, v_cache, out, metadata, scale, window, *prompt_blocks(d, size))
    return out


def _common(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None,
) -> tuple[tuple[object, ...], dict[str, int]]:
    heads, d = q.shape[1:]
    kv_heads = k_cache.shape[1]
    group = heads // kv_heads
    strides = (*q.stride()[:2], *k_cache.stride()[:2], *v_cache.stride()[:2], *out.stride()[:2])
    args = (
        q,
        k_cache,
        v_cache,
        out,
        metadata.query_start,
        metadata.seq_lens,
        metadata.block_table,
        metadata.first_block,
        *strides,
    )
    options: dict[str, int] = {
        "D": d,
        "BLOCK_D": max(16, power_of_2(d)),
        "GROUP": group,
        "BLOCK_G": power_of_2(group),
        "BLOCK_SIZE": metadata.block_size,
        "WINDOWED": window is not None,
    }
    return (*args, scale * math.log2(math.e), window or 0), options


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None,
    split: int,
    block_n: int,
    most: int | None = None,
) -> None:
    """The sequences of one row, `metadata.singles`, by at most so many programs (as are resident at once)."""
    count, (heads, d), kv_heads = metadata.singles.shape[0], q.shape[1:], k_cache.shape[1]
    if not count:
        return
    splits = cdiv(metadata.longest, split)
    args, options = _common(q, k_cache, v_cache, out, metadata, scale, window)
    options["BLOCK_G"] = max(16, power_of_2(heads // kv_heads))
    part = q.new_empty(count, splits, heads, d, dtype=torch.float32)
    # Both at multiples of 16 bytes, whatever the number of heads: else Triton compiles another kernel, under requests.
    part_best, part_total = q.new_empty(2, cdiv(count * splits * heads, 4) * 4, dtype=torch.float32)
    launch(
        _decode,
        lambda resident: (min(count * splits, max(1, (most or resident) // kv_heads)), kv_heads),
        *args,
        part,
        part_best,
        part_total,
        counters("attention", count * kv_heads, q.device),
        metadata.singles,
        count,
        splits,
        heads,
        kv_heads,
        **options,
        BLOCK_B=max(64, power_of_2(count)),
        BLOCK_N=block_n,
        SPLIT=split,
        num_warps=4,
        num_stages=5,  # block numbers and what they point to share them: keys and values are two deep, 72 KB
    )


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
) -> None:
    """The sequences of several rows, `metadata.tiles`."""
    if not metadata.tiles.shape[0]:
        return
    args, options = _common(q, k_cache, v_cache, out, metadata, scale, window)
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
    )


@triton.jit
def _scales(cache, head, head_step):
    """Where the scale of a head of an int8 cache's first slot lies: behind all heads."""
    return (cache + tl.num_programs(1) * head_step).to(tl.pointer_type(tl.float32)) + head


@triton.jit
def _attend(
    q,
    k_cache,
    v_cache,
    table,
    position,
    begin,
    stop,
    scale,
    window,
    k_slot,
    v_slot,
    k_scales,
    v_scales,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Softmax-weighted sums (BLOCK_M, BLOCK_D) of values at begin..stop, not yet divided; row maxima; row sums.

    q (BLOCK_M, BLOCK_D) at `position` (BLOCK_M,); caches at their head. A row that sees no key has maximum -inf, sum 0.
    """
    i = tl.arange(0, BLOCK_D)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n in range(begin, stop, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        real = j < stop
        slot = tl.load(table + j // BLOCK_SIZE, mask=real, other=0).to(tl.int64) * BLOCK_SIZE + j % BLOCK_SIZE
        mask = real[:, None] & (i < D)[None, :]
        k = tl.load(k_cache + slot[:, None] * k_slot + i[None, :], mask=mask, other=0.0)
        v = tl.load(v_cache + slot[:, None] * v_slot + i[None, :], mask=mask, other=0.0)
        if k_cache.dtype.element_ty == tl.int8:
            k_scale = tl.load(k_scales + slot * (k_slot // 4), mask=real, other=0.0)
            v_scale = tl.load(v_scales + slot * (v_slot // 4), mask=real, other=0.0)
            # Keys are exact in any type, and their scale is their score's. Values are rounded once: fp16 holds few
            # products of a weight and a scale.
            k = k.to(q.dtype)
            v = (v.to(tl.float32) * v_scale[:, None]).to(q.dtype)
        s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale
        if k_cache.dtype.element_ty == tl.int8:
            s *= k_scale[None, :]
        seen = real[None, :] & (j[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (position[:, None] - j[None, :] < window)
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(best, tl.max(s, 1))
        zero = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - zero[:, None])
        shrink = tl.exp2(best - zero)
        total = total * shrink + tl.sum(p, 1)
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
        best = new
    return acc, best, total


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
    acc, _, total = _attend(
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
        _scales(k_cache, head, k_head),
        _scales(v_cache, head, v_head),
        D,
        BLOCK_D,
        BLOCK_SIZE,
        WINDOWED,
        BLOCK_M,
        BLOCK_N,
    )
    y = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + rows * out_row + heads * out_head + i[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count", "max_splits"])
def _decode(
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
    part,
    part_best,
    part_total,
    counter,
    singles,
    count,
    max_splits,
    num_heads,
    kv_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    head = tl.program_id(1)
    b = tl.arange(0, BLOCK_B)
    all_lengths = tl.load(lengths + tl.load(singles + b, mask=b < count, other=0), mask=b < count, other=0)
    firsts = tl.zeros((BLOCK_B,), tl.int32)
    if WINDOWED:
        firsts = tl.maximum(all_lengths - window, 0)
    all_splits = (all_lengths - firsts + SPLIT - 1) // SPLIT
    border = tl.cumsum(all_splits, 0)
    member = tl.arange(0, BLOCK_G)
    i = tl.arange(0, BLOCK_D)
    mask = (member < GROUP)[:, None] & (i < D)[None, :]
    heads = head * GROUP + member
    for item in range(tl.program_id(0), tl.sum(all_splits, 0), tl.num_programs(0)):
        before = border <= item
        which = tl.sum(before.to(tl.int32), 0)
        split = item - tl.sum(tl.where(before, all_splits, 0), 0)
        seq = tl.load(singles + which)
        length = tl.load(lengths + seq)
        first = 0
        if WINDOWED:
            first = tl.maximum(length - window, 0)
        splits = (length - first + SPLIT - 1) // SPLIT
        begin = first + split * SPLIT
        row = tl.load(start + seq).to(tl.int64)
        x = tl.load(q + row * q_row + heads[:, None] * q_head + i[None, :], mask=mask, other=0.0)
        acc, best, total = _attend(
            x,
            k_cache + head * k_head,
            v_cache + head * v_head,
            blocks + tl.load(first_block + seq),
            tl.full((BLOCK_G,), 0, tl.int32) + length - 1,
            begin,
            tl.minimum(begin + SPLIT, length),
            scale,
            window,
            k_slot,
            v_slot,
            _scales(k_cache, head, k_head),
            _scales(v_cache, head, v_head),
            D,
            BLOCK_D,
            BLOCK_SIZE,
            WINDOWED,
            BLOCK_G,
            BLOCK_N,
        )
        out_at = out + row * out_row + heads[:, None] * out_head + i[None, :]
        if splits == 1:
            tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
        else:
            own = (which.to(tl.int64) * max_splits + split) * num_heads + heads
            tl.store(part + own[:, None] * D + i[None, :], acc, mask=mask)
            tl.store(part_best + own, best, mask=member < GROUP)
            tl.store(part_total + own, total, mask=member < GROUP)
            if arrive(counter + which * kv_heads + head, splits):
                best = tl.full((BLOCK_G,), float("-inf"), tl.float32)
                total = tl.zeros((BLOCK_G,), tl.float32)
                acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
                for other in range(0, splits):
                    at = (which.to(tl.int64) * max_splits + other) * num_heads + heads
                    theirs = tl.load(part_best + at, mask=member < GROUP, other=0.0, cache_modifier=".cg")
                    weight = tl.load(part_total + at, mask=member < GROUP, other=1.0, cache_modifier=".cg")
                    value = tl.load(part + at[:, None] * D + i[None, :], mask=mask, other=0.0, cache_modifier=".cg")
                    new = tl.maximum(best, theirs)
                    old_scale, their_scale = tl.exp2(best - new), tl.exp2(theirs - new)
                    total = total * old_scale + weight * their_scale
                    acc = acc * old_scale[:, None] + value * their_scale[:, None]
                    best = new
                tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
