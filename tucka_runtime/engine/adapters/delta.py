"""The adapters' part of one forward pass: routes, routed cores, and the deltas they make."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace

import torch
from torch import Tensor

from tucka_runtime.engine.adapters.active import ActiveSet, Plans
from tucka_runtime.engine.adapters.folded import FoldedAdapter
from tucka_runtime.kernels.tables.routes import Routed, RoutePlan
from tucka_runtime.kernels.tables.segments import DeltaSite, Segments, SitePlan
from tucka_runtime.messages import AdapterKey, Route


@dataclass(eq=False)
class Segment:
    """Rows first..end of a batch that share an adapter and a route.

    The route is `given`, or comes from the tokens `ids`, or, where the adapter has no table of them, from the segment's
    router inputs. `ids` are those of the `prompt` if there is one, else of the rows.
    """

    first: int
    end: int
    adapter: AdapterKey
    given: Route | None = None
    prompt: list[int] | None = None
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
class Routes:
    """The routes of some segments, as they become known: groups (S,) int64, weights (S, at least t), on the device."""

    segments: list[int]
    experts: list[int]
    """t of each."""
    groups: Tensor
    weights: Tensor

    def to_host(self) -> "Routes":
        """A copy that is on the host once the device has come so far."""
        groups, weights = (x.to("cpu", non_blocking=True, copy=True) for x in (self.groups, self.weights))
        return Routes(self.segments, self.experts, groups, weights)

    def items(self) -> Iterator[tuple[int, Route]]:
        """Each segment's route, from the host's copy."""
        rows = zip(self.segments, self.experts, self.groups.tolist(), self.weights.tolist(), strict=True)
        return ((s, Route(group, tuple(weights[:t]))) for s, t, group, weights in rows)


@dataclass(eq=False)
class Delta:
    """What the adapters of one batch add to one forward pass."""

    num_rows: int
    ops: SimpleNamespace
    active: ActiveSet | None = None
    segments: Segments | None = None
    keys: list[AdapterKey] = field(default_factory=list)
    """The adapter of each segment."""
    routes: list[Routes] = field(default_factory=list)
    cores: Tensor | None = None
    waiting: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """Segments that are routed when the pass comes to a site."""
    sums: dict[tuple[int, int], list[RouteSum]] = field(default_factory=dict)
    saved: dict[str, list[tuple[slice, Tensor]]] = field(default_factory=dict)
    plans: Plans = field(default_factory=dict)
    route_seconds: float = 0.0
    """Host time of what was routed from token ids."""
    side: torch.cuda.Stream | None = None
    """Where shrinks run, beside the base's products; None: where everything runs."""
    forked: bool = False
    """Whether something runs there that `join` has not waited for."""

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
        delta = Delta(num_rows, ops, active, keys=[s.adapter for s in segments])
        if active is None:
            return delta
        for part in sums:
            adapter = active.folded[part.adapter]
            if adapter.routed is not None:
                at = adapter.routed.router.at
                delta.sums.setdefault((at.layer, at.site), []).append(part)
            delta._replace(adapter, part.first, part.end)
        for segment in segments:
            delta._replace(active.folded[segment.adapter], segment.first, segment.end)
        if not segments:
            return delta
        spans = [(s.first, s.end, active.index[s.adapter]) for s in segments]
        rows = core_rows(segments, active)
        delta.segments, delta.plans = active.layout(spans, rows, num_rows, device)
        if active.core_rank:
            rank, last = active.core_rank, max(rows)
            delta.cores = torch.zeros(last + 1, active.arch.num_linears, rank, rank, dtype=dtype, device=device)
            if any(active.folded[s.adapter].routed is None for s in segments):
                delta.cores[last] = torch.eye(rank, device=device)
        begin = time.monotonic()
        delta._route(segments, device)
        delta.route_seconds = time.monotonic() - begin
        return delta

    def _replace(self, adapter: FoldedAdapter, first: int, end: int) -> None:
        for name, value in adapter.saved.items():
            self.saved.setdefault(name, []).append((slice(first, end), value))

    def _route(self, segments: Sequence[Segment], device: torch.device) -> None:
        """The cores of all segments whose route is given or known from token ids; the others start to wait."""
        assert self.active is not None
        known = []
        for s, segment in enumerate(segments):
            routed = self.active.folded[segment.adapter].routed
            if routed is None:
                continue
            if segment.given is not None or (routed.router.table is not None and segment.ids is not None):
                known.append(s)
            else:
                at = routed.router.at
                self.waiting.setdefault((at.layer, at.site), []).append(s)
        if known:
            plan = self._plan(known, [segments[s] for s in known], device)
            if plan.limits.tokens:
                self.ops.route.route_ids(plan)
            self._finish(known, plan)

    def _plan(self, own: list[int], segments: Sequence[Segment], device: torch.device) -> RoutePlan:
        assert self.segments is not None
        rows = [self.segments.core_rows[s] for s in own]
        return route_plan([self._parts(s) for s in own], rows, segments, device)

    def _parts(self, s: int) -> Routed:
        assert self.active is not None
        routed = self.active.folded[self.keys[s]].routed
        assert routed is not None
        return routed.parts

    def _finish(self, own: list[int], plan: RoutePlan) -> None:
        """The cores of segments whose routes the plan knows."""
        assert self.cores is not None
        self.routes.append(Routes(own, [a.t for a in plan.adapters], plan.groups, plan.weights))
        self.ops.core.core(plan, self.cores)

    def shrink(self, layer: int, site: int, x: Tensor) -> tuple[Tensor, DeltaSite, SitePlan] | tuple[None, None, None]:
        """h, and what `expand` needs with it, for the input x (T, d_in) of a site; Nones where nothing is adapted.
        `join` must come before h is read."""
        at = (layer, site)
        if self.active is None:
            return None, None, None
        for part in self.sums.get(at, ()):
            total = x[part.first : part.end].float().sum(dim=0)
            part.total = total if part.total is None else part.total + total
            part.count += part.end - part.first
        for s in self.waiting.get(at, ()):
            self._route_here(s, x)
        weights = self.active.sites.get(at)
        if weights is None or self.segments is None:
            return None, None, None
        key = weights.ranks, weights.d_in
        plan = self.plans.get(key)
        if plan is None:
            limit = None if weights.ranks else self.active.max_rank
            plan = self.plans[key] = SitePlan.build(self.segments, weights, limit)
        cores = None
        if self.cores is not None:
            first = self.active.arch.first_linear(layer, site)
            cores = self.cores[:, first : first + len(weights.columns) - 1]
        if self.side is None:
            return self.ops.shrink_core.shrink_core(x, weights, cores, plan), weights, plan
        self.side.wait_stream(torch.cuda.current_stream())
        self.forked = True
        with torch.cuda.stream(self.side):
            return self.ops.shrink_core.shrink_core(x, weights, cores, plan), weights, plan

    def join(self) -> None:
        """Waits, on the device, for what `shrink` started on the side."""
        if self.side is not None and self.forked:
            torch.cuda.current_stream().wait_stream(self.side)
            self.forked = False

    def _route_here(self, s: int, x: Tensor) -> None:
        """Routes a segment by its rows of the router's input."""
        assert self.active is not None and self.segments is not None
        first, end, _ = self.segments.spans[s]
        routed = self.active.folded[self.keys[s]].routed
        assert routed is not None
        groups, weights = self.ops.route.route_hidden(x[first:end], routed.router.centroids, routed.router.t)
        plan = self._plan([s], [Segment(first, end, self.keys[s], given=Route(0, ()))], x.device)
        plan.groups.copy_(groups)
        plan.weights.copy_(weights)
        self._finish([s], plan)


def core_rows(segments: Sequence[Segment], active: ActiveSet, identity: int | None = None) -> list[int]:
    """Which core each segment takes: its own where that depends on a route, else the one at `identity`, which lies
    right behind the others where it is not given."""
    routed = [active.folded[s.adapter].routed is not None for s in segments]
    own, constant = count(), sum(routed) if identity is None else identity
    return [next(own) if r else constant for r in routed]


def route_plan(
    parts: Sequence[Routed], rows: Sequence[int], segments: Sequence[Segment], device: torch.device
) -> RoutePlan:
    """What the kernels need to know of segments whose route is given or known from their token ids."""
    ids = [None if s.given is not None else s.ids for s in segments]
    known = [None if s.given is None else (s.given.group, s.given.weights) for s in segments]
    return RoutePlan.build(parts, rows, ids, known, device)
