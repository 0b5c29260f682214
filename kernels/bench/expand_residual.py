"""Delta, residual and norm: against the same pass without adapters."""

from collections.abc import Iterator

import torch

from tucka_runtime.kernels.bench.shapes import Measurement, batch
from tucka_runtime.kernels.bench.timing import Call, Case
from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.tables.segments import SMALL_BATCH


def cases(sweep: Measurement) -> Iterator[Case]:
    """Every (rows, adapters, rank) of the sweep."""
    for rows, adapters, rank in sweep.deltas:
        yield _case(sweep, rows, adapters, rank)


def _case(sweep: Measurement, rows: int, adapters: int, rank: int) -> Case:
    d, size = sweep.shape.d, sweep.dtype.itemsize
    moved = size * (min(rows, adapters) * rank * d + rows * (4 * d + rank))

    def make(seed: int) -> dict[str, Call]:
        torch.manual_seed(seed)
        b = batch(rows, adapters, rank, d, (d,), sweep.dtype, sweep.device)
        h = torch.randn(rows, 1, rank, device=sweep.device).to(sweep.dtype)
        weight = torch.ones(d, dtype=sweep.dtype, device=sweep.device)
        op = sweep.ops.expand_residual
        return {
            "own": lambda: op(b.y, LowRank(h, b.site, b.plan), b.x, weight, None, 1e-5),
            "without delta": lambda: op(b.y, None, b.x, weight, None, 1e-5),
        }

    return Case("expand_residual", {"rows": rows, "adapters": adapters, "rank": rank}, moved, make)


def variants(sweep: Measurement) -> Iterator[Case]:
    """Widths of a block of the sum, decoding on a GPU alone: what `fused.expand_residual` should say."""
    for rows, adapters, rank in sweep.deltas:
        if rows <= SMALL_BATCH:
            for block_n in (32, 64, 128):
                yield _variant(sweep, rows, adapters, rank, block_n)


def _variant(sweep: Measurement, rows: int, adapters: int, rank: int, block_n: int) -> Case:
    from tucka_runtime.kernels.fused.expand_residual import add

    case, d = _case(sweep, rows, adapters, rank), sweep.shape.d
    moved = case.moved - sweep.dtype.itemsize * rows * d  # less what the norm writes

    def make(seed: int) -> dict[str, Call]:
        torch.manual_seed(seed)
        b = batch(rows, adapters, rank, d, (d,), sweep.dtype, sweep.device)
        h = torch.randn(rows, 1, rank, device=sweep.device).to(sweep.dtype)
        return {"own": lambda: add(b.y, LowRank(h, b.site, b.plan), b.x, block_n)}

    return Case(case.op, {**case.shape, "block_n": block_n}, moved, make)
