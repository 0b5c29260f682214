"""Normalisation of the residual stream, and the sum before it. Contract: ops.Norm.

One program per row, which it holds whole in fp32: one read, one write, two-pass variance.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tucka_runtime.kernels.fused.launch import launch
from tucka_runtime.kernels.tables.segments import power_of_2


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., d) / rms(x) in fp32, cast back, times weight (d,)."""
    return norm(x, weight, None, eps)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """ops.Norm."""
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    _launch(flat, None, out, out, weight, bias, eps)
    return out.view(x.shape)


def add_norm(y: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """norm(residual + y) and residual + y, all (T, d)."""
    total, out = torch.empty_like(residual), torch.empty_like(residual)
    _launch(residual, y, total, out, weight, bias, eps)
    return out, total


def _launch(
    x: Tensor, y: Tensor | None, total: Tensor, out: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> None:
    d = x.shape[-1]
    block = power_of_2(d)
    if x.shape[0]:
        launch(
            _norm,
            (x.shape[0],),
            x,
            x if y is None else y,
            total,
            out,
            weight,
            weight if bias is None else bias,
            eps,
            x.stride(0),
            x.stride(0) if y is None else y.stride(0),
            D=d,
            BLOCK=block,
            ADD=y is not None,
            CENTRE=bias is not None,
            # A thread holds 8 to 16 elements: 16-byte loads, no spills. On an H100 2 and 16 warps are as fast.
            num_warps=max(1, min(16, block // 512)),
        )


@triton.jit
def _norm(
    x,
    y,
    total,
    out,
    weight,
    bias,
    eps,
    x_stride,
    y_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    CENTRE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    real = i < D
    dtype = out.dtype.element_ty
    v = tl.load(x + row * x_stride + i, mask=real, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(y + row * y_stride + i, mask=real, other=0.0).to(tl.float32)
        tl.store(total + row * D + i, v.to(dtype), mask=real)
        v = v.to(dtype).to(tl.float32)  # what the next reader of the residual will see
    w = tl.load(weight + i, mask=real, other=0.0).to(tl.float32)
    if CENTRE:
        v = tl.where(real, v - tl.sum(v, 0) / D, 0.0)
        v *= tl.rsqrt(tl.sum(v * v, 0) / D + eps)
        v = v * w + tl.load(bias + i, mask=real, other=0.0).to(tl.float32)
    else:
        v *= tl.rsqrt(tl.sum(v * v, 0) / D + eps)
        v *= w
    tl.store(out + row * D + i, v.to(dtype), mask=real)
