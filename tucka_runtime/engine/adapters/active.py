"""The adapters of one batch, by what the tables of the sites know each by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tucka_runtime.engine.adapters.folded import FoldedAdapter, Where
from tucka_runtime.kernels.tables.segments import DeltaSite, Segments, SitePlan
from tucka_runtime.messages import AdapterKey
from tucka_runtime.models.architecture import Architecture

# Site plans are kept by the ranks and d_in of their site: sites that agree in both share one.
Plans = dict[tuple[tuple[tuple[int, ...], ...], int], SitePlan]


@dataclass(frozen=True, eq=False)
class ActiveSet:
    """The adapters of a batch: `index` is what the sites' tables know each by."""

    folded: dict[AdapterKey, FoldedAdapter]
    index: dict[AdapterKey, int]
    num_adapters: int
    """Every index is smaller than this."""
    sites: Mapping[tuple[int, int], DeltaSite]
    arch: Architecture
    core_rank: int
    """Side of the largest core; 0 if none depends on a route or a member."""
    max_rank: int
    """The largest rank of all factors."""
    in_deltas: bool
    """Whether deltas are all that any of them brings."""
    layouts: dict[object, tuple[Segments, Plans]] = field(default_factory=dict)
    """The last layout, by what it was made of."""

    def layout(
        self, spans: Sequence[tuple[int, int, int]], core_rows: Sequence[int], num_rows: int, device: torch.device
    ) -> tuple[Segments, Plans]:
        """The metadata of a batch, kept while every batch has the same rows in the same segments."""
        key = num_rows, tuple(spans), tuple(core_rows)
        if key not in self.layouts:
            self.layouts.clear()
            self.layouts[key] = Segments.build(spans, num_rows, self.num_adapters, device, core_rows), {}
        return self.layouts[key]

    @staticmethod
    def stack(
        adapters: Sequence[FoldedAdapter], arch: Architecture, dtype: torch.dtype, device: torch.device
    ) -> "ActiveSet":
        """Stacks, for the reference kernels, every site's factors of all adapters in one tensor."""
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
                affine=[[a.affine.get(Where(layer, s, j)) for j in range(len(site.targets))] for a in adapters],
            )
        index = {a.key: i for i, a in enumerate(adapters)}
        return active_set(adapters, index, len(adapters), sites, arch)


def active_set(
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
        core_rank=max(a.core_rank for a in adapters),
        max_rank=max(a.max_rank for a in adapters),
        in_deltas=all(a.in_deltas for a in adapters),
    )
