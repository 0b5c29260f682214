"""Scheduled work as one packed set of device tensors.

Row order: base rows first (and prompts that are only being routed), then adapter by adapter; within one the sequences
that share its route, then those with a route of their own, one segment each.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tucka_runtime.engine.adapters.active import ActiveSet
from tucka_runtime.engine.adapters.delta import Delta, RouteSum, Segment
from tucka_runtime.engine.scheduler import Work
from tucka_runtime.engine.sequence import Sequence
from tucka_runtime.kernels.tables.blocks import PagePlan
from tucka_runtime.kernels.tables.transfer import place
from tucka_runtime.messages import AdapterKey, RouteScope


class Chosen:
    """The tokens that the last step chose, where they lie on the device: the next step may start from them before the
    host knows them."""

    def __init__(self, size: int, device: torch.device):
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self.place: dict[tuple[str, int], int] = {}

    def keep(self, tokens: Tensor, seqs: Rows[Sequence]) -> Tensor:
        """Takes the tokens (N,) of a step's sequences; returns their copy on the way to the host."""
        if tokens.data_ptr() != self.tokens.data_ptr():
            self.tokens[: len(tokens)].copy_(tokens)
        self.place = {seq.key: i for i, seq in enumerate(seqs)}
        return tokens.to("cpu", non_blocking=True, copy=True)

    def source(self, seq: Sequence) -> int:
        """Where a sequence's last token is, -1 if it is known."""
        return self.place[seq.key] if seq.pending else -1

    def fill_in(self, ids: Tensor, rows: Rows[tuple[int, Sequence]]) -> None:
        """Puts the tokens of those that are `pending` into their rows."""
        pending = [(row, self.place[seq.key]) for row, seq in rows if seq.pending]
        if pending:
            at, source = place(list(torch.tensor(pending).T.contiguous()), ids.device)
            ids.index_copy_(0, at, self.tokens.index_select(0, source))


@dataclass(eq=False)
class Batch:
    """One forward pass. `works` is in row order; `first_rows` has the first row of each, `segment_of` its segment."""

    works: list[Work]
    first_rows: list[int]
    segment_of: list[int | None]
    due: list[int]
    """The works that bring a token."""
    due_rows: Tensor
    """Their rows (N,)."""
    ids: Tensor
    positions: Tensor
    lengths: Tensor | None
    pages: PagePlan
    delta: Delta

    @staticmethod
    def build(
        works: Rows[Work],
        active: ActiveSet | None,
        block_size: int,
        rope_limit: int | None,
        chosen: Chosen,
        ops: SimpleNamespace,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Batch":
        """`rope_limit` is the length from which dynamic rotary scaling stretches; None where there is none."""
        works = sorted(works, key=row_order)
        first_rows, rows = [], 0
        for work in works:
            first_rows.append(rows)
            rows += work.count
        due = [i for i, w in enumerate(works) if w.samples and w.seq.sampling.max_tokens > 0]
        lengths = None
        if rope_limit is not None and any(max(w.seq.num_prompt, w.start + w.count) > rope_limit for w in works):
            known = [max(w.seq.num_prompt, p + 1) for w in works for p in range(w.start, w.start + w.count)]
            lengths = torch.tensor(known)
        spans = [(first, w.count, w.start + w.count) for first, w in zip(first_rows, works, strict=True)]
        segments, segment_of, sums = segment(works, first_rows)
        prompts = [torch.tensor(s.prompt) for s in segments if s.prompt is not None]
        pages = PagePlan.build(spans, [w.seq.block_table for w in works], block_size, torch.device("cpu"))
        parts: list[Any] = [
            torch.tensor([t for w in works for t in known_ids(w)]),
            torch.tensor([p for w in works for p in range(w.start, w.start + w.count)]),
            torch.tensor([first_rows[i] + works[i].count - 1 for i in due], dtype=torch.int64),
            pages,
            *prompts,
            *([lengths] if lengths is not None else []),
        ]
        ids, positions, due_rows, pages, *rest = place(parts, device)
        chosen.fill_in(ids, [(first + w.count - 1, w.seq) for first, w in zip(first_rows, works, strict=True)])
        left = iter(rest)
        for s in segments:
            s.ids = ids[s.first : s.end] if s.prompt is None else next(left)
        return Batch(
            works=works,
            first_rows=first_rows,
            segment_of=segment_of,
            due=due,
            due_rows=due_rows,
            ids=ids,
            positions=positions,
            lengths=next(left, None),
            pages=pages,
            delta=Delta.build(rows, segments, sums, active, ops, dtype, device),
        )


def known_ids(work: Work) -> list[int]:
    """The tokens of a piece of work; 0 stands for the one that is still on the device."""
    own = work.seq.tokens[work.start : work.start + work.count]
    return own if len(own) == work.count else [*own, 0]


def row_order(work: Work) -> tuple[bool, str, int, bool]:
    """Sorting is stable: within a segment the scheduler's order stays."""
    seq = work.seq
    if seq.adapter is None or seq.route_sum is not None:
        return False, "", 0, False
    return True, seq.adapter.name, seq.adapter.generation, seq.scope is RouteScope.REQUEST


def segment(works: Rows[Work], first_rows: Rows[int]) -> tuple[list[Segment], list[int | None], list[RouteSum]]:
    """The segments of works in row order; the segment of each work; the prompts that are only being routed."""
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
            prompt = None if seq.route else seq.tokens[: seq.num_prompt]
            segments.append(Segment(first, end, seq.adapter, given=seq.route, prompt=prompt))
            segment_of.append(len(segments) - 1)
            shared = None
        else:
            if shared == seq.adapter:
                segments[-1].end = end
            else:
                segments.append(Segment(first, end, seq.adapter))
                shared = seq.adapter
            segment_of.append(len(segments) - 1)
    return segments, segment_of, sums
