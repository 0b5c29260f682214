"""Cores of one adapter's modules (k 4, t 2, p 2): once per segment and step."""

from collections.abc import Iterator

import torch

from tucka_runtime.kernels.bench.shapes import Measurement
from tucka_runtime.kernels.bench.timing import Call, Case
from tucka_runtime.kernels.tables.routes import CoreParts, RoutePlan

K, T, P = 4, 2, 2


def cases(sweep: Measurement) -> Iterator[Case]:
    """Every rank, for q and v and for all seven linears of every layer."""
    for rank in sweep.ranks:
        for per_layer in (2, 7):
            yield _case(sweep, rank, per_layer * sweep.shape.layers)


def _case(sweep: Measurement, rank: int, modules: int) -> Case:
    def make(seed: int) -> dict[str, Call]:
        torch.manual_seed(seed)
        slots = torch.arange(modules, device=sweep.device)
        c = torch.randn(modules, T, P, device=sweep.device)
        g = torch.randn(modules, K, P, rank, rank, device=sweep.device)
        plan = RoutePlan.build([CoreParts(c, g, slots, None)], [0], [None], [(1, [0.5] * T)], sweep.device)
        out = torch.zeros(1, modules, rank, rank, dtype=sweep.dtype, device=sweep.device)
        return {"own": lambda: sweep.ops.core(plan, out)}

    moved = modules * rank * rank * (P * 4 + sweep.dtype.itemsize)
    return Case("core", {"modules": modules, "rank": rank}, moved, make)
