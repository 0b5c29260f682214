"""What stands between the packed qkv product and attention, in one pass: delta, head norms, rotary, KV write.

Contract: ops.ExpandQkvRopeKv. Grid (tiles, heads): a program has one head of a tile of rows as its two
halves, so that rotary pairs lie in the same place of both. Values stay in fp32 from the product to the store. In a
graph a program does several tiles, one after the other (tiles.tile_programs).
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
from tucka_runtime.kernels.tables.segments import SMALL_TILE, power_of_2


def expand_qkv_rope_kv(
    qkv: Tensor,
    low_rank: LowRank | None,
    cos: Tensor | None,
    sin: Tensor | None,
    head_norms: tuple[Tensor, Tensor] | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """ops.ExpandQkvRopeKv."""
    num_rows, (kv_heads, d) = qkv.shape[0], k_cache.shape[1:]
    heads = qkv.shape[1] // d - 2 * kv_heads
    q = qkv.new_empty(num_rows, heads, d)
    if not num_rows:
        return q
    if cos is not None and d % 2:
        raise ValueError(f"rotary pairs need an even head size, not {d}")
    q_norm, k_norm = head_norms if head_norms is not None else (q, q)
    has_rope = cos is not None and sin is not None
    args: tuple[object, ...] = (q, q, q, q, q, 0, 0, 0)  # never read
    options = NO_DELTA
    programs = cdiv(num_rows, SMALL_TILE)
    if low_rank is not None:
        if any(c % d for c in low_rank.site.columns):
            raise ValueError(f"a head of {d} columns must lie within one target: {low_rank.site.columns}")
        args, options = delta_args(low_rank), delta_options(low_rank, d // 2 if d % 2 == 0 else 1)
        programs = tile_programs(low_rank.plan.segments, heads + 2 * kv_heads)
    _qkv[(programs, heads + 2 * kv_heads)](
        qkv,
        q,
        k_cache,
        v_cache,
        slot_mapping,
        *args,
        cos if has_rope else q,
        sin if has_rope else q,
        q_norm,
        k_norm,
        eps,
        num_rows,
        heads,
        kv_heads,
        qkv.stride(0),
        *k_cache.stride()[:2],
        *v_cache.stride()[:2],
        cos.stride(0) if cos is not None else 0,
        q_norm.stride(0) if q_norm.dim() > 1 else 0,
        D=d,
        HALF=(d + 1) // 2,
        BLOCK_H=max(16, power_of_2((d + 1) // 2)),
        HAS_DELTA=low_rank is not None,
        HAS_ROPE=has_rope,
        HAS_NORM=head_norms is not None,
        num_warps=4,  # unmeasured
        **options,
    )
    return q


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def _qkv(
    qkv,
    q,
    k_cache,
    v_cache,
    slots,
    h,
    e_ptr,
    rank,
    borders,
    tiles,
    num_tiles,
    n,
    width_h,
    cos,
    sin,
    q_norm,
    k_norm,
    eps,
    num_rows,
    heads,
    kv_heads,
    stride,
    k_slot,
    k_head,
    v_slot,
    v_head,
    angle_stride,
    norm_stride,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ALIGN: tl.constexpr,
    E_ALIGN: tl.constexpr,
    H_ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    head = tl.program_id(1)
    tile = tl.program_id(0)
    i = tl.arange(0, BLOCK_H)
    in_a, in_b = i < HALF, i < D - HALF
    column = head * D
    if HAS_DELTA:
        target = find_target(borders, column, n)
        first, end, _, adapter = load_tile(tiles, tile)
        while first < end:
            rows = first + tl.arange(0, BLOCK_M)
            inside = rows < end
            a, b = _load(qkv, rows, inside, column + i, in_a, in_b, stride, HALF)
            a += delta_block(
                h,
                e_ptr,
                rank,
                borders,
                rows,
                inside,
                adapter,
                target,
                column + i,
                in_a,
                n,
                width_h,
                ALIGN,
                E_ALIGN,
                H_ALIGN,
                BLOCK_R,
            )
            b += delta_block(
                h, e_ptr, rank, borders, rows, inside, adapter, target, column + HALF + i, in_b, n, width_h, ALIGN,
                E_ALIGN, H_ALIGN, BLOCK_R,
            )  # fmt: skip
            _finish(
                a, b, rows, inside, in_a, in_b, i, head, q, k_cache, v_cache, slots, cos, sin, q_norm, k_norm, eps,
                heads, kv_heads, k_slot, k_head, v_slot, v_head, angle_stride, norm_stride, D, HALF, HAS_ROPE, HAS_NORM,
            )  # fmt: skip
            tile, first, end, adapter = next_tile(tiles, tile, num_tiles, PADDED)
    else:
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < num_rows
        a, b = _load(qkv, rows, inside, column + i, in_a, in_b, stride, HALF)
        _finish(
            a, b, rows, inside, in_a, in_b, i, head, q, k_cache, v_cache, slots, cos, sin, q_norm, k_norm, eps,
            heads, kv_heads, k_slot, k_head, v_slot, v_head, angle_stride, norm_stride, D, HALF, HAS_ROPE, HAS_NORM,
        )  # fmt: skip


@triton.jit
def _load(qkv, rows, inside, columns, in_a, in_b, stride, HALF: tl.constexpr):
    at = qkv + rows[:, None].to(tl.int64) * stride + columns[None, :]
    a = tl.load(at, mask=inside[:, None] & in_a[None, :], other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=inside[:, None] & in_b[None, :], other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _finish(
    a,
    b,
    rows,
    inside,
    in_a,
    in_b,
    i,
    head,
    q,
    k_cache,
    v_cache,
    slots,
    cos,
    sin,
    q_norm,
    k_norm,
    eps,
    heads,
    kv_heads,
    k_slot,
    k_head,
    v_slot,
    v_head,
    angle_stride,
    norm_stride,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Head norm, rotary and the store of one head's halves."""
    row = rows[:, None].to(tl.int64)
    mask_a, mask_b = inside[:, None] & in_a[None, :], inside[:, None] & in_b[None, :]
    dtype = q.dtype.element_ty
    if head < heads + kv_heads:
        if HAS_NORM:
            scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
            weight = q_norm
            if head >= heads:
                weight = k_norm
            weight_at = weight + row * norm_stride + i[None, :]
            a *= scale * tl.load(weight_at, mask=mask_a, other=0.0).to(tl.float32)
            b *= scale * tl.load(weight_at + HALF, mask=mask_b, other=0.0).to(tl.float32)
        if HAS_ROPE:
            angle = row * angle_stride + i[None, :]
            c = tl.load(cos + angle, mask=mask_a, other=0.0).to(tl.float32)
            s = tl.load(sin + angle, mask=mask_a, other=0.0).to(tl.float32)
            a, b = a * c - b * s, b * c + a * s
    if head < heads:
        out = q + (row * heads + head) * D + i[None, :]
        tl.store(out, a.to(dtype), mask=mask_a)
        tl.store(out + HALF, b.to(dtype), mask=mask_b)
    else:
        slot = tl.load(slots + rows, mask=inside, other=-1)[:, None]
        real = slot >= 0
        if head < heads + kv_heads:
            out = k_cache + slot * k_slot + (head - heads) * k_head + i[None, :]
            tl.store(out, a.to(dtype), mask=mask_a & real)
            tl.store(out + HALF, b.to(dtype), mask=mask_b & real)
        else:
            out = v_cache + slot * v_slot + (head - heads - kv_heads) * v_head + i[None, :]
            tl.store(out, a.to(dtype), mask=mask_a & real)
            tl.store(out + HALF, b.to(dtype), mask=mask_b & real)
