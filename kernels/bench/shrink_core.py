"""Shrink with core: bytes of U, x, cores and h; beside it torch's gather-bmm."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING

import torch

from tucka_runtime.kernels.bench.shapes import Measurement, SiteBatch, batch, stacked
from tucka_runtime.kernels.bench.timing import Call, Case

if TYPE_CHECKING:
    from tucka_runtime.kernels.fused.shrink_core import Config


def cases(sweep: Measurement) -> Iterator[Case]:
    """Every (rows, adapters, rank) of the sweep at every site."""
    for site, (d_in, widths) in sweep.shape.sites.items():
        for rows, adapters, rank in sweep.deltas:
            yield _case(sweep, site, d_in, widths, rows, adapters, rank)


def _case(
    sweep: Measurement, site: str, d_in: int, widths: tuple[int, ...], rows: int, adapters: int, rank: int
) -> Case:
    used, n, size = min(rows, adapters), len(widths), sweep.dtype.itemsize
    moved = size * (used * n * rank * (d_in + rank) + rows * (d_in + n * rank))

    def make(seed: int) -> dict[str, Call]:
        torch.manual_seed(seed)
        b = batch(rows, adapters, rank, d_in, widths, sweep.dtype, sweep.device)
        calls: dict[str, Call] = {"own": lambda: sweep.ops.shrink_core(b.x, b.site, b.cores, b.plan)}
        if rows <= sweep.bmm_rows:
            calls["gather-bmm"] = gather_bmm(b)
        return calls

    return Case("shrink_core", {"site": site, "rows": rows, "adapters": adapters, "rank": rank}, moved, make)


def gather_bmm(b: SiteBatch) -> Call:
    """Each row's own U and core gathered, then two batched products."""
    u = stacked(b.site.u)  # (A, n·r, d_in)
    n, (rows, _) = len(b.site.columns) - 1, b.x.shape
    adapter, core = b.plan.segments.adapter, b.plan.segments.core

    def call() -> torch.Tensor:
        h = torch.bmm(u.index_select(0, adapter), b.x[:, :, None]).view(rows, n, 1, -1)
        return torch.matmul(h, b.cores.index_select(0, core))

    return call


def variants(sweep: Measurement) -> Iterator[Case]:
    """Every configuration of a prompt's worth asking, on a GPU alone: what `fused.shrink_core.config` should say."""
    from tucka_runtime.kernels.fused.shrink_core import Config

    for rows, rank in product(sweep.prompts, sweep.ranks):
        for block_k, span, chunks, warps in product((64, 128, 256), (256, 512, 1024, 4096), (1, 4), (2, 4)):
            if block_k <= span:
                yield _variant(sweep, rows, 1, rank, Config(block_k, span, chunks, warps, 3))


def _variant(sweep: Measurement, rows: int, adapters: int, rank: int, how: "Config") -> Case:
    from tucka_runtime.kernels.fused.shrink_core import run

    d_in, widths = sweep.shape.sites["qkv"]
    case = _case(sweep, "qkv", d_in, widths, rows, adapters, rank)

    def make(seed: int) -> dict[str, Call]:
        torch.manual_seed(seed)
        b = batch(rows, adapters, rank, d_in, widths, sweep.dtype, sweep.device)
        return {"own": lambda: run(b.x, b.site, b.cores, b.plan, how)}

    return Case(case.op, {**case.shape, **asdict(how)}, case.moved, make)
