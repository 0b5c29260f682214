"""Core: the routed (r, r) matrix between shrink and expand, for many segments at once. Reference: reference/core.py.

Grid (segments, modules, blocks of r²). The group is read on the device, so that only its slices of g are, once.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Entries of a core per program; r 16 takes one program a module, 224 in a Llama-3-8B. Unmeasured."""


def core(
    c: Tensor, g: Tensor, member: Tensor, groups: Tensor, weights: Tensor, modules: Tensor, rows: Tensor, out: Tensor
) -> None:
    """out[rows[s], modules[m], :r, :r] = Σ_j w_j G[a, m, groups[s], j] with w_j = Σ_i weights[s, i] C[a, m, i, j] and
    a = member[s].

    c (A, M, t, p), g (A, M, k, p, r, r) fp32, both normalised; member, groups, rows (S,) int64; weights (S, t) fp32;
    modules (M,) int64; out (·, N, R, R), R >= r.
    """
    m, k, p, r, _ = g.shape[1:]
    t = c.shape[2]
    if not m or not len(rows):
        return
    _core[(len(rows), m, triton.cdiv(r * r, BLOCK))](
        c.contiguous(),
        g.contiguous(),
        member,
        groups,
        weights.contiguous(),
        modules,
        rows,
        out,
        m,
        k,
        t,
        p,
        r,
        out.stride(0),
        out.stride(1),
        out.stride(2),
        BLOCK_T=triton.next_power_of_2(t),
        BLOCK=BLOCK,
        num_warps=4,
    )


@triton.jit
def _core(
    c, g, member, groups, weights, modules, rows, out, count, k, t, p, r, out_s, out_m, out_r,
    BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s, m = tl.program_id(0), tl.program_id(1)
    which = tl.load(member + s) * count + m
    mix_core(
        c + which * t * p,
        g + which * k * p * r * r,
        tl.load(groups + s),
        weights + s * t,
        out + tl.load(rows + s) * out_s + tl.load(modules + m) * out_m,
        tl.program_id(2) * BLOCK + tl.arange(0, BLOCK),
        t,
        p,
        r,
        out_r,
        BLOCK_T,
        BLOCK,
    )


@triton.jit
def mix_core(c, g, group, weights, out, entry, t, p, r, out_r, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    """Entries of one module's core: c (t, p), g (k, p, r, r), out (R, R) at their first elements."""
    expert = tl.arange(0, BLOCK_T)
    s = tl.load(weights + expert, mask=expert < t, other=0.0)
    real = entry < r * r
    slices = g + group * p * r * r
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in range(0, p):
        w = tl.sum(s * tl.load(c + expert * p + j, mask=expert < t, other=0.0), 0)
        acc += w * tl.load(slices + j * r * r + entry, mask=real, other=0.0)
    at = out + entry // r * out_r + entry % r
    tl.store(at, acc.to(out.dtype.element_ty), mask=real)
