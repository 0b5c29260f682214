"""Core: the routed (r, r) matrix between shrink and expand, for all modules of many segments (docs/architecture.md)."""

import torch
from torch import Tensor

from tucka_runtime.kernels.tables.routes import RoutePlan


def core(plan: RoutePlan, out: Tensor) -> None:
    """ops.Core. M is linear in the p slices, so t experts cost p products. Segments of equally shaped adapters go
    together."""
    alike: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for s, adapter in enumerate(plan.adapters):
        alike.setdefault((adapter.c.shape, adapter.g.shape), []).append(s)
    groups = plan.groups.tolist()
    for (c_shape, (m, _, p, r, _)), members in alike.items():
        own = [plan.adapters[s] for s in members]
        at = torch.tensor([[s, plan.core_rows[s]] for s in members]).to(out.device)
        weights = plan.weights[:, : c_shape[1]].index_select(0, at[:, 0])
        w = torch.matmul(weights[:, None, None, :], torch.stack([a.c for a in own]))  # (S, M, 1, p)
        slices = torch.stack([a.g[:, groups[s]] for a, s in zip(own, members, strict=True)])
        cores = torch.bmm(w.view(-1, 1, p), slices.view(-1, p, r * r)).view(len(own), m, r, r)
        out[at[:, 1:], torch.stack([a.linears for a in own]), :r, :r] = cores.to(out.dtype)
