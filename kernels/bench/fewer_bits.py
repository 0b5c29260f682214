"""What factors in fewer bits would cost: the error of a delta, which the contract holds to TOLERANCE.

Normal numbers, which round better than those of a trained adapter do, and no other rounding beside.
"""

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 5e-3
"""In bf16: kernels/README.md, Tolerances."""

ROWS, D, RANK, GROUP = 64, 4096, 16, 16


def by_scale(x: Tensor, most: float, group: int, round: Callable[[Tensor], Tensor]) -> Tensor:
    """x, rounded by `round` within ±`most` of a scale for each `group` neighbours in a row, kept in fp16."""
    parts = x.view(x.shape[0], -1, group)
    scale = (parts.abs().amax(-1, keepdim=True) / most).half().to(x.dtype)
    return (round(parts / scale).clamp(-most, most) * scale).view_as(x)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "e4m3, a scale for each rank": lambda x: by_scale(x, 448, D, lambda v: v.to(torch.float8_e4m3fn).to(x.dtype)),
    "int8, a scale for each rank": lambda x: by_scale(x, 127, D, torch.round),
    "12 bits, a scale for each rank": lambda x: by_scale(x, 2047, D, torch.round),
    f"int8, a scale for each {GROUP} numbers": lambda x: by_scale(x, 127, GROUP, torch.round),
}


def errors() -> dict[str, float]:
    """The relative L2 error of x Uᵀ E by each format, against float64."""
    made = torch.Generator().manual_seed(0)
    x, u, e = (torch.randn(n, D, generator=made, dtype=torch.float64) for n in (ROWS, RANK, RANK))
    want = x @ u.T @ e
    return {name: float((x @ f(u).T @ f(e) - want).norm() / want.norm()) for name, f in FORMATS.items()}


def table() -> str:
    """One line."""
    found = "; ".join(f"{name} {error:.2%}" for name, error in errors().items())
    return f"error of a delta with factors in fewer bits, of {TOLERANCE:.1%} that are allowed: {found}"
