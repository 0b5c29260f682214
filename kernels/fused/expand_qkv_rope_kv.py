"""What stands between the packed qkv product and attention, in one pass: delta, head norms, rotary, KV write.

Contract: ops.ExpandQkvRopeKv. Grid (tiles, heads): a program has one head of a tile of rows as its two
halves, so that rotary pairs lie in the same place of both. Values stay in fp32 from the product to the store. In a
graph a program does several tiles, one after the other (tiles.tile_grid).
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
    args: tuple[object, ...] = (q, q, q, q, q, q, 0, 0, 0)  # never read
    options = NO_DELTA
    grid: Grid | Callable[[int], Grid] = (cdiv(num_rows, SMALL_TILE), heads + 2 * kv_heads)
    if low_rank is not None:
        if any(c % d for c in low_rank.site.columns):
            raise ValueError(f"a head of {d} columns must lie within one target: {low_rank.site.columns}")
        args, options = delta_args(low_rank), delta_options(low_rank, d // 2 if d % 2 == 0 else 1)
        grid = tile_grid(low_rank.plan.segments, heads + 2 * kv_heads)
    launch(
        _qkv,
        grid,
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
        num_warps=4,
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
    affine_ptr,
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
    FURTHER: tl.constexpr,
    AFFINE: tl.constexpr,
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
        begin, width = find_borders(borders, target, ALIGN)
        own_a, own_b = column - begin + i, column - begin + HALF + i
        first, end, _, adapter = load_tile(tiles, tile)
        r, address = load_rank(e_ptr, rank, adapter, target, n)
        tile, first_next, end_next, adapter_next = next_tile(tiles, tile, num_tiles, PADDED)
        while first < end:
            # The tile is asked for two turns ahead, what lies at its adapter one: each is there when it is needed.
            tile, first_then, end_then, adapter_then = next_tile(tiles, tile, num_tiles, PADDED)
            r_next, address_next = load_rank(e_ptr, rank, adapter_next, target, n)
            if HAS_NORM:  # which takes registers, so that with what is read ahead fewer programs would be resident
                r, address = load_rank(e_ptr, rank, adapter, target, n)
            own_h = load_h(h, first, end, adapter, target, 0, n, width_h, H_ALIGN, BLOCK_M, BLOCK_R)
            rows = first + tl.arange(0, BLOCK_M)
            inside = rows < end
            y_a, y_b = _load(qkv, rows, inside, column + i, in_a, in_b, stride, HALF)
            c, s, slot = _beside(cos, sin, slots, rows, inside, in_a, i, head, heads, kv_heads, angle_stride, HAS_ROPE)
            e_a = load_e(address, h, r, 0, own_a, width, in_a, E_ALIGN, BLOCK_R)
            e_b = load_e(address, h, r, 0, own_b, width, in_b, E_ALIGN, BLOCK_R)
            zeros = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
            a = multiply(own_h, e_a, r, 0, zeros)
            b = multiply(own_h, e_b, r, 0, zeros)
            if FURTHER:
                a = add_further(
                    a, h, address, first, end, adapter, target, r, own_a, width, in_a, n, width_h, E_ALIGN, H_ALIGN,
                    BLOCK_M, BLOCK_R,
                )  # fmt: skip
                b = add_further(
                    b, h, address, first, end, adapter, target, r, own_b, width, in_b, n, width_h, E_ALIGN, H_ALIGN,
                    BLOCK_M, BLOCK_R,
                )  # fmt: skip
            if AFFINE:
                a += scaled(y_a.to(tl.float32), affine_ptr, adapter, target, n, own_a, width, in_a)
                b += scaled(y_b.to(tl.float32), affine_ptr, adapter, target, n, own_b, width, in_b)
            else:
                a += y_a.to(tl.float32)
                b += y_b.to(tl.float32)
            _finish(
                a, b, c, s, slot, rows, inside, in_a, in_b, i, head, q,
                k_cache, v_cache, q_norm, k_norm, eps, heads, kv_heads, k_slot, k_head, v_slot, v_head, norm_stride, D,
                HALF, HAS_ROPE, HAS_NORM,
            )  # fmt: skip
            first, end, adapter, r, address = first_next, end_next, adapter_next, r_next, address_next
            first_next, end_next, adapter_next = first_then, end_then, adapter_then
    else:
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < num_rows
        a, b = _load(qkv, rows, inside, column + i, in_a, in_b, stride, HALF)
        c, s, slot = _beside(cos, sin, slots, rows, inside, in_a, i, head, heads, kv_heads, angle_stride, HAS_ROPE)
        _finish(
            a.to(tl.float32), b.to(tl.float32), c, s, slot, rows, inside, in_a, in_b, i, head, q, k_cache, v_cache,
            q_norm, k_norm, eps, heads, kv_heads, k_slot, k_head, v_slot, v_head, norm_stride, D, HALF, HAS_ROPE,
            HAS_NORM,
        )  # fmt: skip


@triton.jit
def _beside(
    cos, sin, slots, rows, inside, in_a, i, head, heads, kv_heads, angle_stride, HAS_ROPE: tl.constexpr
):  # fmt: skip
    """The angles of a head's rows, and their slots where it is one of keys or values."""
    if HAS_ROPE:
        angle = rows[:, None].to(tl.int64) * angle_stride + i[None, :]
        mask = tl.where(head < heads + kv_heads, inside, False)[:, None] & in_a[None, :]
        c = tl.load(cos + angle, mask=mask, other=0.0)
        s = tl.load(sin + angle, mask=mask, other=0.0)
    else:
        c, s = 0.0, 0.0
    return c, s, tl.load(slots + rows, mask=tl.where(head >= heads, inside, False), other=-1)[:, None]


