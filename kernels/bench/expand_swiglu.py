"""Delta of gate and up, and SwiGLU: against the same pass without adapters."""

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
    f, size = sweep.shape.f, sweep.dtype.itemsize
    moved = size * (min(rows, adapters) * rank * 2 * f + rows * (3 * f + 2 * rank))

    def make(seed: int) -> dict[str, Call]:
        torch.manual_seed(seed)
        b = batch(rows, adapters, rank, sweep.shape.d, (f, f), sweep.dtype, sweep.device)
        h = torch.randn(rows, 2, rank, device=sweep.device).to(sweep.dtype)
        op = sweep.ops.expand_swiglu
        return {
            "own": lambda: op(b.y, LowRank(h, b.site, b.plan)),
            "without delta": lambda: op(b.y, None),
        }

    return Case("expand_swiglu", {"rows": rows, "adapters": adapters, "rank": rank}, moved, make)
