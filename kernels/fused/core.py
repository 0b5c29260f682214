"""Core: the routed (r, r) matrix between shrink and expand, for many segments at once. Contract: ops.Core.

Grid (segments, modules, blocks of r²). The group is read on the device, so that only its slices of g are, once. That
each shrink combined them itself instead was tried on an H100: steps were no shorter (12,638 us both with 32 adapters,
10,959 and 11,079 with 8).
"""

import triton
import triton.language as tl
from torch import Tensor

from tucka_runtime.kernels.fused.launch import launch
from tucka_runtime.kernels.fused.tiles import (
    COLUMNS,
    CORE,
    EXPERTS,
    GROUPS,
    LINEARS,
    MODULES,
    RANK,
    SLICES,
    C,
    G,
    cdiv,
)
from tucka_runtime.kernels.tables.routes import RoutePlan
from tucka_runtime.kernels.tables.segments import power_of_2

BLOCK = 1024
"""Entries of a core per program; r 16 takes one program a module, 224 in a Llama-3-8B: all cores of a step of 32
adapters take 14 us on an H100, 0.1% of it."""


def core(plan: RoutePlan, out: Tensor) -> None:
    """ops.Core, for segments of any shapes in one launch."""
    limits = plan.limits
    launch(
        _core,
        (plan.records.shape[0], limits.modules, cdiv(limits.rank**2, BLOCK)),
        plan.records,
        plan.groups,
        plan.weights,
        plan.weights.stride(0),
        out,
        out.stride(0),
        out.stride(1),
        out.stride(2),
        BLOCK_T=power_of_2(limits.t),
        BLOCK=BLOCK,
        num_warps=4,
    )


@triton.jit
def _core(
    records, groups, weights, weights_stride, out, out_row, out_slot, out_r,
    BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s, m = tl.program_id(0), tl.program_id(1).to(tl.int64)
    record = records + s * COLUMNS  # no modules: the record only fills up a graph's bucket
    k, t = tl.load(record + GROUPS), tl.load(record + EXPERTS)
    p, r = tl.load(record + SLICES), tl.load(record + RANK)
    first = tl.program_id(2) * BLOCK
    if (m >= tl.load(record + MODULES)) | (first >= r * r):
        return
    linear = tl.load(tl.load(record + LINEARS).to(tl.pointer_type(tl.int64)) + m)
    c = tl.load(record + C).to(tl.pointer_type(tl.float32)) + m * t * p
    g = tl.load(record + G).to(tl.pointer_type(tl.float32)) + (m * k + tl.load(groups + s)) * p * r * r
    at = out + tl.load(record + CORE) * out_row + linear * out_slot
    own = weights + s * weights_stride
    entry = first + tl.arange(0, BLOCK)
    if r % 4 == 0:
        mix_core(c, g, own, at, entry, t, p, r, out_r, 4, BLOCK_T, BLOCK)
    else:
        mix_core(c, g, own, at, entry, t, p, r, out_r, 1, BLOCK_T, BLOCK)


@triton.jit
def mix_core(
    c, g, weights, out, entry, t, p, r, out_r, ALIGN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr
):
    """Entries of one module's core, its rank a multiple of ALIGN: c (t, p), the group's g (p, r, r), out (R, R)."""
    r = r // ALIGN * ALIGN  # which says so to the compiler: a hint on an argument is lost when the call is inlined
    expert = tl.arange(0, BLOCK_T)
    s = tl.load(weights + expert, mask=expert < t, other=0.0)
    real = entry < r * r
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in range(0, p):
        w = tl.sum(s * tl.load(c + expert * p + j, mask=expert < t, other=0.0), 0)
        # Slices start at multiples of 16 bytes (RoutePlan.build); see tiles.load_e for where the hint stands.
        slices = tl.multiple_of(g + j * r * r + entry, 4 * ALIGN)
        acc += w * tl.load(slices, mask=real, other=0.0)
    at = out + entry // r * out_r + entry % r
    tl.store(at, acc.to(out.dtype.element_ty), mask=real)
