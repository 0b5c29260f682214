"""Who is where in a batch: the metadata that every delta kernel reads. It depends on membership only, never on values.

Rows of a batch are ordered: base rows first, then one contiguous run of rows per *segment*. A segment is a set of rows
that share an adapter and a route.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from tucka_runtime.kernels.tables.transfer import place

# The reference multiplies a batch of several segments with all adapters' rank rows at once, foreign ones masked out,
# while that wastes less than the Python of going by segment: while rows * rank rows * d_in is at most this for each
# segment and target. Measured on one core, fp32, 8 segments of q and v, r 16: d 512, 8 rows 97 against 211 us a site;
# d 512, 32 rows 236 against 250; d 2048, 8 rows 351 against 264; d 4096, 8 rows 1091 against 326.
DENSE_WORK = 200_000

# The fused kernels work on tiles: up to this many rows of one adapter, or of the base. 16 is the least that a tensor
# core takes and all that most decoding batches have; long ones take 64, so that factors are read once per 64 rows.
# Unmeasured: chosen from the bytes (kernels/README.md).
SMALL_TILE, LARGE_TILE, SMALL_BATCH = 16, 64, 256


def power_of_2(n: int) -> int:
    """The least one that is not under n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True, eq=False)
class DeltaSite:
    """The folded low-rank factors of the active adapters at one site: a set of n linears that share their input.

    `u[a][j]` (r, d_in) and `e[a][j]` (r, d_out_j) are adapter a's factors at target j, or None where it does not adapt
    it; y_j += ((x Uᵀ) M) E. `affine[a][j]` (2, d_out_j) fp32 is what some adapters change of the base's own product
    before that, y_j = affine[0] ⊙ y_j + affine[1]: DoRA's scale of every column, a bias. `columns` (n + 1) are the
    borders of the targets in the packed output. From `u` to `e_all` they are the reference's, and empty in a site by
    address; the tensors behind them are for backends by address.
    """

    columns: tuple[int, ...]
    d_in: int
    dtype: torch.dtype
    """The type of all factors."""
    u: tuple[tuple[Tensor | None, ...], ...]
    e: tuple[tuple[Tensor | None, ...], ...]
    affine: tuple[tuple[Tensor | None, ...], ...]
    """Empty where `affine_ptr` is None."""
    ranks: tuple[tuple[int, ...], ...]
    u_all: Tensor
    """(P + 1, d_in): every target's rank rows, target-major, then one zero row that absent ranks point to."""
    e_all: tuple[Tensor | None, ...]
    """Per target (P_j, d_out_j)."""
    u_ptr: Tensor
    """(A, n) int64 addresses of `u`, 0 where absent; the fused kernels read these."""
    e_ptr: Tensor
    affine_ptr: Tensor | None
    """(A, n) int64 addresses of `affine`, 0 where the base's product stays as it is; None where all of them stay."""
    rank: Tensor
    """(A, n) int32."""
    borders: Tensor
    """(n + 1,) int32: `columns` on the device."""

    @staticmethod
    def build(
        u: Sequence[Sequence[Tensor | None]],
        e: Sequence[Sequence[Tensor | None]],
        columns: Sequence[int],
        d_in: int,
        dtype: torch.dtype,
        device: torch.device,
        pool: bool,
        affine: Sequence[Sequence[Tensor | None]] = (),
    ) -> "DeltaSite":
        """Collects the factors of A adapters at one site, and `affine` where any has one. `pool` also stacks the
        factors, which only the reference reads.

        Raises ValueError where a factor cannot be read through its address: its shape or type is another, it is not
        contiguous, or, on a GPU, does not start at a multiple of 16 bytes, which the kernels' wide loads need.
        """
        n = len(columns) - 1
        ranks = tuple(tuple(0 if w is None else w.shape[0] for w in row) for row in u)
        u_all, e_all = torch.empty(0, dtype=dtype, device=device), tuple[Tensor | None, ...]()
        if pool:
            rows = [row[j] for j in range(n) for row in u]
            zero = torch.zeros(1, d_in, dtype=dtype, device=device)
            u_all = torch.cat([w for w in rows if w is not None] + [zero])
            stacks = [[w for row in e if (w := row[j]) is not None] for j in range(n)]
            e_all = tuple(torch.cat(s) if s else None for s in stacks)

        affine = affine if any(own is not None for row in affine for own in row) else ()
        for w, r, width in [
            *((w, r, d_in) for row, own in zip(u, ranks, strict=True) for w, r in zip(row, own, strict=True)),
            *(
                (w, r, end - begin)
                for row, own in zip(e, ranks, strict=True)
                for w, r, (begin, end) in zip(row, own, pairwise(columns), strict=True)
            ),
        ]:
            check_factor(w, r, width, dtype)
        for row in affine:
            for own, (begin, end) in zip(row, pairwise(columns), strict=True):
                check_affine(own, end - begin)

        def address(table: Sequence[Sequence[Tensor | None]]) -> Tensor:
            values = [[0 if w is None else w.data_ptr() for w in row] for row in table]
            return torch.tensor(values, dtype=torch.int64).view(-1, n).to(device)

        return DeltaSite(
            u=tuple(map(tuple, u)),
            e=tuple(map(tuple, e)),
            affine=tuple(map(tuple, affine)),
            columns=tuple(columns),
            ranks=ranks,
            u_all=u_all,
            e_all=e_all,
            u_ptr=address(u),
            e_ptr=address(e),
            affine_ptr=address(affine) if affine else None,
            rank=torch.tensor(ranks, dtype=torch.int32).view(-1, n).to(device),
            borders=torch.tensor(columns, dtype=torch.int32).to(device),
            d_in=d_in,
            dtype=dtype,
        )

    @staticmethod
    def by_address(
        u_ptr: Tensor,
        e_ptr: Tensor,
        affine_ptr: Tensor | None,
        rank: Tensor,
        columns: Sequence[int],
        d_in: int,
        dtype: torch.dtype,
    ) -> "DeltaSite":
        """A site, for the fused kernels, of tables (A, n) that the caller fills in, and changes, at their places."""
        borders = torch.tensor(columns, dtype=torch.int32).to(rank.device)
        empty = torch.empty(0, dtype=dtype, device=rank.device)
        return DeltaSite(
            tuple(columns), d_in, dtype, (), (), (), (), empty, (), u_ptr, e_ptr, affine_ptr, rank, borders
        )


