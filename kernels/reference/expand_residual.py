"""Delta of a block's last product, residual, and the next block's norm."""

from torch import Tensor

from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.reference.expand import expand
from tucka_runtime.kernels.reference.norm import norm


def expand_residual(
    y: Tensor,
    low_rank: LowRank | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """ops.ExpandResidual."""
    if low_rank is not None:
        expand(y, low_rank)
    residual = residual + y
    return norm(residual, weight, bias, eps), residual
