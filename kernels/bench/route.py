"""Route of one segment from token ids (k 4, t 2): once per adapter and step."""

from collections.abc import Iterator

import torch

from tucka_runtime.kernels.bench.shapes import Sweep
from tucka_runtime.kernels.bench.timing import Call, Case

K, T = 4, 2


def cases(sweep: Sweep) -> Iterator[Case]:
    """Every number of tokens, decoding and prompts."""
    for tokens in (*sweep.rows, *sweep.prompts):
        yield _case(sweep, tokens)


def _case(sweep: Sweep, tokens: int) -> Case:
    def make(seed: int) -> dict[str, Call]:
        torch.manual_seed(seed)
        table = torch.randn(sweep.shape.vocab, K * T, device=sweep.device)
        ids = torch.randint(0, sweep.shape.vocab, (tokens,), device=sweep.device)
        return {"own": lambda: sweep.ops.route.route_ids([ids], [table], T)}

    return Case("route", {"tokens": tokens}, tokens * (K * T * 4 + 8), make)
