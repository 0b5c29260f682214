"""Adapters as they are served: folded factors, what routed cores are made of, and both put together for a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from tucka_runtime.kernels.routes import Routed
from tucka_runtime.kernels.segments import DeltaSite, Segments, SitePlan, check_factor
from tucka_runtime.kernels.transfer import place
from tucka_runtime.models.architecture import Architecture
from tucka_runtime.sequence import AdapterKey

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
    """What cores are made of: g (M, k, p, r, r) and c (M, t, p) of the M adapted linears at `places`, normalised;
    `slots` (M,) int64 are their numbers (Architecture.first_linear), by which a segment's cores are kept."""

    places: list[Where]
    slots: Tensor
    g: Tensor
    c: Tensor
    router: Router

    @cached_property
    def parts(self) -> Routed:
        return Routed(self.c, self.g, self.slots, self.router.table)


@dataclass(frozen=True, eq=False)
class FoldedAdapter:
    """An adapter in the serving form. `factors` has (U (r, d_in), E (r, d_out)) of each adapted linear; `routed` is
    None where the core is constant; `saved` replaces parameters of the base by name."""

    key: AdapterKey
    digest: str
    factors: Mapping[Where, tuple[Tensor, Tensor]]
    routed: TuckACores | None
    saved: Mapping[str, Tensor]

    def tensors(self) -> list[Tensor]:
        """All that it holds on the device."""
        tensors = [t for pair in self.factors.values() for t in pair] + list(self.saved.values())
        if self.routed is not None:
            router = self.routed.router
            tensors += [self.routed.g, self.routed.c, self.routed.slots, router.centroids]
            tensors += [] if router.table is None else [router.table]
        return tensors

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors on the device."""
        return sum(t.nbytes for t in self.tensors())

    @cached_property
    def max_rank(self) -> int:
        return max((u.shape[0] for u, _ in self.factors.values()), default=0)

    @cached_property
    def shape(self) -> tuple[object, ...]:
        """Adapters of one shape take the same kernels."""
        parts = self.routed.parts if self.routed else None
        routed = (parts.k, parts.t, parts.rank, parts.table is None) if parts else None
        return frozenset(site for _, site in self.sites), self.max_rank, routed

    @cached_property
    def sites(self) -> frozenset[tuple[int, int]]:
        """(layer, site) of every linear that it adapts."""
        return frozenset((at.layer, at.site) for at in self.factors)


@dataclass(frozen=True, eq=False)
class ActiveSet:
    """The adapters of a batch: `index` is what the sites' tables know each by."""

    folded: dict[AdapterKey, FoldedAdapter]
    index: dict[AdapterKey, int]
    num_adapters: int
    """No index is as large."""
    sites: Mapping[tuple[int, int], DeltaSite]
    arch: Architecture
    core_rank: int
    """Side of the largest core; 0 if none depends on a route."""
    max_rank: int
    """Of all factors."""
    layouts: dict[object, tuple[Segments, Plans]] = field(default_factory=dict)

    def layout(
        self, spans: Sequence[tuple[int, int, int]], core_rows: Sequence[int], num_rows: int, device: torch.device
    ) -> tuple[Segments, Plans]:
        """The metadata of a batch, kept while batches have the same members: it depends on nothing else."""
        key = num_rows, tuple(spans), tuple(core_rows)
        if key not in self.layouts:
            self.layouts.clear()
            self.layouts[key] = Segments.build(spans, num_rows, self.num_adapters, device, core_rows), {}
        return self.layouts[key]

    @staticmethod
    def stack(
        adapters: Sequence[FoldedAdapter], arch: Architecture, dtype: torch.dtype, device: torch.device
    ) -> "ActiveSet":
        """For the reference kernels: every site's factors of all adapters in one tensor."""
        sites = {}
        for layer, s in sorted(set().union(*(a.sites for a in adapters))):
            site = arch.sites[s]
            pairs = [[a.factors.get(Where(layer, s, j)) for j in range(len(site.targets))] for a in adapters]
            sites[layer, s] = DeltaSite.build(
                [[p[0] if p else None for p in row] for row in pairs],
                [[p[1] if p else None for p in row] for row in pairs],
                site.columns,
                site.d_in,
                dtype,
                device,
                pool=True,
            )
        index = {a.key: i for i, a in enumerate(adapters)}
        return _active(adapters, index, len(adapters), sites, arch)


