"""The adapters' part of a forward pass: folded factors, routes, routed cores, and the deltas they make.

`ActiveSet` holds what depends on which adapters are in a batch, `Delta` what depends on the batch itself.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from tucka_runtime.kernels.segments import DeltaSite, Segments, SitePlan
from tucka_runtime.models.architecture import Site
from tucka_runtime.sequence import AdapterKey, Route

# By the ranks and d_in of a site.
Plans = dict[tuple[tuple[tuple[int, ...], ...], int], SitePlan]


@dataclass(frozen=True, order=True)
class Where:
    """A linear of the decoder: layer, site within it, target within that."""

    layer: int
    site: int
    target: int


@dataclass(frozen=True, eq=False)
class Router:
    """Where an adapter is routed: centroids (k·t, d) fp32, and, where the router's input is a function of the token
    alone, their products with every token's input as a table (vocab, k·t) fp32."""

    at: Where
    t: int
    centroids: Tensor
    table: Tensor | None


@dataclass(frozen=True, eq=False)
class TuckACores:
    """What cores are made of: g (M, k, p, r, r) and c (M, t, p) of the M adapted linears at `places`, normalised."""

    places: list[Where]
    g: Tensor
    c: Tensor
    router: Router


@dataclass(frozen=True, eq=False)
class FoldedAdapter:
    """An adapter in the serving form. `factors` has (U (r, d_in), E (r, d_out)) of each adapted linear; `routed` is
    None where the core is constant; `saved` replaces parameters of the base by name."""

    key: AdapterKey
    digest: str
    factors: Mapping[Where, tuple[Tensor, Tensor]]
    routed: TuckACores | None
    saved: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors on the device."""
        tensors = [t for pair in self.factors.values() for t in pair] + list(self.saved.values())
        if self.routed is not None:
            router = self.routed.router
            tensors += [self.routed.g, self.routed.c, router.centroids]
            tensors += [] if router.table is None else [router.table]
        return sum(t.nbytes for t in tensors)


@dataclass(frozen=True, eq=False)
class ActiveSet:
    """The adapters of a batch, stacked site by site."""

    adapters: tuple[FoldedAdapter, ...]
    index: dict[AdapterKey, int]
    sites: dict[tuple[int, int], DeltaSite]
    slots: dict[tuple[int, int], int]
    """First row in the cores (S, N, R, R) of each site that some adapter routes."""
    num_slots: int
    core_rank: int
    modules: tuple[Tensor | None, ...]
    """Per adapter the rows (M,) of its cores; None where they are constant."""
    layouts: dict[tuple[int, tuple[tuple[int, int, int], ...]], tuple[Segments, Plans]] = field(default_factory=dict)

    def layout(
        self, spans: Sequence[tuple[int, int, int]], num_rows: int, device: torch.device
    ) -> tuple[Segments, Plans]:
        """The metadata of a batch, kept while batches have the same members: it depends on nothing else."""
        key = num_rows, tuple(spans)
        if key not in self.layouts:
            self.layouts.clear()
            self.layouts[key] = Segments.build(spans, num_rows, len(self.adapters), device), {}
        return self.layouts[key]

    @staticmethod
    def build(
        adapters: Sequence[FoldedAdapter],
        sites: Sequence[Site],
        dtype: torch.dtype,
        device: torch.device,
        pool: bool,
    ) -> "ActiveSet":
        """`pool` stacks the factors too, for the reference kernels."""
        used = sorted({(at.layer, at.site) for a in adapters for at in a.factors})
        stacked = {}
        for layer, s in used:
            site = sites[s]
            targets = range(len(site.targets))
            pairs = [[a.factors.get(Where(layer, s, j)) for j in targets] for a in adapters]
            columns = [0]
            for width in site.widths:
                columns.append(columns[-1] + width)
            stacked[layer, s] = DeltaSite.build(
                [[p[0] if p else None for p in row] for row in pairs],
                [[p[1] if p else None for p in row] for row in pairs],
                columns,
                site.d_in,
                dtype,
                device,
                pool,
            )
        routed = [a.routed for a in adapters]
        slots: dict[tuple[int, int], int] = {}
        num_slots = 0
        for layer, s in sorted({(at.layer, at.site) for r in routed if r for at in r.places}):
            slots[layer, s] = num_slots
            num_slots += len(sites[s].targets)
        modules = [
            torch.tensor([slots[at.layer, at.site] + at.target for at in r.places]).to(device) if r else None
            for r in routed
        ]
        return ActiveSet(
            adapters=tuple(adapters),
            index={a.key: i for i, a in enumerate(adapters)},
            sites=stacked,
            slots=slots,
            num_slots=num_slots,
            core_rank=max((r.g.shape[-1] for r in routed if r), default=0),
            modules=tuple(modules),
        )


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
    routes: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    """Per segment its group () int64 and weights (t,) fp32, on the device; None while unknown or constant."""
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
        for s, segment in enumerate(segments):
            delta._start(s, segment)
        delta.route_seconds = time.monotonic() - begin
        return delta

    def _replace(self, adapter: FoldedAdapter, first: int, end: int) -> None:
        for name, value in adapter.saved.items():
            self.saved.setdefault(name, []).append((slice(first, end), value))

    def _start(self, s: int, segment: Segment) -> None:
        assert self.active is not None
        routed = self.active.adapters[self.active.index[segment.adapter]].routed
        self.routes.append(None)
        if routed is None:
            if self.cores is not None:
                self.cores[s].copy_(torch.eye(self.active.core_rank, device=self.cores.device))
        elif segment.given is not None:
            device = routed.g.device
            group = torch.tensor(segment.given.group).to(device)
            self._finish(s, (group, torch.tensor(segment.given.weights).to(device)))
        elif routed.router.table is not None and segment.ids is not None:
            self._finish(s, self.ops.route.route_ids(segment.ids, routed.router.table, routed.router.t))
        else:
            at = routed.router.at
            self.waiting.setdefault((at.layer, at.site), []).append(s)

    def _finish(self, s: int, route: tuple[Tensor, Tensor]) -> None:
        """The cores of a segment whose route is known."""
        assert self.active is not None and self.segments is not None and self.cores is not None
        a = self.segments.spans[s][2]
        routed, modules = self.active.adapters[a].routed, self.active.modules[a]
        assert routed is not None and modules is not None
        self.routes[s] = route
        self.ops.core.core(routed.c, routed.g, *route, modules, self.cores[s])

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
            routed = self.active.adapters[a].routed
            assert routed is not None
            self._finish(s, self.ops.route.route_hidden(x[first:end], routed.router.centroids, routed.router.t))
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
