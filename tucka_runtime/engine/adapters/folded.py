"""Adapters as they are served: folded factors, and what routed cores are made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from tucka_runtime.kernels.tables.routes import CoreParts
from tucka_runtime.messages import AdapterKey


@dataclass(frozen=True)
class Where:
    """A linear of the decoder: layer, site within it, target within that."""

    layer: int
    site: int
    target: int


@dataclass(frozen=True, eq=False)
class FoldedRouter:
    """Where an adapter is routed: centroids (k·t, d) fp32, and, where the router's input is a function of the token
    alone, their products with every token's input as a table (vocab, k·t) fp32. `prefix_tokens` tokens of a prompt
    route it under the scope "prefix"."""

    at: Where
    t: int
    centroids: Tensor
    table: Tensor | None
    prefix_tokens: int


@dataclass(frozen=True, eq=False)
class TuckACores:
    """What cores are made of: g (M, k, p, r, r) and c (M, t, p) of the M adapted linears, normalised; `linears` (M,)
    int64 are their numbers (Architecture.first_linear), by which a segment's cores are kept."""

    linears: Tensor
    g: Tensor
    c: Tensor
    router: FoldedRouter

    @cached_property
    def parts(self) -> CoreParts:
        return CoreParts(self.c, self.g, self.linears, self.router.table)


@dataclass(frozen=True, eq=False)
class FoldedAdapter:
    """An adapter in the serving form. `factors` has (U (r, d_in), E (r, d_out)) of each adapted linear, `affine` what
    it changes of the base's own product there, scale and offset (2, d_out) fp32, where it does; `routed` is None where
    the core is constant; `saved` replaces parameters of the base by name."""

    key: AdapterKey
    factors: Mapping[Where, tuple[Tensor, Tensor]]
    affine: Mapping[Where, Tensor]
    routed: TuckACores | None
    saved: Mapping[str, Tensor]

    def tensors(self) -> list[Tensor]:
        """All that it holds on the device."""
        tensors = [t for pair in self.factors.values() for t in pair]
        tensors += [*self.affine.values(), *self.saved.values()]
        if self.routed is not None:
            router = self.routed.router
            tensors += [self.routed.g, self.routed.c, self.routed.linears, router.centroids]
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
