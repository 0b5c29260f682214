"""Delta of a block's last product, residual, and the next block's norm."""

from torch import Tensor

from tucka_runtime.kernels.reference.expand import expand
from tucka_runtime.kernels.reference.norm import norm
from tucka_runtime.kernels.tables.segments import DeltaSite, SitePlan


def expand_residual(
    y: Tensor,
    h: Tensor | None,
    site: DeltaSite | None,
    plan: SitePlan | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """residual += y + delta; returns (norm(residual), residual), all (T, d). y is used up.

    RMSNorm with `weight`, or LayerNorm where there is a `bias`.
    """
    if h is not None and site is not None and plan is not None:
        expand(y, h, site, plan)
    residual = residual + y
    return norm(residual, weight, bias, eps), residual
