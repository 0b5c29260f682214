"""Shrink: x to each row's own adapter's rank, and through its core: h = (x Uᵀ) M."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.tables.segments import DeltaSite, SitePlan


def shrink_core(x: Tensor, site: DeltaSite, cores: Tensor | None, plan: SitePlan) -> LowRank:
    """ops.ShrinkCore. Here h is zero where the contract leaves it unwritten: `expand` multiplies with it."""
    x = x.to(site.u_all.dtype)
    if plan.gather is not None:
        h = _dense(x, site, cores, plan, plan.gather)
    elif len(site.ranks) == len(plan.segments.spans) == 1 and set(site.ranks[0]) == {plan.max_rank}:
        h = _alone(x, site, cores, plan)
    else:
        h = _by_segment(x, site, cores, plan)
    return LowRank(h, site, plan)


def _dense(x: Tensor, site: DeltaSite, cores: Tensor | None, plan: SitePlan, gather: Tensor) -> Tensor:
    """Every row with all adapters' rank rows at once, of which it takes its own."""
    n, rank = len(site.columns) - 1, plan.max_rank
    h = linear(x, site.u_all).gather(1, gather).view(-1, n, rank)
    if cores is None:
        return h
    size = min(cores.shape[-1], rank)
    own = cores[..., :size, :size].index_select(0, plan.segments.core)
    mixed = torch.matmul(h[..., None, :size], own).squeeze(2)
    return mixed if size == rank else torch.cat([mixed, h[..., size:]], dim=2)


def _alone(x: Tensor, site: DeltaSite, cores: Tensor | None, plan: SitePlan) -> Tensor:
    """One adapter: its targets' factors are all that u_all has. Its delta takes a tenth to a quarter less time where
    products are small (d 128, one to eight rows, all seven linears)."""
    n, rank = len(site.columns) - 1, plan.max_rank
    (first, end, _), core = plan.segments.spans[0], plan.segments.core_rows[0]
    own = linear(x[first:end], site.u_all[:-1]).view(-1, n, rank)
    if cores is not None and rank <= cores.shape[-1]:
        own = torch.bmm(own.transpose(0, 1), cores[core, :, :rank, :rank]).transpose(0, 1)
    return own if end - first == x.shape[0] else torch.cat([x.new_zeros(first, n, rank), own])


def _by_segment(x: Tensor, site: DeltaSite, cores: Tensor | None, plan: SitePlan) -> Tensor:
    h = x.new_zeros(x.shape[0], len(site.columns) - 1, plan.max_rank)
    for s, (first, end, a) in zip(plan.segments.core_rows, plan.segments.spans, strict=True):
        for j, u in enumerate(site.u[a]):
            if u is not None:
                r = u.shape[0]
                y = linear(x[first:end], u)
                if cores is not None and r <= cores.shape[-1]:
                    y = y @ cores[s, j, :r, :r]
                h[first:end, j, :r] = y
    return h
