"""The adapters' part of one forward pass: routes, routed cores, and the deltas they make."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from tucka_runtime.core import ActiveSet, FoldedAdapter, Plans
from tucka_runtime.kernels.segments import DeltaSite, Segments, SitePlan
from tucka_runtime.sequence import AdapterKey, Route


@dataclass(eq=False)
class Segment:
    """Rows first..end of a batch that share an adapter and a route.

    The route is `given`, or comes from the tokens `ids`, or, where both are None, from the segment's router inputs.
    """

    first: int
    end: int
    adapter: AdapterKey
    given: Route | None = None
    ids: Tensor | None = None


@dataclass(eq=False)
class RouteSum:
    """Sums up router inputs over the chunks of a long prompt: `total` (d,) fp32 of `count` rows, this pass's being
    first..end. They go through the pass as base rows: before its router an adapter changes nothing."""

    adapter: AdapterKey
    first: int = 0
    end: int = 0
    count: int = 0
    total: Tensor | None = None


@dataclass(eq=False)
class Delta:
    """What the adapters of one batch add to one forward pass."""

    num_rows: int
    ops: SimpleNamespace
    active: ActiveSet | None = None
    segments: Segments | None = None
    routes: list[tuple[list[int], Tensor, Tensor]] = field(default_factory=list)
    """Segments, their groups (S,) int64 and weights (S, t) fp32 on the device, as they become known."""
    cores: Tensor | None = None
    waiting: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """Segments that are routed when the pass comes to a site."""
    sums: dict[tuple[int, int], list[RouteSum]] = field(default_factory=dict)
    saved: dict[str, list[tuple[slice, Tensor]]] = field(default_factory=dict)
    plans: Plans = field(default_factory=dict)
    route_seconds: float = 0.0
    """Host time of what was routed from token ids."""

    @property
    def replaces(self) -> bool:
        """Whether an adapter of the batch brings parameters of its own."""
        return bool(self.saved)

    def replaced(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """(rows, value) of every adapter of the batch that replaces the parameter."""
        return iter(self.saved.get(name, ()))

    @staticmethod
    def build(
        num_rows: int,
        segments: Sequence[Segment],
        sums: Sequence[RouteSum],
        active: ActiveSet | None,
        ops: SimpleNamespace,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Delta":
        """Routes what is known from token ids alone and makes its cores; the rest waits for its site."""
        delta = Delta(num_rows, ops, active)
        if active is None:
            return delta
        for part in sums:
            adapter = active.adapters[active.index[part.adapter]]
            if adapter.routed is not None:
                at = adapter.routed.router.at
                delta.sums.setdefault((at.layer, at.site), []).append(part)
            delta._replace(adapter, part.first, part.end)
        for segment in segments:
            delta._replace(active.adapters[active.index[segment.adapter]], segment.first, segment.end)
        if not segments:
            return delta
        spans = [(s.first, s.end, active.index[s.adapter]) for s in segments]
        delta.segments, delta.plans = active.layout(spans, num_rows, device)
        if active.num_slots:
            rank = active.core_rank
            delta.cores = torch.zeros(len(spans), active.num_slots, rank, rank, dtype=dtype, device=device)
        begin = time.monotonic()
        delta._route(segments, device)
        delta.route_seconds = time.monotonic() - begin
        return delta

    def host_routes(self) -> dict[int, Route]:
        """The routes by segment, once they are known. On a GPU this waits for them."""
        return {
            s: Route(group, tuple(weights))
            for own, groups, table in self.routes
            for s, group, weights in zip(own, groups.tolist(), table.tolist(), strict=True)
        }

    def _replace(self, adapter: FoldedAdapter, first: int, end: int) -> None:
        for name, value in adapter.saved.items():
            self.saved.setdefault(name, []).append((slice(first, end), value))

    def _route(self, segments: Sequence[Segment], device: torch.device) -> None:
        """The cores of all segments whose route is given or known from token ids, bank by bank."""
        assert self.active is not None
        given: dict[int, list[int]] = {}
        by_ids: dict[int, list[int]] = {}
        for s, segment in enumerate(segments):
            a = self.active.index[segment.adapter]
            member, routed = self.active.member[a], self.active.adapters[a].routed
            if member is None or routed is None:
                if self.cores is not None:
                    self.cores[s].copy_(torch.eye(self.active.core_rank, device=device))
            elif segment.given is not None:
                given.setdefault(member[0], []).append(s)
            elif routed.router.table is not None and segment.ids is not None:
                by_ids.setdefault(member[0], []).append(s)
            else:
                at = routed.router.at
                self.waiting.setdefault((at.layer, at.site), []).append(s)
        for bank, own in given.items():
            routes = [r for s in own if (r := segments[s].given) is not None]
            groups = torch.tensor([r.group for r in routes]).to(device)
            self._finish(bank, own, groups, torch.tensor([r.weights for r in routes]).to(device))
        for bank, own in by_ids.items():
            routers = [known.router for s in own if (known := self._adapter(s).routed) is not None]
            ids = [segments[s].ids for s in own]
            self._finish(bank, own, *self.ops.route.route_ids(ids, [r.table for r in routers], routers[0].t))

    def _adapter(self, s: int) -> FoldedAdapter:
        assert self.active is not None and self.segments is not None
        return self.active.adapters[self.segments.spans[s][2]]

    def _finish(self, bank: int, own: list[int], groups: Tensor, weights: Tensor) -> None:
        """The cores of segments of one bank, whose routes are known: groups (S,), weights (S, t)."""
        assert self.active is not None and self.segments is not None and self.cores is not None
        self.routes.append((own, groups, weights))
        places = [m[1] for s in own if (m := self.active.member[self.segments.spans[s][2]]) is not None]
        member, rows = torch.tensor([places, own]).to(groups.device)
        stack = self.active.banks[bank]
        self.ops.core.core(stack.c, stack.g, member, groups, weights, stack.modules, rows, self.cores)

    def shrink(self, layer: int, site: int, x: Tensor) -> tuple[Tensor, DeltaSite, SitePlan] | tuple[None, None, None]:
        """h, and what `expand` needs with it, for the input x (T, d_in) of a site; Nones where nothing is adapted."""
        at = (layer, site)
        if self.active is None:
            return None, None, None
        for part in self.sums.get(at, ()):
            total = x[part.first : part.end].float().sum(dim=0)
            part.total = total if part.total is None else part.total + total
            part.count += part.end - part.first
        for s in self.waiting.get(at, ()):
            assert self.segments is not None
            first, end, a = self.segments.spans[s]
            routed, member = self.active.adapters[a].routed, self.active.member[a]
            assert routed is not None and member is not None
            route = self.ops.route.route_hidden(x[first:end], routed.router.centroids, routed.router.t)
            self._finish(member[0], [s], *route)
        weights = self.active.sites.get(at)
        if weights is None or self.segments is None:
            return None, None, None
        key = weights.ranks, weights.d_in
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = SitePlan.build(self.segments, weights)
        cores = None
        if self.cores is not None and (slot := self.active.slots.get(at)) is not None:
            cores = self.cores[:, slot : slot + len(weights.columns) - 1]
        return self.ops.shrink_core.shrink_core(x, weights, cores, plan), weights, plan
