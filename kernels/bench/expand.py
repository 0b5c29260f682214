"""Expand alone, as it stands where nothing can be fused with it; beside it torch's gather-bmm."""

from collections.abc import Iterator
from itertools import product

import torch

from tucka_runtime.kernels.bench.shapes import Measurement, batch
from tucka_runtime.kernels.bench.timing import Call, Case
from tucka_runtime.kernels.ops import LowRank


def cases(sweep: Measurement) -> Iterator[Case]:
    """Every (rows, adapters, rank) of the sweep at every site."""
    for site, (d_in, widths) in sweep.shape.sites.items():
        for rows, adapters, rank in sweep.deltas:
            yield _case(sweep, site, d_in, widths, rows, adapters, rank)


def _case(
    sweep: Measurement, site: str, d_in: int, widths: tuple[int, ...], rows: int, adapters: int, rank: int
) -> Case:
    used, n, size = min(rows, adapters), len(widths), sweep.dtype.itemsize
    moved = size * (used * rank * sum(widths) + rows * (2 * sum(widths) + n * rank))

    def make(seed: int) -> dict[str, Call]:
        torch.manual_seed(seed)
        b = batch(rows, adapters, rank, d_in, widths, sweep.dtype, sweep.device)
        h = torch.randn(rows, n, rank, device=sweep.device).to(sweep.dtype)
        calls: dict[str, Call] = {"own": lambda: sweep.ops.expand(b.y, LowRank(h, b.site, b.plan))}
        if rows <= sweep.bmm_rows:
            e = [torch.stack([part for row in b.site.e if (part := row[j]) is not None]) for j in range(n)]
            adapter = b.plan.segments.adapter

            def gather_bmm() -> torch.Tensor:
                parts = [torch.bmm(h[:, j : j + 1], e[j].index_select(0, adapter)).squeeze(1) for j in range(n)]
                return b.y.add_(torch.cat(parts, dim=1))

            calls["gather-bmm"] = gather_bmm
        return calls

    return Case("expand", {"site": site, "rows": rows, "adapters": adapters, "rank": rank}, moved, make)


def variants(sweep: Measurement) -> Iterator[Case]:
    """Widths of a block for prompts, on a GPU alone: what `fused.expand.BLOCK_N` should be."""
    for rows, rank in product(sweep.prompts, sweep.ranks):
        for block_n in (32, 64, 128, 256):
            yield _variant(sweep, rows, 1, rank, block_n)


def _variant(sweep: Measurement, rows: int, adapters: int, rank: int, block_n: int) -> Case:
    from tucka_runtime.kernels.fused.expand import run

    d_in, widths = sweep.shape.sites["gate_up"]
    case = _case(sweep, "gate_up", d_in, widths, rows, adapters, rank)

    def make(seed: int) -> dict[str, Call]:
        torch.manual_seed(seed)
        b = batch(rows, adapters, rank, d_in, widths, sweep.dtype, sweep.device)
        h = torch.randn(rows, len(widths), rank, device=sweep.device).to(sweep.dtype)
        return {"own": lambda: run(b.y, LowRank(h, b.site, b.plan), block_n)}

    return Case(case.op, {**case.shape, "block_n": block_n}, case.moved, make)