def _active(
    adapters: Sequence[FoldedAdapter],
    index: dict[AdapterKey, int],
    num_adapters: int,
    sites: Mapping[tuple[int, int], DeltaSite],
    arch: Architecture,
) -> ActiveSet:
    return ActiveSet(
        folded={a.key: a for a in adapters},
        index=index,
        num_adapters=num_adapters,
        sites=sites,
        arch=arch,
        core_rank=max((a.routed.parts.rank for a in adapters if a.routed), default=0),
        max_rank=max(a.max_rank for a in adapters),
    )


class SlotTable:
    """For the fused kernels: where the factors of every loaded adapter lie. An adapter has a slot while it is loaded,
    and its addresses and ranks stand in that slot's row of every site's table, at fixed places on the device: a batch
    needs nothing but the slots of its rows, and adapters that no row uses cost nothing.
    """

    def __init__(self, arch: Architecture, capacity: int, dtype: torch.dtype, device: torch.device):
        self.arch = arch
        self.capacity = capacity
        self.dtype, self.device = dtype, device
        self.free = list(range(capacity))[::-1]
        self.slot: dict[AdapterKey, int] = {}
        count = arch.num_linears
        self._u, self._e = (torch.zeros(capacity * count, dtype=torch.int64, device=device) for _ in "ue")
        self._rank = torch.zeros(capacity * count, dtype=torch.int32, device=device)
        self.sites: dict[tuple[int, int], DeltaSite] = {}
        home: list[int] = []
        step: list[int] = []
        for layer in range(arch.num_layers):
            for s, site in enumerate(arch.sites):
                n = len(site.targets)
                begin = arch.first_linear(layer, s) * capacity
                own = slice(begin, begin + n * capacity)
                home += range(begin, begin + n)
                step += [n] * n
                self.sites[layer, s] = DeltaSite.by_address(
                    self._u[own].view(-1, n), self._e[own].view(-1, n), self._rank[own].view(-1, n), site.columns,
                    site.d_in, dtype,
                )  # fmt: skip
        self._home, self._step = place([torch.tensor(home), torch.tensor(step)], device)

    def add(self, folded: FoldedAdapter) -> None:
        """Gives an adapter a slot. Raises ValueError if the kernels cannot read its factors through their addresses."""
        arch = self.arch
        u, e, rank = ([0] * arch.num_linears for _ in range(3))
        for at, (shrink, expand) in folded.factors.items():
            i = arch.first_linear(at.layer, at.site) + at.target
            site = self.sites[at.layer, at.site]
            check_factor(shrink, len(shrink), site.d_in, site.dtype)
            check_factor(expand, len(shrink), arch.sites[at.site].widths[at.target], site.dtype)
            u[i], e[i], rank[i] = shrink.data_ptr(), expand.data_ptr(), len(shrink)
        self.slot[folded.key] = self.free.pop()
        self._write(self.slot[folded.key], u, e, rank)

    def remove(self, key: AdapterKey) -> None:
        slot = self.slot.pop(key)
        self._write(slot, *([0] * self.arch.num_linears for _ in range(3)))
        self.free.append(slot)

    def _write(self, slot: int, u: list[int], e: list[int], rank: list[int]) -> None:
        at = self._home + slot * self._step
        values = [torch.tensor(u), torch.tensor(e), torch.tensor(rank, dtype=torch.int32)]
        for table, own in zip((self._u, self._e, self._rank), place(values, at.device), strict=True):
            table.index_copy_(0, at, own)

    def active(self, adapters: Sequence[FoldedAdapter]) -> ActiveSet:
        """The adapters of a batch."""
        index = {a.key: self.slot[a.key] for a in adapters}
        sites = {at: self.sites[at] for at in set().union(*(a.sites for a in adapters))}
        return _active(adapters, index, self.capacity, sites, self.arch)
