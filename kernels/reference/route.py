"""Route: which expert group a segment takes and with which weights (docs/architecture.md)."""

import torch
from torch import Tensor

from tucka_runtime.kernels.tables.routes import RoutePlan


def select(logits: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """ops.Select."""
    z = logits.view(logits.shape[0], -1, t)
    norm = torch.linalg.vector_norm(z, dim=2, keepdim=True)
    scores = torch.sigmoid(z / norm.clamp_min(torch.finfo(torch.float32).tiny))
    groups = torch.argmax(scores.flatten(1), dim=1) // t
    return groups, scores.gather(1, groups[:, None, None].expand(-1, 1, t)).squeeze(1)


def route_ids(plan: RoutePlan) -> None:
    """ops.RouteIds. Segments of equally shaped routers go together."""
    alike: dict[tuple[int, int], list[int]] = {}
    for s, (adapter, own) in enumerate(zip(plan.adapters, plan.ids, strict=True)):
        if own is not None:
            alike.setdefault((adapter.k, adapter.t), []).append(s)
    for (_, t), members in alike.items():
        means = [_mean_row(plan.adapters[s].table, plan.ids[s]) for s in members]
        groups, weights = select(torch.stack(means), t)
        at = torch.tensor(members).to(groups.device)
        plan.groups.index_copy_(0, at, groups)
        plan.weights[:, :t].index_copy_(0, at, weights)


def _mean_row(table: Tensor | None, ids: Tensor | None) -> Tensor:
    assert table is not None and ids is not None
    return table.index_select(0, ids).mean(dim=0)


def route_hidden(x: Tensor, centroids: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """ops.RouteHidden."""
    return select((centroids @ x.float().mean(dim=0))[None], t)
