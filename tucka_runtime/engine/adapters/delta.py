"""The adapters' part of one forward pass: routes, routed cores, and the low-rank deltas that they make.

A route's way through the types: an adapter's `FoldedRouter` (centroids, table) and `TuckACores` say what it is routed
by; `CoreParts` are the tensors of both that kernels take, and a `RoutePlan` has those of all segments of a batch. The
kernels fill in its groups and weights, which `Routes` names by segment and brings to the host, where each becomes a
`messages.Route`, and, for the answer, a `RouteReport`. A `RouteSum` collects what a prompt in chunks is routed by.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from tucka_runtime.engine.adapters.active import ActiveSet, Plans
from tucka_runtime.engine.adapters.folded import FoldedAdapter, FoldedTable
from tucka_runtime.engine.adapters.segment import (
    Routes,
    RouteSum,
    Segment,
    core_rows,
    route_plan,
    write_identities,
    write_members,
)
from tucka_runtime.kernels.ops import LowRank, Ops
from tucka_runtime.kernels.tables.routes import CoreParts, RoutePlan
from tucka_runtime.kernels.tables.segments import Segments, SitePlan
from tucka_runtime.messages import AdapterKey, Route
from tucka_runtime.models.architecture import DOWN, OUT, QKV, UP

FORKED = frozenset({QKV, OUT, UP, DOWN})
"""Sites whose shrinks run beside the base's product and not before it: on an H100 a step of a Llama-3-8B is 2 to 3%
longer where those of any one site run behind it, 9% where all do (`step` of docs/measurements/first-run/where.py)."""


@dataclass(eq=False)
class Settled:
    """The cores of the last batch. One of the same adapters in the same rows takes their place and writes over what
    routes make of them; one of the same segments whose routes were all known before it takes them as they are, so that
    what only decodes makes no core twice; one of the same segments that are routed by other tokens of theirs, as they
    are that decode under a batch's route, also takes what says where these and their cores lie."""

    active: "ReferenceType[ActiveSet] | None" = None
    """Weak, so that the adapters of the last batch do not stay in memory for its sake."""
    made_of: tuple[object, ...] | None = None
    """None where a route was not known before."""
    room_of: tuple[object, ...] | None = None
    """None where a core was still to be made in the pass."""
    cores: Tensor | None = None
    site_cores: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    routes: list[Routes] = field(default_factory=list)
    segments: Segments | None = None
    plan: tuple[list[int], RoutePlan] | None = None
    """Which of the segments are routed, and how, if each is by its rows' tokens."""
    ids: Tensor | None = None
    """The tokens (T,) that the plan reads."""

    def _same(self, delta: "AdapterDelta") -> bool:
        return self.active is not None and self.active() is delta.active

    def take(self, delta: "AdapterDelta", made_of: tuple[object, ...] | None) -> bool:
        """Gives a batch of these segments its cores and routes, if it is the same batch."""
        if made_of is None or self.made_of != made_of or not self._same(delta):
            return False
        delta.cores, delta.site_cores, delta.routes = self.cores, self.site_cores, self.routes
        return True

    def take_room(self, delta: "AdapterDelta", room_of: tuple[object, ...] | None) -> bool:
        """Gives a batch of these adapters in these rows the place of its cores, if there is one. What is in it is this
        batch's from here on."""
        self.made_of = None
        if room_of is None or self.room_of != room_of or not self._same(delta):
            return False
        delta.cores, delta.site_cores = self.cores, self.site_cores
        return True

    def route_again(self, delta: "AdapterDelta", segments: Sequence[Segment], ids: Tensor) -> bool:
        """Routes a batch of these segments and makes its cores, if it is the same batch with other tokens."""
        if self.plan is None or delta.segments is not self.segments or not self._same(delta):
            return False
        if not all(map(_by_rows, segments)):
            return False
        assert self.ids is not None
        self.ids.copy_(ids)
        delta.cores, delta.site_cores = self.cores, self.site_cores
        delta.make_routed(*self.plan)
        return True

    def keep(
        self,
        delta: "AdapterDelta",
        made_of: tuple[object, ...] | None,
        room_of: tuple[object, ...] | None,
        plan: tuple[list[int], RoutePlan] | None,
        ids: Tensor,
    ) -> None:
        assert delta.active is not None
        self.active, self.made_of, self.room_of = ref(delta.active), made_of, room_of
        self.cores, self.site_cores, self.routes = delta.cores, delta.site_cores, delta.routes
        self.segments, self.plan, self.ids = delta.segments, plan, ids


