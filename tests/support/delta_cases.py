"""Random batches of adapters for the delta kernels, and the float64 oracle they are held to."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.tables.segments import DeltaSite, Segments, SitePlan

# Relative L2 of the delta against float64.
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}

Layout = tuple[int, tuple[tuple[int, int], ...]]
"""Base rows, then (rows, adapter) of each segment."""


@dataclass(frozen=True)
class Case:
    """One site, one batch. `cores` (S, n, Rc, Rc) or None; adapters in `lora` have the identity there."""

    x: Tensor
    y: Tensor
    site: DeltaSite
    plan: SitePlan
    cores: Tensor | None

    def oracle(self, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """h (T, n, R), and what comes to y (T, columns[-1]; the case's own by default), in float64, straight from the
        equation, row by row."""
        y = (self.y if y is None else y).double()
        n, rank = len(self.site.columns) - 1, self.plan.max_rank
        x = self.x.double()
        h = x.new_zeros(len(x), n, rank)
        delta = x.new_zeros(len(x), self.site.columns[-1])
        for s, (first, end, a) in enumerate(self.plan.segments.spans):
            for j in range(n):
                u, e = self.site.u[a][j], self.site.e[a][j]
                if u is None or e is None:
                    continue
                r = len(u)
                core = torch.eye(r).to(x)
                if self.cores is not None and r <= self.cores.shape[-1]:
                    core = self.cores[s, j, :r, :r].double()
                own = x[first:end] @ u.double().T @ core
                h[first:end, j, :r] = own
                part = slice(self.site.columns[j], self.site.columns[j + 1])
                delta[first:end, part] = own @ e.double()
                if self.site.affine and (affine := self.site.affine[a][j]) is not None:
                    delta[first:end, part] += (affine[0].double() - 1) * y[first:end, part] + affine[1].double()
        return h, delta

    def adapted(self) -> Tensor:
        """(T, n, R) bool: the entries of h that belong to a row's own rank."""
        own = torch.zeros(len(self.x), len(self.site.columns) - 1, self.plan.max_rank, dtype=torch.bool)
        for first, end, a in self.plan.segments.spans:
            for j, r in enumerate(self.site.ranks[a]):
                own[first:end, j, :r] = True
        return own


def make(
    ranks: Sequence[Sequence[int]],
    layout: Layout,
    d_in: int = 40,
    widths: Sequence[int] = (48, 16),
    core_size: int | None = None,
    lora: Sequence[int] = (),
    affine: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """A batch for adapters of `ranks` (A, n), 0 where a target is absent; `core_size` None: no core tensor at all.
    Those in `affine` scale and offset the base's product too."""
    where = torch.get_default_device()
    gen = torch.Generator("cpu").manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, device="cpu").to(where, dtype)

    u = [[randn(r, d_in) / d_in**0.5 if r else None for r in row] for row in ranks]
    e = [[randn(r, w) / r**0.5 if r else None for r, w in zip(row, widths, strict=True)] for row in ranks]
    columns = [0]
    for w in widths:
        columns.append(columns[-1] + w)
    changes = [
        [randn(2, w).float() if r and a in affine else None for r, w in zip(row, widths, strict=True)]
        for a, row in enumerate(ranks)
    ]
    site = DeltaSite.build(u, e, columns, d_in, dtype, where, pool=True, affine=changes)
    base, parts = layout
    spans, row = [], base
    for count, adapter in parts:
        spans.append((row, row + count, adapter))
        row += count
    segments = Segments.build(spans, row, len(ranks), where)
    plan = SitePlan.build(segments, site)
    cores = None
    if core_size is not None:
        cores = torch.empty(len(parts), len(widths), core_size, core_size, dtype=dtype)
        for s, (_, adapter) in enumerate(parts):
            for j in range(len(widths)):
                cores[s, j] = torch.eye(core_size)
                r = ranks[adapter][j]
                if adapter not in lora and r <= core_size:
                    cores[s, j, :r, :r] = randn(r, r) / r**0.5
    return Case(randn(row, d_in), randn(row, columns[-1]), site, plan, cores)


def relative(got: Tensor, want: Tensor) -> float:
    """Relative L2 distance; both zero counts as equal, NaN never does."""
    got, want = got.double().cpu(), want.double().cpu()
    assert not torch.isnan(got).any()
    size = want.norm()
    return float((got - want).norm() / size) if size else float(got.norm())


class Mix(NamedTuple):
    """A batch: the adapters' ranks per target, those that are LoRAs, those that change the base's product too."""

    ranks: list[list[int]]
    layout: Layout
    core_size: int | None
    lora: tuple[int, ...] = ()
    affine: tuple[int, ...] = ()

    def make(self, ranks: list[list[int]] | None = None, **options: Any) -> Case:
        """The batch, of other ranks where those are given."""
        own = self._asdict() | ({} if ranks is None else {"ranks": ranks})
        return make(**(own | options))


MIXES: dict[str, Mix] = {
    "base-only-but-loaded": Mix([[8, 8]], (5, ()), 8),
    "all-one": Mix([[8, 8]], (0, ((7, 0),)), 8),
    "one-segment-over-a-tile": Mix([[4, 4]], (0, ((19, 0),)), 4),
    "all-distinct": Mix([[8, 8], [16, 16], [4, 4], [24, 24]], (0, ((1, 0), (1, 1), (1, 2), (1, 3))), 24),
    "half-base": Mix([[8, 8], [16, 16]], (4, ((2, 0), (2, 1))), 16),
    "unused-adapters": Mix([[8, 8], [16, 16], [4, 4]], (1, ((3, 1),)), 16),
    "absent-targets": Mix([[8, 0], [0, 16], [4, 4], [0, 0]], (2, ((2, 0), (2, 1), (1, 2), (2, 3))), 16),
    "one-adapter-twice": Mix([[8, 8], [4, 4]], (1, ((2, 0), (3, 0), (1, 1))), 8),
    "members-of-a-bank": Mix([[8, 6], [20, 0]], (3, ((5, 0), (5, 0), (9, 0), (1, 1), (2, 1))), 20),
    "every-rank": Mix(
        [[4, 4], [8, 8], [16, 16], [24, 24], [64, 64], [128, 128]],
        (1, ((1, 0), (2, 1), (1, 2), (3, 3), (1, 4), (2, 5))),
        128,
    ),
    "lora-no-core": Mix([[8, 8], [16, 16]], (1, ((2, 0), (1, 1))), None, (0, 1)),
    "lora-larger-than-core": Mix([[8, 8], [64, 64]], (1, ((2, 0), (3, 1))), 8, (1,)),
    "lora-smaller-than-core": Mix([[24, 24], [4, 4]], (1, ((2, 0), (3, 1))), 24, (1,)),
    "odd-ranks": Mix([[6, 3], [17, 1]], (1, ((2, 0), (3, 1))), 17),
    "scaled": Mix(
        [[8, 4], [16, 0], [0, 5], [4, 4]], (2, ((3, 0), (17, 1), (1, 2), (2, 3), (1, 0))), 16, (0, 1, 2), (0, 1, 2)
    ),
    "scaled-alone": Mix([[5, 3]], (1, ((4, 0),)), None, (0,), (0,)),
}


def mix(name: str, **options: Any) -> Case:
    """The batch of that name out of MIXES."""
    return MIXES[name].make(**options)


def retiled(plan: SitePlan, tile_rows: int) -> SitePlan:
    """The same batch in tiles of another height, which no two segments share, and some empty ones."""
    rows = [
        [i, min(i + tile_rows, end), s, a]
        for begin, end, s, a in [
            (0, plan.segments.spans[0][0], -1, -1),
            *((f, e, s, a) for s, (f, e, a) in enumerate(plan.segments.spans)),
        ]
        for i in range(begin, end, tile_rows)
    ]
    tiles = torch.tensor([*rows, [0, 0, -1, -1]], dtype=torch.int32)
    return dataclasses.replace(plan, segments=dataclasses.replace(plan.segments, tiles=tiles, tile_rows=tile_rows))


def surrounded(name: str, **options: object) -> Case:
    """The batch of that name with its factors, rows and cores cut out of buffers of NaN."""

    def embed(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        room = torch.full((t.numel() + 512,), torch.nan, dtype=t.dtype)
        room[256 : 256 + t.numel()] = t.flatten()
        return room[256 : 256 + t.numel()].view(t.shape)

    case = mix(name, **options)
    site = case.site
    u, e = ([[embed(t) for t in row] for row in table] for table in (site.u, site.e))
    affine = [[embed(t) for t in row] for row in site.affine]
    built = type(site).build(
        u, e, site.columns, case.x.shape[1], case.x.dtype, case.x.device, pool=False, affine=affine
    )
    wide = torch.full((len(case.x), case.x.shape[1] + 24), torch.nan)
    wide[:, : case.x.shape[1]] = case.x
    cores = None
    if case.cores is not None:
        size = case.cores.shape[-1]
        cores = torch.full((case.cores.shape[0], case.cores.shape[1] + 3, size, size), torch.nan)[:, 1:-2]
        for s, (_, _, a) in enumerate(case.plan.segments.spans):
            for j, r in enumerate(site.ranks[a]):
                cores[s, j, :r, :r] = case.cores[s, j, :r, :r]
    return dataclasses.replace(case, site=built, x=wide[:, : case.x.shape[1]], cores=cores)


def check_delta(
    case: Case, limit: float, shrink: Callable[..., LowRank], expand: Callable[[Tensor, LowRank], Tensor]
) -> None:
    """Shrink and expand of a backend by address against float64."""
    h_true, delta_true = case.oracle()
    low_rank = shrink(case.x, case.site, case.cores, case.plan)
    own = case.adapted()
    assert relative(low_rank.h[own], h_true[own]) <= limit
    # From exactly the factors' product on: on zeros the delta itself is seen, on y that nothing else is touched.
    zeros = torch.zeros_like(case.y)
    assert relative(expand(zeros.clone(), low_rank), case.oracle(zeros)[1]) <= limit
    y = expand(case.y.clone(), low_rank)
    assert relative(y, case.y.double() + delta_true) <= limit
    untouched = delta_true == 0
    assert torch.equal(y[untouched], case.y[untouched])


Parts = tuple[Tensor, LowRank | None]


def parts(
    name: str | None, widths: tuple[int, ...], dtype: torch.dtype, shrink: Callable[..., LowRank]
) -> tuple[Parts, Parts]:
    """y and the low-rank half of a mix (None: no adapter) for a fused op, and the same in float64 for the reference."""
    if name is None:
        y = torch.randn(19, sum(widths)).to(dtype)
        return (y, None), (y.double(), None)
    shaped = [[row[min(j, 1)] for j in range(len(widths))] for row in MIXES[name].ranks]
    case = MIXES[name].make(shaped, widths=widths, dtype=dtype)
    low_rank = shrink(case.x, case.site, case.cores, case.plan)
    _, delta = case.oracle()
    return (case.y, low_rank), (case.y.double() + delta, None)