def check_factor(w: Tensor | None, rank: int, width: int, dtype: torch.dtype) -> None:
    """Raises ValueError where a factor (rank, width) cannot be read through its address."""
    shape = (0, width) if w is None else tuple(w.shape)
    if shape != (rank, width):
        raise ValueError(f"a factor must be {(rank, width)}, not {shape}")
    if w is not None and (w.dtype != dtype or not w.is_contiguous() or (w.is_cuda and w.data_ptr() % 16)):
        raise ValueError(f"a factor must be {dtype}, contiguous, and start at a multiple of 16 bytes")


def check_affine(own: Tensor | None, width: int) -> None:
    """Raises ValueError where what an adapter does to the base's product cannot be read through its address."""
    if own is not None and (own.shape != (2, width) or own.dtype != torch.float32 or not own.is_contiguous()):
        raise ValueError(f"a scale and an offset must be {(2, width)}, in fp32 and contiguous")


def adapter_runs(spans: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """(first row, end row, adapter) of the rows that share an adapter, out of contiguous segments that may have other
    cores each."""
    runs: list[tuple[int, int, int]] = []
    for first, end, adapter in spans:
        if runs and runs[-1][2] == adapter:
            first = runs.pop()[0]
        runs.append((first, end, adapter))
    return runs


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of one batch. `spans` has (first row, end row, adapter index) of each, ascending, on the host, and
    is empty in a graph's bucket, whose `tiles` say the same."""

    spans: tuple[tuple[int, int, int], ...]
    num_rows: int
    num_adapters: int
    core_rows: tuple[int, ...]
    """The core that each segment takes; segments whose core is constant may share an identity."""
    tile_rows: int
    tiles: Tensor
    """(N, 4) int32, first row, end row, first row's core and adapter of each tile; -1, -1 for the base's. Those of no
    rows, which fill up a table of fixed size, come last. Segments of one adapter that lie side by side, as a bank's
    members do, share tiles: its factors are read once for them all."""
    row_cores: Tensor
    """(T,) int32: the core of each row, -1 of the base's."""
    padded: bool
    """This tells whether the table may have tiles of no rows."""

    @staticmethod
    def build(
        spans: Sequence[tuple[int, int, int]],
        num_rows: int,
        num_adapters: int,
        device: torch.device,
        core_rows: Sequence[int] | None = None,
        num_tiles: int | None = None,
    ) -> "Segments":
        """`core_rows` None: a core for each segment. `num_tiles` fills `tiles` up to a fixed number with empty ones,
        for a grid that a CUDA graph can hold: `num_rows` of them suffice for any membership. Rows after the last
        segment, which fill up such a graph's batch, are the base's.

        Raises ValueError if the spans are not ascending and contiguous.
        """
        first, last = (spans[0][0], spans[-1][1]) if spans else (num_rows, num_rows)
        if [a for a, _, _ in spans[1:]] != [b for _, b, _ in spans[:-1]] or last > num_rows:
            raise ValueError("segments must be contiguous and within the batch")
        core_rows = range(len(spans)) if core_rows is None else core_rows
        tile_rows = SMALL_TILE if num_rows <= SMALL_BATCH else LARGE_TILE
        row_cores = [-1] * num_rows
        for (begin, end, _), core in zip(spans, core_rows, strict=True):
            row_cores[begin:end] = [core] * (end - begin)
        tiles = [
            [i, min(i + tile_rows, end), row_cores[i], adapter]
            for begin, end, adapter in [(0, first, -1), *adapter_runs(spans), (last, num_rows, -1)]
            for i in range(begin, end, tile_rows)
        ]
        if num_tiles is not None:
            if len(tiles) > num_tiles:
                raise ValueError(f"{len(tiles)} tiles are needed, but only {num_tiles} are there")
            tiles += [[0, 0, -1, -1]] * (num_tiles - len(tiles))
        tables = [
            torch.tensor(tiles, dtype=torch.int32).view(-1, 4),
            torch.tensor(row_cores, dtype=torch.int32),
        ]
        placed, placed_cores = place(tables, device)
        return Segments(
            spans=tuple(spans),
            num_rows=num_rows,
            num_adapters=num_adapters,
            core_rows=tuple(core_rows),
            tile_rows=tile_rows,
            tiles=placed,
            row_cores=placed_cores,
            padded=num_tiles is not None,
        )

    @cached_property
    def core(self) -> Tensor:
        """(T,) int64: the core of each row, the first for base rows (their columns are masked). For the reference."""
        return self._by_row(self.core_rows, 0)

    @cached_property
    def adapter(self) -> Tensor:
        """(T,) int64: the adapter of each row, A (one past the last) for base rows. For the reference."""
        return self._by_row([a for _, _, a in self.spans], self.num_adapters)

    def _by_row(self, values: Sequence[int], base: int) -> Tensor:
        rows = [base] * self.num_rows
        for value, (first, end, _) in zip(values, self.spans, strict=True):
            rows[first:end] = [value] * (end - first)
        return torch.tensor(rows, dtype=torch.int64).to(self.tiles.device)


@dataclass(frozen=True, eq=False)
class SitePlan:
    """How one batch's rows meet one site's rank rows. Sites with equal `ranks` and d_in share it."""

    segments: Segments
    ranks: tuple[tuple[int, ...], ...]
    max_rank: int
    dense: bool
    """This tells whether the reference takes all adapters' rank rows at once (`gather`) or goes by segment."""
    stops: tuple[int, ...]
    """(n + 1) borders of the targets among the P rank rows."""

    @staticmethod
    def build(segments: Segments, site: DeltaSite, max_rank: int | None = None) -> "SitePlan":
        """`max_rank` is the width of h, the largest rank by default; a larger one fits adapters yet to come."""
        ranks = site.ranks
        if not ranks:
            if max_rank is None:
                raise ValueError("a site by address knows no ranks: max_rank is needed")
            return SitePlan(segments, ranks, max_rank, False, ())
        stops = [0]
        for j in range(len(ranks[0])):
            stops.append(stops[-1] + sum(r[j] for r in ranks))
        count = len(segments.spans)
        work = segments.num_rows * site.u_all.numel()
        dense = count > 1 and 0 < work <= DENSE_WORK * count * len(ranks[0])
        return SitePlan(segments, ranks, max_rank or max(max(r) for r in ranks), dense, tuple(stops))

    @cached_property
    def gather(self) -> Tensor | None:
        """(T, n·R) int64 columns of x @ u_allᵀ that are the row's own, P where it has none; None: go by segment."""
        if not self.dense:
            return None
        pad = self.stops[-1]
        table = []
        begin = list(self.stops[:-1])
        for row in self.ranks:
            columns = []
            for j, r in enumerate(row):
                columns += [*range(begin[j], begin[j] + r)] + [pad] * (self.max_rank - r)
                begin[j] += r
            table.append(columns)
        table.append([pad] * (len(begin) * self.max_rank))
        adapter = self.segments.adapter
        return torch.tensor(table, dtype=torch.int64).to(adapter.device).index_select(0, adapter)
