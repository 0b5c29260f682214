"""Delta, residual and norm: against the same pass without adapters."""

from collections.abc import Iterator

import torch

from tucka_runtime.kernels.bench.shapes import Measurement, batch
from tucka_runtime.kernels.bench.timing import Call, Case
from tucka_runtime.kernels.ops import LowRank


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
