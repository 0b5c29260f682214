"""Scheduled work as one packed set of device tensors.

Row order: base rows first (and prompts that are only being routed), then adapter by adapter; within one the sequences
that share its route, then those with a route of their own, one segment each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from tucka_runtime.core import ActiveSet
from tucka_runtime.delta import Delta, RouteSum, Segment
from tucka_runtime.kernels.pages import PagePlan
from tucka_runtime.scheduler import Work
from tucka_runtime.sequence import AdapterKey, RouteScope


@dataclass(eq=False)
class Batch:
    """One forward pass. `works` is in row order; `first_rows` has the first row of each, `segment_of` its segment."""

    works: list[Work]
    first_rows: list[int]
    segment_of: list[int | None]
    ids: Tensor
    positions: Tensor
    lengths: Tensor | None
    pages: PagePlan
    delta: Delta

    @staticmethod
    def build(
        works: Sequence[Work],
        active: ActiveSet | None,
        block_size: int,
        rope_limit: int | None,
        ops: SimpleNamespace,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Batch":
        """`rope_limit` is the length from which dynamic rotary scaling stretches; None where there is none."""
        works = sorted(works, key=_row_order)
        first_rows, rows = [], 0
        for work in works:
            first_rows.append(rows)
            rows += work.count
        ids = torch.tensor([t for w in works for t in w.seq.tokens[w.start : w.start + w.count]]).to(device)
        positions = torch.tensor([p for w in works for p in range(w.start, w.start + w.count)]).to(device)
        lengths = None
        if rope_limit is not None and any(max(w.seq.num_prompt, w.start + w.count) > rope_limit for w in works):
            known = [max(w.seq.num_prompt, p + 1) for w in works for p in range(w.start, w.start + w.count)]
            lengths = torch.tensor(known).to(device)
        spans = [(first, w.count, w.start + w.count) for first, w in zip(first_rows, works, strict=True)]
        segments, segment_of, sums = _segments(works, first_rows, ids, device)
        return Batch(
            works=works,
            first_rows=first_rows,
            segment_of=segment_of,
            ids=ids,
            positions=positions,
            lengths=lengths,
            pages=PagePlan.build(spans, [w.seq.block_table for w in works], block_size, device),
            delta=Delta.build(rows, segments, sums, active, ops, dtype, device),
        )


def _row_order(work: Work) -> tuple[bool, str, int, bool]:
    """Sorting is stable: within a segment the scheduler's order stays."""
    seq = work.seq
    if seq.adapter is None or seq.route_sum is not None:
        return False, "", 0, False
    return True, seq.adapter.name, seq.adapter.generation, seq.scope is RouteScope.REQUEST


def _segments(
    works: Sequence[Work], first_rows: Sequence[int], ids: Tensor, device: torch.device
) -> tuple[list[Segment], list[int | None], list[RouteSum]]:
    segments: list[Segment] = []
    segment_of: list[int | None] = []
    sums: list[RouteSum] = []
    shared: AdapterKey | None = None  # the adapter whose shared segment is the last one
    for work, first in zip(works, first_rows, strict=True):
        seq, end = work.seq, first + work.count
        if seq.adapter is None:
            segment_of.append(None)
        elif isinstance(seq.route_sum, RouteSum):
            if work.start == 0:  # the first chunk, or once more after a preemption
                seq.route_sum.total, seq.route_sum.count = None, 0
            seq.route_sum.first, seq.route_sum.end = first, end
            sums.append(seq.route_sum)
            segment_of.append(None)
        elif seq.scope is RouteScope.REQUEST:
            prompt = None if seq.route else torch.tensor(seq.tokens[: seq.num_prompt]).to(device)
            segments.append(Segment(first, end, seq.adapter, given=seq.route, ids=prompt))
            segment_of.append(len(segments) - 1)
            shared = None
        else:
            if shared == seq.adapter:
                segments[-1].end = end
            else:
                segments.append(Segment(first, end, seq.adapter))
                shared = seq.adapter
            segments[-1].ids = ids[segments[-1].first : end]
            segment_of.append(len(segments) - 1)
    return segments, segment_of, sums
