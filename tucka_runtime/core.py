"""Adapters as they are served: folded factors, what routed cores are made of, and both stacked for a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tucka_runtime.kernels.segments import DeltaSite, Segments, SitePlan
from tucka_runtime.models.architecture import Site
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

    def tensors(self) -> list[Tensor]:
        """All that it holds on the device."""
        tensors = [t for pair in self.factors.values() for t in pair] + list(self.saved.values())
        if self.routed is not None:
            router = self.routed.router
            tensors += [self.routed.g, self.routed.c, router.centroids]
            tensors += [] if router.table is None else [router.table]
        return tensors

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors on the device."""
        return sum(t.nbytes for t in self.tensors())


@dataclass(frozen=True, eq=False)
class CoreBank:
    """The routed adapters of a batch that share a shape and places, stacked: c (A, M, t, p), g (A, M, k, p, r, r);
    `modules` (M,) are the rows of their cores."""

    c: Tensor
    g: Tensor
    modules: Tensor


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
    banks: tuple[CoreBank, ...]
    member: tuple[tuple[int, int] | None, ...]
    """Per adapter its bank and place therein; None where its core is constant."""
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
        alike: dict[tuple[object, ...], list[int]] = {}
        for i, r in enumerate(routed):
            if r is not None:
                alike.setdefault((r.g.shape, r.c.shape, tuple(r.places)), []).append(i)
        banks: list[CoreBank] = []
        member: list[tuple[int, int] | None] = [None] * len(adapters)
        for indices in alike.values():
            own = [r for i in indices if (r := routed[i]) is not None]
            rows = torch.tensor([slots[at.layer, at.site] + at.target for at in own[0].places]).to(device)
            for place, i in enumerate(indices):
                member[i] = len(banks), place
            banks.append(CoreBank(torch.stack([r.c for r in own]), torch.stack([r.g for r in own]), rows))
        return ActiveSet(
            adapters=tuple(adapters),
            index={a.key: i for i, a in enumerate(adapters)},
            sites=stacked,
            slots=slots,
            num_slots=num_slots,
            core_rank=max((r.g.shape[-1] for r in routed if r), default=0),
            banks=tuple(banks),
            member=tuple(member),
        )
