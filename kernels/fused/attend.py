"""What both ways of attention share: the softmax-weighted sum of values over a range of a context.

All query heads of one KV head are one block's rows, so that keys and values are read once for them. Softmax in fp32,
online, in base 2.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from tucka_runtime.kernels.fused.tiles import dot
from tucka_runtime.kernels.tables.blocks import AttentionMetadata
from tucka_runtime.kernels.tables.segments import power_of_2


def shared_args(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None,
) -> tuple[tuple[object, ...], dict[str, int]]:
    """The arguments and constants with which both kernels begin."""
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


@triton.jit
def scales_of(cache, head, head_step):
    """Where the scale of a head of an int8 cache's first slot lies: behind all heads."""
    return (cache + tl.num_programs(1) * head_step).to(tl.pointer_type(tl.float32)) + head


@triton.jit
def attend(
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
