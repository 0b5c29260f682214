"""Which segments are routed, from what, and where their cores go: the metadata of `route_ids`, `core` and `slices`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tucka_runtime.kernels.tables.transfer import place

# These are the columns of RoutePlan.records.
IDS, COUNT, TABLE, GROUPS, EXPERTS, C, G, LINEARS, MODULES, SLICES, RANK, CORE = range(12)
COLUMNS = 12


@dataclass(frozen=True, eq=False)
class CoreParts:
    """What routes and cores of one adapter are made of; M linears are adapted, of k groups of t experts each.

    c (M, t, p) and g (M, k, p, r, r) fp32, normalised; linears (M,) int64: the number of each among all of the
    model, by which a segment's cores are kept;
    table (vocab, k·t) fp32: the router's logits of every token, None where they are no function of the token alone.
    """

    c: Tensor
    g: Tensor
    linears: Tensor
    table: Tensor | None

    # These are asked for in every step, and a tensor takes half a microsecond to say how large it is.

    @cached_property
    def k(self) -> int:
        return self.g.shape[1]

    @cached_property
    def t(self) -> int:
        return self.c.shape[1]

    @cached_property
    def modules(self) -> int:
        return len(self.linears)

    @cached_property
    def rank(self) -> int:
        return self.g.shape[-1]

    @cached_property
    def record(self) -> tuple[int, ...]:
        """Columns TABLE to RANK. Raises ValueError where g cannot be read 16 bytes at a time from its address on."""
        if self.g.data_ptr() % 16 or not self.g.is_contiguous():
            raise ValueError("g must be contiguous and start at a multiple of 16 bytes")
        m, k, p, r, _ = self.g.shape
        table = 0 if self.table is None else self.table.data_ptr()
        return table, k, self.t, self.c.data_ptr(), self.g.data_ptr(), self.linears.data_ptr(), m, p, r


@dataclass(frozen=True)
class RouteLimits:
    """Limits that no segment exceeds: they size grids and blocks. `tokens` are those that a segment is routed by."""

    k: int
    t: int
    modules: int
    rank: int
    tokens: int


@dataclass(frozen=True, eq=False)
class RoutePlan:
    """S segments: `adapters` of each, `core_rows` that take its cores, `ids` (n,) int64 that route it (None: the route
    is known). These lie on the host and are empty in a graph's bucket; `records` says all of it on the device."""

    adapters: tuple[CoreParts, ...]
    core_rows: tuple[int, ...]
    ids: tuple[Tensor | None, ...]
    limits: RouteLimits
    records: Tensor
    """(S, 12) int64, by the names above; COUNT 0: the route is known."""
    groups: Tensor
    """(S,) int64. `route_ids` fills in what is not known."""
    weights: Tensor
    """(S, at least t) fp32."""

    @staticmethod
    def of_one(adapter: CoreParts, core_row: int, groups: Tensor, weights: Tensor) -> "RoutePlan":
        """The plan of one segment whose route is on the device: groups (1,), weights (1, t)."""
        limits = RouteLimits(adapter.k, adapter.t, adapter.modules, adapter.rank, tokens=0)
        records = place([torch.tensor([(0, 0, *adapter.record, core_row)], dtype=torch.int64)], groups.device)[0]
        return RoutePlan((adapter,), (core_row,), (None,), limits, records, groups, weights)

    @staticmethod
    def build(
        adapters: Sequence[CoreParts],
        core_rows: Sequence[int],
        ids: Sequence[Tensor | None],
        known: Sequence[tuple[int, Sequence[float]] | None],
        device: torch.device,
    ) -> "RoutePlan":
        """`known` has group and weights of the segments without `ids`."""
        counts = [0 if own is None else own.shape[0] for own in ids]
        limits = RouteLimits(
            k=max([a.k for a in adapters]),
            t=max([a.t for a in adapters]),
            modules=max([a.modules for a in adapters]),
            rank=max([a.rank for a in adapters]),
            tokens=max(counts),
        )
        weights = torch.zeros(len(adapters), limits.t)
        for s, route in enumerate(known):
            if route is not None:
                weights[s, : len(route[1])] = torch.tensor(route[1])
        records = [
            (0 if own is None else own.data_ptr(), count, *adapter.record, row)
            for adapter, row, own, count in zip(adapters, core_rows, ids, counts, strict=True)
        ]
        table, groups, weights = place(
            [
                torch.tensor(records, dtype=torch.int64),
                torch.tensor([route[0] if route is not None else 0 for route in known], dtype=torch.int64),
                weights,
            ],
            device,
        )
        return RoutePlan(tuple(adapters), tuple(core_rows), tuple(ids), limits, table, groups, weights)
