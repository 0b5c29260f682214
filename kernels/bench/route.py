"""Route of one segment from token ids (k 4, t 2): once per adapter and step."""

from collections.abc import Iterator

import torch

from tucka_runtime.kernels.bench.shapes import Measurement
from tucka_runtime.kernels.bench.timing import Call, Case
from tucka_runtime.kernels.tables.routes import CoreParts, RoutePlan

K, T = 4, 2


def cases(sweep: Measurement) -> Iterator[Case]:
    """Every number of tokens, decoding and prompts."""
    for tokens in (*sweep.rows, *sweep.prompts):
        yield _case(sweep, tokens)


def _case(sweep: Measurement, tokens: int) -> Case:
    def make(seed: int) -> dict[str, Call]:
        torch.manual_seed(seed)
        table = torch.randn(sweep.shape.vocab, K * T, device=sweep.device)
        ids = torch.randint(0, sweep.shape.vocab, (tokens,), device=sweep.device)
        c, g = torch.randn(1, T, 1, device=sweep.device), torch.randn(1, K, 1, 1, 1, device=sweep.device)
        adapter = CoreParts(c, g, torch.zeros(1, dtype=torch.int64, device=sweep.device), table)
        plan = RoutePlan.build([adapter], [0], [ids], [None], sweep.device)
        return {"own": lambda: sweep.ops.route_ids(plan)}

    return Case("route", {"tokens": tokens}, tokens * (K * T * 4 + 8), make)
