"""RMSNorm: against torch's."""

from collections.abc import Iterator

import torch

from tucka_runtime.kernels.bench.shapes import Measurement
from tucka_runtime.kernels.bench.timing import Call, Case


def cases(sweep: Measurement) -> Iterator[Case]:
    """Every number of rows, decoding and prompts."""
    for rows in (*sweep.rows, *sweep.prompts):
        yield _case(sweep, rows)


def _case(sweep: Measurement, rows: int) -> Case:
    d = sweep.shape.d

    def make(seed: int) -> dict[str, Call]:
        torch.manual_seed(seed)
        x = torch.randn(rows, d, device=sweep.device).to(sweep.dtype)
        weight = torch.ones(d, dtype=sweep.dtype, device=sweep.device)
        return {
            "own": lambda: sweep.ops.norm(x, weight, None, 1e-5),
            "torch": lambda: torch.nn.functional.rms_norm(x, (d,), weight, 1e-5),
        }

    return Case("norm", {"rows": rows}, sweep.dtype.itemsize * 2 * rows * d, make)
