"""Cores of one adapter's modules (k 4, t 2, p 2): once per segment and step."""

from collections.abc import Iterator

import torch

from tucka_runtime.kernels.bench.shapes import Sweep
from tucka_runtime.kernels.bench.timing import Call, Case

K, T, P = 4, 2, 2


def cases(sweep: Sweep) -> Iterator[Case]:
    """Every rank, for q and v and for all seven linears of every layer."""
    for rank in sweep.ranks:
        for per_layer in (2, 7):
            yield _case(sweep, rank, per_layer * sweep.shape.layers)


def _case(sweep: Sweep, rank: int, modules: int) -> Case:
    def make(seed: int) -> dict[str, Call]:
        torch.manual_seed(seed)
        c = torch.randn(1, modules, T, P, device=sweep.device)
        g = torch.randn(1, modules, K, P, rank, rank, device=sweep.device)
        first, group = (torch.full((1,), i, device=sweep.device) for i in (0, 1))
        weights, places = torch.rand(1, T, device=sweep.device), torch.arange(modules, device=sweep.device)
        out = torch.zeros(1, modules, rank, rank, dtype=sweep.dtype, device=sweep.device)
        return {"own": lambda: sweep.ops.core.core(c, g, first, group, weights, places, first, out)}

    moved = modules * rank * rank * (P * 4 + sweep.dtype.itemsize)
    return Case("core", {"modules": modules, "rank": rank}, moved, make)
