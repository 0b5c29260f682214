"""Shrink: x to each row's own adapter's rank, and through its core: h = (x Uᵀ) M."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from tucka_runtime.kernels.tables.segments import DeltaSite, SitePlan


def shrink_core(x: Tensor, site: DeltaSite, cores: Tensor | None, plan: SitePlan) -> Tensor:
    """x (T, d_in) -> h (T, n, R) in the factors' type, zero beyond a row's own ranks and on base rows.

    cores (C, n, Rc, Rc), where a segment takes its own by Segments.core_rows, the identity if its core is constant;
    None: all are. R is the largest rank.
    An (r, r) core with r < Rc is the upper left block of its (Rc, Rc); the blocks beside it are zero. A rank over Rc
    has no core (it is a LoRA's).
    """
    n, rank = len(site.columns) - 1, plan.max_rank
    x = x.to(site.u_all.dtype)
    if plan.gather is not None:
        h = linear(x, site.u_all).gather(1, plan.gather).view(-1, n, rank)
        if cores is not None:
            size = min(cores.shape[-1], rank)
            own = cores[..., :size, :size].index_select(0, plan.segments.core)
            mixed = torch.matmul(h[..., None, :size], own).squeeze(2)
            h = mixed if size == rank else torch.cat([mixed, h[..., size:]], dim=2)
        return h
    if len(site.ranks) == len(plan.segments.spans) == 1 and set(site.ranks[0]) == {rank}:
        # One adapter: its targets' factors are all that u_all has. Its delta takes a tenth to a quarter less time where
        # products are small (d 128, one to eight rows, all seven linears).
        (first, end, _), core = plan.segments.spans[0], plan.segments.core_rows[0]
        own = linear(x[first:end], site.u_all[:-1]).view(-1, n, rank)
        if cores is not None and rank <= cores.shape[-1]:
            own = torch.bmm(own.transpose(0, 1), cores[core, :, :rank, :rank]).transpose(0, 1)
        return own if end - first == x.shape[0] else torch.cat([x.new_zeros(first, n, rank), own])
    h = x.new_zeros(x.shape[0], n, rank)
    for s, (first, end, a) in zip(plan.segments.core_rows, plan.segments.spans, strict=True):
        for j, u in enumerate(site.u[a]):
            if u is not None:
                r = u.shape[0]
                y = linear(x[first:end], u)
                if cores is not None and r <= cores.shape[-1]:
                    y = y @ cores[s, j, :r, :r]
                h[first:end, j, :r] = y
    return h