@triton.jit
def _load(qkv, rows, inside, columns, in_a, in_b, stride, HALF: tl.constexpr):
    at = qkv + rows[:, None].to(tl.int64) * stride + columns[None, :]
    a = tl.load(at, mask=inside[:, None] & in_a[None, :], other=0.0)
    b = tl.load(at + HALF, mask=inside[:, None] & in_b[None, :], other=0.0)
    return a, b


@triton.jit
def _finish(
    a, b, c, s, slot, rows, inside, in_a, in_b, i, head, q, k_cache, v_cache, q_norm, k_norm, eps, heads, kv_heads,
    k_slot, k_head, v_slot, v_head, norm_stride,
    D: tl.constexpr, HALF: tl.constexpr, HAS_ROPE: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Head norm, rotary and the store of one head's halves."""
    row = rows[:, None].to(tl.int64)
    mask_a, mask_b = inside[:, None] & in_a[None, :], inside[:, None] & in_b[None, :]
    dtype = q.dtype.element_ty
    if HAS_NORM:  # noqa: SIM102 (the first is decided when this is compiled)
        if head < heads + kv_heads:
            scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
            weight = q_norm
            if head >= heads:
                weight = k_norm
            weight_at = weight + row * norm_stride + i[None, :]
            a *= scale * tl.load(weight_at, mask=mask_a, other=0.0).to(tl.float32)
            b *= scale * tl.load(weight_at + HALF, mask=mask_b, other=0.0).to(tl.float32)
    if HAS_ROPE:  # not within the branch: into that the compiler would move the reading of the angles
        turned_a = a * c.to(tl.float32) - b * s.to(tl.float32)
        turned_b = b * c.to(tl.float32) + a * s.to(tl.float32)
        a = tl.where(head < heads + kv_heads, turned_a, a)
        b = tl.where(head < heads + kv_heads, turned_b, b)
    if head < heads:
        out = q + (row * heads + head) * D + i[None, :]
        tl.store(out, a.to(dtype), mask=mask_a)
        tl.store(out + HALF, b.to(dtype), mask=mask_b)
    else:
        own_head = head - heads
        place = k_cache + slot * k_slot
        if head >= heads + kv_heads:
            own_head = head - heads - kv_heads
            place = v_cache + slot * v_slot
        if k_cache.dtype.element_ty == tl.int8:
            a, b, scale = _quantize(a, b, mask_a, mask_b)
            scale_at = (place + kv_heads * D).to(tl.pointer_type(tl.float32)) + own_head
            tl.store(scale_at, scale[:, None], mask=inside[:, None] & (slot >= 0))
        place += own_head * k_head + i[None, :]
        to = k_cache.dtype.element_ty
        tl.store(place, a.to(to), mask=mask_a & (slot >= 0))
        tl.store(place + HALF, b.to(to), mask=mask_b & (slot >= 0))


@triton.jit
def _quantize(a, b, mask_a, mask_b):
    """The halves of heads as whole numbers up to 127, and their scales (BLOCK_M,), as kernels/reference/int8.py makes
    them. A maximum leaves NaNs out: they count as infinite, so that the scale tells of them."""
    size_a = tl.where(mask_a, tl.where(a != a, float("inf"), tl.abs(a)), 0.0)
    size_b = tl.where(mask_b, tl.where(b != b, float("inf"), tl.abs(b)), 0.0)
    size = tl.maximum(tl.maximum(tl.max(size_a, 1), tl.max(size_b, 1)), 1e-30)
    finite = (size < float("inf"))[:, None]
    steps = (127.0 / size)[:, None]
    a = tl.where(finite, tl.floor(tl.where(finite, a, 0.0) * steps + 0.5), 1.0)
    b = tl.where(finite, tl.floor(tl.where(finite, b, 0.0) * steps + 0.5), 1.0)
    return a, b, size / 127.0
