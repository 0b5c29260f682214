"""Sampling, and the filters for rows that ask for them: against torch's softmax and multinomial, and its sort."""

from collections.abc import Iterator

import torch

from tucka_runtime.kernels.bench.shapes import Measurement
from tucka_runtime.kernels.bench.timing import Call, Case


def cases(sweep: Measurement) -> Iterator[Case]:
    """Every number of decoding rows."""
    for rows in sweep.rows:
        yield _sample(sweep, rows)
        yield _filter(sweep, rows)


def _logits(sweep: Measurement, rows: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(rows, sweep.shape.vocab, device=sweep.device) * 4


def _sample(sweep: Measurement, rows: int) -> Case:
    def make(seed: int) -> dict[str, Call]:
        logits = _logits(sweep, rows, seed)
        heat = torch.full((rows,), 0.7, device=sweep.device)
        seeds = torch.arange(rows, device=sweep.device)
        return {
            "own": lambda: sweep.ops.sample(logits, heat, seeds, seeds),
            "torch": lambda: torch.multinomial(torch.softmax(logits / 0.7, -1), 1),
        }

    return Case("sample", {"what": "sample", "rows": rows}, rows * sweep.shape.vocab * 4, make)


def _filter(sweep: Measurement, rows: int) -> Case:
    def make(seed: int) -> dict[str, Call]:
        logits = _logits(sweep, rows, seed)
        k = torch.full((rows,), 50, device=sweep.device)
        p, least = torch.full((rows,), 0.9, device=sweep.device), torch.zeros(rows, device=sweep.device)
        return {
            "own": lambda: sweep.ops.filter_logits(logits, k, p, least),
            "torch": lambda: torch.sort(logits, dim=-1, descending=True),
        }

    return Case("sample", {"what": "filter", "rows": rows}, rows * sweep.shape.vocab * 8, make)