def _made_of(segments: Sequence[Segment], active: ActiveSet) -> tuple[object, ...] | None:
    """What the cores of segments depend on beside their adapters; None where that is not known before the batch."""
    if any(s.given is None and active.folded[s.adapter].routed is not None for s in segments):
        return None
    return tuple((s.first, s.end, s.adapter, s.given, s.member) for s in segments)


def _by_rows(segment: Segment) -> bool:
    """Whether a segment's route, if it has one, comes from the tokens of its rows, and nothing else makes its core."""
    return segment.given is None and segment.prompt is None and segment.member is None


def _waits(segment: Segment, active: ActiveSet) -> bool:
    """Whether a segment's route is known only when the pass comes to its router."""
    folded = active.folded[segment.adapter]
    routed = folded.routed
    if routed is None or folded.further or segment.given is not None:
        return False
    return routed.router.table is None


@dataclass(eq=False)
class AdapterDelta:
    """What the adapters of one batch add to one forward pass."""

    num_rows: int
    ops: Ops
    active: ActiveSet | None = None
    segments: Segments | None = None
    keys: list[AdapterKey] = field(default_factory=list)
    """The adapter of each segment."""
    routes: list[Routes] = field(default_factory=list)
    cores: Tensor | None = None
    """(C, every linear, R, R)."""
    site_cores: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """The views of them that the sites take."""
    waiting: dict[tuple[int, int], list[tuple[int, slice]]] = field(default_factory=dict)
    """Segments that are routed when the pass comes to a site, and the rows that they are routed by."""
    sums: dict[tuple[int, int], list[RouteSum]] = field(default_factory=dict)
    saved: dict[str, list[tuple[slice, Tensor]]] = field(default_factory=dict)
    tables: dict[str, list[tuple[slice, FoldedTable]]] = field(default_factory=dict)
    """The rows whose adapters change the embedding or the head, by its path."""
    own_vocabularies: bool = False
    """Whether an adapter of the batch has tokens of its own, or lacks some of the base's."""
    plans: Plans = field(default_factory=dict)
    route_seconds: float = 0.0
    """Host time of what was routed from token ids."""
    side: torch.cuda.Stream | None = None
    """The stream on which the shrinks of FORKED sites run; None is the one of everything else."""
    forked: bool = False
    """This tells whether something runs there that `join` has not waited for."""

    @property
    def replaces(self) -> bool:
        """Whether an adapter of the batch brings parameters of its own."""
        return bool(self.saved)

    def replaced(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """(rows, value) of every adapter of the batch that replaces the parameter."""
        return iter(self.saved.get(name, ()))

    @staticmethod
    def build(
        ids: Tensor,
        segments: Sequence[Segment],
        sums: Sequence[RouteSum],
        active: ActiveSet | None,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
        settled: Settled,
    ) -> "AdapterDelta":
        """Routes what is known from token ids alone and makes its cores; the rest waits for its site. `ids` (T,) are
        the rows' tokens, `dtype` is the cores' type; `settled` is what this build and the next share."""
        num_rows = len(ids)
        delta = AdapterDelta(num_rows, ops, active, keys=[s.adapter for s in segments])
        if active is None:
            return delta
        for part in sums:
            adapter = active.folded[part.adapter]
            if adapter.routed is not None:
                at = adapter.routed.router.at
                delta.sums.setdefault((at.layer, at.site), []).append(part)
        if not active.in_deltas:
            for part in sums:
                delta._replace(active.folded[part.adapter], part.first, part.end)
            for segment in segments:
                delta._replace(active.folded[segment.adapter], segment.first, segment.end)
        if segments:
            rows = core_rows(segments, active)
            spans = [(s.first, s.end, active.index[s.adapter]) for s in segments]
            delta.segments, delta.plans = active.layout(spans, rows, num_rows, device)
            begin = time.monotonic()
            if settled.route_again(delta, segments, ids):
                delta.route_seconds = time.monotonic() - begin
                return delta
            made_of = _made_of(segments, active)
            if not settled.take(delta, made_of):
                for segment in segments:
                    if segment.ids is None:
                        segment.ids = ids[segment.first : segment.end]
                # Before its router an adapter changes nothing: what waits for that finds nothing in its core.
                waits = any(_waits(s, active) for s in segments)
                room_of = (tuple(rows), tuple(delta.keys)) if not waits else None
                if not settled.take_room(delta, room_of):
                    delta._make_room(segments, rows, active, dtype, device)
                if delta.cores is not None:
                    write_members(segments, rows, active, delta.cores)
                begin = time.monotonic()
                plan = delta._route(segments, active, device)
                delta.route_seconds = time.monotonic() - begin
                settled.keep(delta, made_of, room_of, plan if all(map(_by_rows, segments)) else None, ids)
        return delta

    def _replace(self, adapter: FoldedAdapter, first: int, end: int) -> None:
        for name, value in adapter.saved.items():
            self.saved.setdefault(name, []).append((slice(first, end), value))
        for path, table in adapter.tables.items():
            self.tables.setdefault(path, []).append((slice(first, end), table))
        self.own_vocabularies |= adapter.vocab_size is not None

    def _make_room(
        self, segments: Sequence[Segment], rows: list[int], active: ActiveSet, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Room for the cores, `rows` of it the segments', and in it those that no route makes."""
        if not active.core_rank:
            return
        rank, last = active.core_rank, max(rows)
        # Zeros, for a smaller core is the upper left block of its place, and what lies beside it is multiplied too.
        self.cores = torch.zeros(last + 1, active.arch.num_linears, rank, rank, dtype=dtype, device=device)
        if not all(active.folded[s.adapter].core_rank for s in segments):
            self.cores[last] = torch.eye(rank, device=device)
        write_identities(segments, rows, active, self.cores)

    def _route(
        self, segments: Sequence[Segment], active: ActiveSet, device: torch.device
    ) -> tuple[list[int], RoutePlan] | None:
        """The cores of all segments whose route is given or known from token ids; the others start to wait. Returns
        those that were routed, and how, where there is no other kind."""
        ready, others = [], False
        for s, segment in enumerate(segments):
            folded = active.folded[segment.adapter]
            routed = folded.routed
            if routed is None:
                continue
            if folded.further:
                others = True
                self._route_each(s, segment, folded, device)
            elif _waits(segment, active):
                others = True
                at = routed.router.at
                rows = slice(segment.first, segment.routed_end)
                self.waiting.setdefault((at.layer, at.site), []).append((s, rows))
            else:
                ready.append(s)
        if not ready:
            return None
        plan = self._plan(ready, [segments[s] for s in ready], device)
        self.make_routed(ready, plan)
        return None if others else (ready, plan)

    def make_routed(self, own: list[int], plan: RoutePlan) -> None:
        """The cores of segments that the plan routes by token ids, or whose routes it knows."""
        if plan.limits.tokens:
            self.ops.route_ids(plan)
        self._make_cores(own, plan)

    def _route_each(self, s: int, segment: Segment, folded: FoldedAdapter, device: torch.device) -> None:
        """The same of a combination with several routers, all of which know their routes from token ids: each makes its
        block of the core."""
        assert self.cores is not None and self.segments is not None
        row, begin = self.segments.core_rows[s], 0
        sizes = [(own.parts.k, own.parts.t) for own in folded.all_routed]
        given: list[Route | None] = [None] * len(sizes)
        if segment.given is not None:
            given = [*segment.given.split(sizes)]
        groups, weights = torch.zeros(1, dtype=torch.int64, device=device), []
        for own, route, (k, t) in zip(folded.all_routed, given, sizes, strict=True):
            plan = route_plan([own.parts], [0], [replace(segment, given=route)], device)
            if plan.limits.tokens:
                self.ops.route_ids(plan)
            rank = own.parts.rank
            block = self.cores.new_zeros(1, self.cores.shape[1], rank, rank)
            self.ops.core(plan, block)
            end = begin + rank
            self.cores[row, own.linears, begin:end, begin:end] = block[0, own.linears]
            groups, begin = groups * k + plan.groups, end
            weights.append(plan.weights[:, :t])
        self.routes.append(Routes([s], [sum(t for _, t in sizes)], groups, torch.cat(weights, dim=1)))

    def _plan(self, own: list[int], segments: Sequence[Segment], device: torch.device) -> RoutePlan:
        assert self.segments is not None
        rows = [self.segments.core_rows[s] for s in own]
        return route_plan([self._parts(s) for s in own], rows, segments, device)

    def _parts(self, s: int) -> CoreParts:
        assert self.active is not None
        routed = self.active.folded[self.keys[s]].routed
        assert routed is not None
        return routed.parts

    def _make_cores(self, own: list[int], plan: RoutePlan) -> None:
        """The cores of segments whose routes the plan knows."""
        assert self.cores is not None
        self.routes.append(Routes(own, [a.t for a in plan.adapters], plan.groups, plan.weights))
        self.ops.core(plan, self.cores)

    def shrink(self, layer: int, site: int, x: Tensor) -> LowRank | None:
        """The low-rank half of the delta for the input x (T, d_in) of a site; None where nothing is adapted. `join`
        must come before it is read. Routes, on the way, what waits for this site."""
        if self.active is None:
            return None
        at = (layer, site)
        for part in self.sums.get(at, ()):
            part.add(x)
        for s, rows in self.waiting.get(at, ()):
            self._route_here(s, x[rows])
        factors = self.active.sites.get(at)
        if factors is None or self.segments is None:
            return None
        key = factors.ranks, factors.d_in
        plan = self.plans.get(key)
        if plan is None:
            limit = None if factors.ranks else self.active.max_rank
            plan = self.plans[key] = SitePlan.build(self.segments, factors, limit)
        cores = self.site_cores.get(at)
        if cores is None and self.cores is not None:
            first = self.active.arch.first_linear(layer, site)
            cores = self.site_cores[at] = self.cores[:, first : first + len(factors.columns) - 1]
        if self.side is None or site not in FORKED:
            return self.ops.shrink_core(x, factors, cores, plan)
        self.side.wait_stream(torch.cuda.current_stream())
        self.forked = True
        with torch.cuda.stream(self.side):
            return self.ops.shrink_core(x, factors, cores, plan)

    def join(self) -> None:
        """Waits, on the device, for what `shrink` started on the side."""
        if self.side is not None and self.forked:
            torch.cuda.current_stream().wait_stream(self.side)
            self.forked = False

    def _route_here(self, s: int, x: Tensor) -> None:
        """Routes a segment by rows x (N, d_in) of the router's input."""
        assert self.active is not None and self.segments is not None
        routed = self.active.folded[self.keys[s]].routed
        assert routed is not None
        groups, weights = self.ops.route_hidden(x, routed.router.centroids, routed.router.t)
        plan = RoutePlan.of_one(routed.parts, self.segments.core_rows[s], groups, weights)
        self._make_cores([s], plan)
