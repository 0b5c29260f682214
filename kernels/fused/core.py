"""Core: the routed (r, r) matrix between shrink and expand, for an adapter's modules. Reference: reference/core.py.

Grid (modules, blocks of r²). The group is read on the device, so that only its slices of g are; they are read once.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Entries of a core per program; r 16 takes one program a module, 224 in a Llama-3-8B. Unmeasured."""


def core(c: Tensor, g: Tensor, group: Tensor, weights: Tensor, modules: Tensor, out: Tensor) -> None:
    """out[modules[m], :r, :r] = Σ_j w_j G[m, group, j] with w_j = Σ_i weights_i C[m, i, j].

    c (M, t, p), g (M, k, p, r, r) fp32, both normalised; group () int64, weights (t,) fp32; modules (M,) int64 rows of
    out (N, R, R), R >= r.
    """
    m, k, p, r, _ = g.shape
    t = c.shape[1]
    if not m:
        return
    _core[(m, triton.cdiv(r * r, BLOCK))](
        c.contiguous(),
        g.contiguous(),
        group,
        weights.contiguous(),
        modules,
        out,
        k,
        t,
        p,
        r,
        out.stride(0),
        out.stride(1),
        BLOCK_T=triton.next_power_of_2(t),
        BLOCK=BLOCK,
        num_warps=4,
    )


@triton.jit
def _core(c, g, group, weights, modules, out, k, t, p, r, out_m, out_r, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    m = tl.program_id(0)
    mix_core(
        c + m.to(tl.int64) * t * p,
        g + m.to(tl.int64) * k * p * r * r,
        tl.load(group),
        weights,
        out + tl.load(modules + m) * out_m,
        tl.program_id(1) * BLOCK + tl.arange(0, BLOCK),
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
