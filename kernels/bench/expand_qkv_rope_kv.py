"""Delta, rotary and KV write: against the same pass without adapters."""

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
    shape, size = sweep.shape, sweep.dtype.itemsize
    d_in, widths = shape.sites["qkv"]
    moved = size * (min(rows, adapters) * rank * sum(widths) + rows * (2 * sum(widths) + shape.head + 3 * rank))

    def make(seed: int) -> dict[str, Call]:
        torch.manual_seed(seed)
        b = batch(rows, adapters, rank, d_in, widths, sweep.dtype, sweep.device)
        h = torch.randn(rows, 3, rank, device=sweep.device).to(sweep.dtype)
        angle = torch.rand(rows, 1, shape.head // 2, device=sweep.device)
        cos, sin = angle.cos().to(sweep.dtype), angle.sin().to(sweep.dtype)
        k, v = (torch.zeros(rows, shape.kv_heads, shape.head, dtype=sweep.dtype, device=sweep.device) for _ in "kv")
        slots = torch.randperm(rows, device=sweep.device)
        op = sweep.ops.expand_qkv_rope_kv
        return {
            "own": lambda: op(b.y, LowRank(h, b.site, b.plan), cos, sin, None, 1e-5, k, v, slots),
            "without delta": lambda: op(b.y, None, cos, sin, None, 1e-5, k, v, slots),
        }

    return Case("expand_qkv_rope_kv", {"rows": rows, "adapters": adapters, "rank": rank}, moved, make)
