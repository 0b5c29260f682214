"""Expand: the delta back to the output, y_j = s_j y_j + o_j + h_j E_j for every target j of a site."""

from torch import Tensor

from tucka_runtime.kernels.ops import LowRank


def expand(y: Tensor, low_rank: LowRank) -> Tensor:
    """ops.Expand. h is of the factors' type."""
    h, site, plan = low_rank.h, low_rank.site, low_rank.plan
    if site.affine:
        _scale(y, low_rank)
    if plan.gather is not None:
        wide = h.new_zeros(h.shape[0], plan.stops[-1] + 1).scatter_(1, plan.gather, h.flatten(1))
        for j, e in enumerate(site.e_all):
            if e is not None:
                part = y[:, site.columns[j] : site.columns[j + 1]]
                _add_product(part, wide[:, plan.stops[j] : plan.stops[j + 1]], e)
        return y
    for first, end, a in plan.segments.spans:
        for j, e in enumerate(site.e[a]):
            if e is not None:
                part = y[first:end, site.columns[j] : site.columns[j + 1]]
                _add_product(part, h[first:end, j, : e.shape[0]], e)
    return y


def _scale(y: Tensor, low_rank: LowRank) -> None:
    """What some adapters change of the base's own product."""
    site = low_rank.site
    for first, end, a in low_rank.plan.segments.spans:
        for j, own in enumerate(site.affine[a]):
            if own is not None:
                part = y[first:end, site.columns[j] : site.columns[j + 1]]
                part.copy_(part * own[0] + own[1])


def _add_product(y: Tensor, h: Tensor, e: Tensor) -> None:
    """y += h e, summed up in the factors' type and rounded to y's once."""
    if y.dtype == e.dtype:
        y.addmm_(h, e)
    else:
        y.add_(h @ e)
