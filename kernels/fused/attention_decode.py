"""Attention of the sequences of one row: grid (programs, KV heads).

Contexts are cut into splits (`cut`), counted off on the device from the lengths; a program takes splits p, p + P, …, so
that the grid is fixed whatever the lengths are, and balanced. Splits are merged by a tree: the last of FAN neighbours
to end merges them, and the last of those merges what they made, each in order. Where splits lie depends on the sequence
and on how many sequences there is room for, so in one graph a sequence's output does not depend on the others.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tucka_runtime.kernels.fused.attend import attend, scales_of, shared_args
from tucka_runtime.kernels.fused.launch import launch
from tucka_runtime.kernels.fused.tiles import cdiv
from tucka_runtime.kernels.tables.blocks import AttentionMetadata
from tucka_runtime.kernels.tables.segments import power_of_2


class Cut(NamedTuple):
    """How contexts are cut: keys of a split, keys of a step in it, stages of its pipeline."""

    split: int
    step: int
    stages: int


def cut(count: int, kv_heads: int, d: int, size: int, int8: bool) -> Cut:
    """For `count` sequences, so many KV heads of d elements, queries of `size` bytes each, keys of as many or `int8`.

    Long splits read at a better rate, short ones make enough programs of few sequences and heads. On an H100, 8 KV
    heads of D 128 in bf16 and contexts of 1024, splits of 512 and 256 make a step of 64 sequences 3 and 7% longer than
    those of 1024, which make one of one or four sequences 4 to 5% longer than those of 256, all in steps of 128 keys
    and 4 stages. Steps of 64 and 5 stages are up to 1.3% longer or 0.7% shorter. Of fp32, and of int8, which is
    multiplied as something wider, steps are half as long: twice that would spill.
    """
    step = (64 if d * size <= 256 else 32 if d * size <= 512 else 16) << (size == 2 and not int8)
    programs = count * kv_heads
    return Cut(1024 if programs >= 256 else 512 if programs >= 64 else 256, step, 4)


FAN = 16
"""Splits that one program merges: 256 of them, a context of 128k, are merged by 16 programs at once, and theirs by one.
Unmeasured."""

AHEAD = tl.constexpr(8)
"""Parts that are read at once while they are merged: one by one, each would wait for the one before."""


_counters: dict[torch.device, list[Tensor]] = {}


def counters(size: int, device: torch.device) -> Tensor:
    """Zeros that `arrive` counts in and leaves at zero. One buffer for each device, so launches must not overlap each
    other on several streams. Outgrown buffers are kept: captured graphs hold their addresses."""
    kept = _counters.setdefault(device, [])
    if not kept or kept[-1].numel() < size:
        kept.append(torch.zeros(max(1024, power_of_2(size)), dtype=torch.int32, device=device))
    return kept[-1]


@triton.jit
def arrive(counter, expected):
    """Whether this program is the last of `expected` to come here; the counter is 0 again then.

    The barrier puts every thread's stores before the one thread's add, whose release and acquire order them before the
    last program's loads. Those must go past the L1 cache (".cg").
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter, 0)
    return last


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None,
    how: Cut,
    most: int | None = None,
) -> None:
    """The sequences of one row, `metadata.singles`, by as many programs as are resident at once, or by `most`: for
    tests, so that some have several splits."""
    count, (heads, d), kv_heads = metadata.singles.shape[0], q.shape[1:], k_cache.shape[1]
    if not count:
        return
    splits = cdiv(metadata.longest, how.split)
    args, options = shared_args(q, k_cache, v_cache, out, metadata, scale, window)
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
        counters(count * kv_heads * (cdiv(splits, FAN) + 1), q.device),
        metadata.singles,
        count,
        splits,
        heads,
        kv_heads,
        **options,
        BLOCK_B=max(64, power_of_2(count)),
        BLOCK_N=how.step,
        SPLIT=how.split,
        FAN=FAN,
        MERGED_G=power_of_2(heads // kv_heads),
        num_warps=4,
        num_stages=how.stages,  # block numbers and what they point to share them
    )


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
    FAN: tl.constexpr,
    MERGED_G: tl.constexpr,
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
        acc, best, total = attend(
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
            scales_of(k_cache, head, k_head),
            scales_of(v_cache, head, v_head),
            D,
            BLOCK_D,
            BLOCK_SIZE,
            WINDOWED,
            BLOCK_G,
            BLOCK_N,
        )
        if splits == 1:
            out_at = out + row * out_row + heads[:, None] * out_head + i[None, :]
            tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
        else:
            base = which.to(tl.int64) * max_splits
            own = (base + split) * num_heads + heads
            tl.store(part + own[:, None] * D + i[None, :], acc, mask=mask)
            tl.store(part_best + own, best, mask=member < GROUP)
            tl.store(part_total + own, total, mask=member < GROUP)
            fans = (splits + FAN - 1) // FAN
            fan = split // FAN
            arrivals = counter + (which * kv_heads + head) * ((max_splits + FAN - 1) // FAN + 1)
            if arrive(arrivals + 1 + fan, tl.minimum(FAN, splits - fan * FAN)):
                few = tl.arange(0, MERGED_G)
                few_heads, few_mask = head * GROUP + few, (few < GROUP)[:, None] & (i < D)[None, :]
                few_out = out + row * out_row + few_heads[:, None] * out_head + i[None, :]
                merged, merged_best, merged_total = _merge(
                    part, part_best, part_total, base + fan * FAN, base + tl.minimum(fan * FAN + FAN, splits), 1,
                    num_heads, few_heads, few < GROUP, D, BLOCK_D, MERGED_G,
                )  # fmt: skip
                if fans == 1:
                    tl.store(few_out, (merged / merged_total[:, None]).to(out.dtype.element_ty), mask=few_mask)
                else:
                    # In the place of the first of them: all are read.
                    first_part = (base + fan * FAN) * num_heads + few_heads
                    tl.store(part + first_part[:, None] * D + i[None, :], merged, mask=few_mask)
                    tl.store(part_best + first_part, merged_best, mask=few < GROUP)
                    tl.store(part_total + first_part, merged_total, mask=few < GROUP)
                    if arrive(arrivals, fans):
                        merged, merged_best, merged_total = _merge(
                            part, part_best, part_total, base, base + splits, FAN, num_heads, few_heads, few < GROUP, D,
                            BLOCK_D, MERGED_G,
                        )  # fmt: skip
                        tl.store(few_out, (merged / merged_total[:, None]).to(out.dtype.element_ty), mask=few_mask)


@triton.jit
def _merge(
    part, part_best, part_total, begin, end, step, num_heads, heads, real,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MERGED_G: tl.constexpr,
):  # fmt: skip
    """What attention makes of the keys of several parts, every `step`th from begin to end, in order: sums (MERGED_G,
    BLOCK_D) that are not yet divided, maxima and sums of weights (MERGED_G,)."""
    i = tl.arange(0, BLOCK_D)
    best = tl.full((MERGED_G,), float("-inf"), tl.float32)
    total = tl.zeros((MERGED_G,), tl.float32)
    acc = tl.zeros((MERGED_G, BLOCK_D), tl.float32)
    for first in tl.range(begin, end, step * AHEAD, num_stages=1):
        for k in tl.static_range(AHEAD):
            place = first + k * step
            there = tl.where(place < end, real, False)
            at = place * num_heads + heads
            theirs = tl.load(part_best + at, mask=there, other=float("-inf"), cache_modifier=".cg")
            weight = tl.load(part_total + at, mask=there, other=0.0, cache_modifier=".cg")
            mask = there[:, None] & (i < D)[None, :]
            value = tl.load(part + at[:, None] * D + i[None, :], mask=mask, other=0.0, cache_modifier=".cg")
            new = tl.maximum(best, theirs)
            zero = tl.where(new == float("-inf"), 0.0, new)
            old_scale, their_scale = tl.exp2(best - zero), tl.exp2(theirs - zero)
            total = total * old_scale + weight * their_scale
            acc = acc * old_scale[:, None] + value * their_scale[:, None]
            best = new
    return acc, best, total
